"""Norms by content on a device, in Triton's interpreter: the CPU stands for the device, and the host sees nothing of the contents. Run by
test_on_device.py in a process of its own, since the interpreter is switched on for a whole process."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from integration_support import assert_close, peft_perceptron
from reuse_support import LAYERS, Decoder, counts, one_token, overwrite, parameters, prompt
from test_content import UNSEEN
from test_staleness import CHANGES

from dorafx import rewrite_log
from dorafx.bench.clock import Clock
from dorafx.bench.suites.norm import unchanged
from dorafx.ops import dispatch
from dorafx.ops.triton import checksums
from dorafx.plan import cost
from dorafx.runtime import content, on_device, streams, watch
from dorafx.runtime.on_device import NormsOnDevice, Source

EVERY = 3


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_DEVICES", ("cpu",))
    monkeypatch.setattr(checksums, "WORDS", 64)
    monkeypatch.setattr(checksums, "EVERY", EVERY)
    monkeypatch.setitem(cost.BALANCE, "cuda", 0.0)  # every comparison is worth it
    # What the host reads of a CPU's memory.
    monkeypatch.setattr(watch, "is_read", lambda tensor: False)
    monkeypatch.setattr(content, "_content", lambda tensor: None)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of these small models are sampled, too."""
    monkeypatch.setattr(on_device, "_SAMPLED_BYTES", 1)


def compared() -> int:
    return rewrite_log().norms.compared


# -- programs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [*CHANGES, *UNSEEN], ids=lambda f: f.__name__.strip("_"))
def test_change_between_tokens(change: Callable[[Any], None]) -> None:
    decoder = Decoder()
    for _ in range(3):
        decoder.step()
    assert (*counts(), compared()) == (LAYERS, 0, 2 * LAYERS)
    change(decoder.model)
    for _ in range(3):
        decoder.step()


@pytest.mark.parametrize("record", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["evaluation", "training"])
@pytest.mark.parametrize("change", [*CHANGES, *UNSEEN], ids=lambda f: f.__name__.strip("_"))
def test_change_between_prefills(change: Callable[[Any], None], record: bool) -> None:
    decoder = Decoder()
    for _ in range(2):
        decoder.prefill(record)
    assert (*counts(), compared()) == (LAYERS, 0, LAYERS)
    change(decoder.model)
    for _ in range(2):
        decoder.prefill(record)


def test_a_change_between_a_forward_and_its_backward_leaves_the_norms_of_the_forward() -> None:
    """What autograd keeps of a call is never written by a later one."""
    model = peft_perceptron()
    decoder = Decoder(model)
    x = prompt().requires_grad_()
    gradients = []
    for _ in range(2):
        y = decoder.compiled(x)
        with torch.no_grad():
            saved = [p.clone() for p in parameters(model)]
            for p in parameters(model):
                overwrite(p)
            decoder.compiled(prompt())  # its norms are others
            for p, value in zip(parameters(model), saved):
                p.data.copy_(value)
        (gradient,) = torch.autograd.grad(y.sin().sum(), x)
        gradients.append(gradient)
    x2 = prompt().requires_grad_()
    (expected,) = torch.autograd.grad(model(x2).sin().sum(), x2)
    for gradient in gradients:
        assert_close(gradient, expected, 1e-5)


@pytest.mark.usefixtures("sampled")
def test_a_weight_is_seen_within_some_tokens_and_at_once_by_a_prefill() -> None:
    decoder = Decoder().model
    with torch.no_grad():
        compiled = Decoder(decoder)
        for _ in range(3):
            compiled.step()
        weight = decoder.base_model.model.first.base_layer.weight
        weight.data[5, 7] += 3
        for _ in range(EVERY):
            compiled.compiled(one_token())
        compiled.step()
        weight.data[9, 2] += 3
        compiled.step(prompt())


def test_where_products_are_cheap_long_forwards_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cost.BALANCE, "cuda", 184.0)
    decoder = Decoder()
    for _ in range(3):
        decoder.step(prompt())
    assert (*counts(), compared()) == (3 * LAYERS, 0, 0)


def test_never() -> None:
    decoder = Decoder(None, **{"dorafx.norm_reuse": "never"})
    for _ in range(2):
        decoder.step()
    assert (*counts(), compared()) == (2 * LAYERS, 0, 0)


def test_layers_that_share_a_weight() -> None:
    """As ``layer_replication`` makes them: one graph serves both, and each has its own norms."""
    first, second = peft_perceptron(), peft_perceptron()
    for name in ("first", "second"):
        for layer, other in ((getattr(first.base_model.model, name), getattr(second.base_model.model, name)),):
            other.base_layer.weight = layer.base_layer.weight
    for p in parameters(second):
        overwrite(p)
    decoders = [Decoder(first), Decoder(second)]
    for _ in range(3):
        for decoder in decoders:
            decoder.step()
    assert (*counts(), compared()) == (2 * LAYERS, 0, 4 * LAYERS)


# -- streams -------------------------------------------------------------------------------------------------------------


def test_each_stream_has_norms_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """So none waits for another one, and a change is seen by each."""
    current, noted = ["main"], []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> None:
            return None

        def wait_event(self, event: Any) -> None:
            noted.append(self.name)

    made = {name: Stream(name) for name in ("main", "side")}
    monkeypatch.setattr(streams, "_WITH_STREAMS", ("cpu",))
    monkeypatch.setattr(streams, "_current_stream", lambda device: made[current[0]])
    monkeypatch.setattr(streams, "_hold", lambda part, stream: None)
    decoder = Decoder()
    for name in ("main", "side", "main", "side"):
        current[0] = name
        decoder.step()
    assert (*counts(), compared()) == (2 * LAYERS, 0, 2 * LAYERS)
    for p in parameters(decoder.model):
        overwrite(p)
    for name in ("main", "side"):
        current[0] = name
        decoder.step()


# -- one graph's norms ---------------------------------------------------------------------------------------------------


class Norms:
    """Two norms, as a decoding graph takes them; the host trusts them as long as ``entries`` is the same."""

    def __init__(self, few_tokens: bool = True, kernels: bool = True) -> None:
        torch.manual_seed(1)
        self.layers = [(torch.randn(20, 30), torch.randn(20, 3), torch.randn(3, 30)) for _ in range(2)]
        self.on_device = NormsOnDevice(few_tokens)
        self.entries: list[Any] = [object(), object()]
        self.numbers = [1.0]
        self.kernels = kernels
        self.computed: list[int] = []

    def sources(self) -> list[Source | None]:
        return [Source(list(t), self.numbers, t if self.kernels else None, 0.5, None) for t in self.layers]

    def exact(self, i: int) -> torch.Tensor:
        weight, left, right = self.layers[i]
        return self.numbers[0] * (weight + 0.5 * left @ right).norm(dim=1)

    def compute(self, places: list[int]) -> list[torch.Tensor]:
        self.computed += places
        return [self.exact(i) for i in places]

    def call(self, trusted: bool = True, captured: bool = False, decodes: bool = True) -> dict[int, torch.Tensor]:
        entries = self.entries if trusted else None
        first = self.layers[0]
        norms = self.on_device.norms(first, self.sources, self.compute, entries, decodes, captured)
        for i, norm in norms.items():
            torch.testing.assert_close(norm, self.exact(i), rtol=1e-5, atol=1e-5)
        return norms

    @property
    def record(self) -> Any:
        (record,) = self.on_device._records.values()
        return record

    def poison(self) -> None:
        """Make what is kept recognisable: a norm that is copied is wrong now."""
        self.record.flat.fill_(-1)
        for norm in self.record.norms:
            norm.fill_(-1)


def copied(norms: Norms, **how: Any) -> bool:
    """Whether a call copies what is kept."""
    norms.poison()
    try:
        norms.call(**how)
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("few_tokens", [True, False])
def test_what_did_not_change_is_copied_and_what_did_is_computed(few_tokens: bool) -> None:
    norms = Norms(few_tokens)
    for trusted in (False, True, True):
        norms.call(trusted)
    assert norms.computed == [0, 1], "by the caller once"
    assert copied(norms, trusted=few_tokens)
    norms = Norms(few_tokens)
    norms.call()
    for i in range(2):
        for t in norms.layers[i]:
            t.data[1] += 1
            norms.call()
    assert norms.computed == [0, 1]


@pytest.mark.parametrize("few_tokens", [True, False])
def test_what_is_kept_is_never_written(few_tokens: bool) -> None:
    norms = Norms(few_tokens)
    norms.call()
    record = norms.record
    before = record.sums.clone(), record.flat.clone(), [n.clone() for n in record.norms]
    norms.layers[0][1].data.mul_(2)
    norms.call()
    assert norms.record is not record
    torch.testing.assert_close((record.sums, record.flat, record.norms), before, rtol=0, atol=0)


def test_the_same_contents_at_another_place() -> None:
    norms = Norms()
    norms.call()
    norms.layers[1] = tuple(t.clone() for t in norms.layers[1])  # type: ignore[assignment]
    norms.entries = [object(), object()]
    assert copied(norms)
    assert norms.computed == [0, 1]


def test_the_same_bytes_read_in_another_way() -> None:
    norms = Norms()
    norms.layers[1] = (torch.randn(16, 16), torch.randn(16, 3), torch.randn(3, 16))
    norms.call()
    weight, left, right = norms.layers[1]
    norms.layers[1] = (weight.t(), left, right)
    norms.call(trusted=False)
    assert norms.computed == [0, 1] * 2


def test_another_number_is_another_content() -> None:
    norms = Norms(kernels=False)
    norms.call(trusted=False)
    norms.numbers = [2.0]
    norms.call(trusted=False)


def test_norms_that_the_kernels_do_not_compute() -> None:
    """The host reads which of them changed; a graph that is captured computes them itself."""
    norms = Norms(kernels=False)
    for _ in range(3):
        assert norms.call().keys() == {0, 1}
    assert norms.computed == [0, 1]
    norms.layers[1][2].data[0] += 1
    norms.call()
    assert norms.computed == [0, 1, 1]
    phase = norms.record.layout.phase.item()
    assert norms.call(captured=True) == {}
    assert norms.record.layout.phase.item() == phase + 1, "samples go on"


def test_what_is_worth_comparing(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the ceilings of an H200: the largest rank of the paper in bf16, that of this project's own measurements in fp32."""
    monkeypatch.setitem(cost.BALANCE, "cuda", 184.0)

    def worth(rank: int, weight: torch.dtype, factors: torch.dtype, rounded: torch.dtype | None = None) -> bool:
        w = torch.empty(8192, 8192, dtype=weight, device="meta")
        left, right = (torch.empty(s, dtype=factors, device="meta") for s in ((8192, rank), (rank, 8192)))
        return Source([w, left, right], [], (w, left, right), 1.0, rounded).worth_comparing()

    half, single = torch.bfloat16, torch.float32
    assert worth(384, half, half) and not worth(256, half, half)
    assert worth(128, single, single) and not worth(64, single, single)
    assert worth(64, half, single) and not worth(64, half, single, half)
    assert not Source([], [], None, 1.0, None).worth_comparing()


@pytest.mark.usefixtures("sampled")
def test_without_trust_all_of_a_weight_is_compared() -> None:
    norms = Norms()
    for row in range(3):
        norms.call(trusted=False)
        norms.layers[0][0].data[row] += 1
    norms.call(trusted=False)
    for chunk in range(EVERY):
        norms.layers[0][0].data.view(-1)[64 * chunk] += 1
        norms.entries = [object(), object()]  # the host has seen something, and so has the store
        norms.call()
        norms.call(trusted=False)
        norms.call()
    assert norms.computed == [0, 1]


def test_trust_begins_with_the_entries_of_the_call() -> None:
    norms = Norms()
    norms.call(trusted=False)
    assert norms.record.entries is None
    norms.on_device.keep(norms.layers[0], norms.entries)
    assert norms.record.entries == norms.entries
    norms.sources = None  # type: ignore[method-assign, assignment]
    norms.call()


def test_what_cannot_be_compared_is_the_callers() -> None:
    norms = Norms()
    sources = norms.sources()
    sources[0] = None
    norms.sources = lambda: sources  # type: ignore[method-assign]
    for _ in range(2):
        assert norms.call(trusted=False).keys() == {1}
    sources[1] = None
    assert norms.call(trusted=False) == {}


def test_nothing_is_kept_of_what_is_gone() -> None:
    norms = Norms()
    norms.call()
    assert norms.on_device._records
    norms.layers = []
    gc.collect()
    assert not norms.on_device._records


def test_the_benchmark_of_unchanged_norms() -> None:
    weight, left, right = torch.randn(64, 96), torch.randn(64, 4), torch.randn(4, 96)
    clock = Clock("cpu", 0.01)
    assert unchanged(clock, weight, left, right).keys() == {"all compared", "compared in decoding"}
    assert not unchanged(clock, weight.double(), left, right)


# -- captures --------------------------------------------------------------------------------------------------------------


class Capture:
    """What a CUDA graph captures, to be repeated on the same memory."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[Callable[[], None]] = []
        for kind, name in ((checksums.Checksums, "compare"), (checksums.GuardedNorms, "norms")):
            monkeypatch.setattr(kind, name, self._noted(getattr(kind, name)))

    def _noted(self, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = method(*args)
            results = result if isinstance(result, tuple) else (result,)

            def again() -> None:
                repeated = method(*args)
                for old, new in zip(results, repeated if isinstance(repeated, tuple) else (repeated,)):
                    old.copy_(new)

            self.calls.append(again)
            return result

        return call

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.fixture
def captured_calls() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_a_capture_compares_at_every_replay(captured_calls: pytest.MonkeyPatch) -> None:
    norms = Norms()
    for _ in range(3):
        norms.call()
    record = norms.record
    capture = Capture(captured_calls)
    outputs = norms.call(captured=True)
    captured_calls.undo()
    assert norms.record is record and norms.on_device._captured == [record]
    norms.layers[1][1].data.mul_(3)
    norms.call()  # as an eager call sees it, which keeps other norms
    for _ in range(2):
        capture.replay()
        for i, norm in outputs.items():
            torch.testing.assert_close(norm, norms.exact(i), rtol=1e-5, atol=1e-5)
    norms.layers[1][1].data.div_(3)
    capture.replay()
    for i, norm in outputs.items():
        torch.testing.assert_close(norm, norms.exact(i), rtol=1e-5, atol=1e-5)


def test_a_capture_of_what_was_not_called_before_computes_its_norms() -> None:
    norms = Norms()
    assert norms.call(captured=True) == {}
    norms.call()
    assert norms.call(captured=True) == {}, "no kernel of a call that trusts the host has been loaded"
    norms.call()
    assert norms.call(captured=True).keys() == {0, 1}
    assert norms.call(trusted=False, captured=True) == {}
    long = Norms(few_tokens=False)
    for _ in range(3):
        long.call()
    assert long.call(captured=True) == {}
