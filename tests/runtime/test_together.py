"""The norms of a decoding step, looked at together: what that costs in Python, and what ends it."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from integration_support import assert_close
from reuse_support import Decoder, one_token, parameters
from torch import nn

import dorafx
from dorafx.log import NormCounters
from dorafx.runtime import NormStore, norm_store, streams
from dorafx.runtime.streams import Streams
from dorafx.runtime.together import Together
from dorafx.runtime.watch import Watch

RUNTIME = str(Path(dorafx.__file__).parent / "runtime")


def layers(count: int) -> nn.Module:
    """``count`` DoRA layers in a row."""
    torch.manual_seed(count)
    base = nn.Sequential(*(nn.Linear(24, 24) for _ in range(count)))
    config = peft.LoraConfig(r=4, use_dora=True, target_modules=[str(k) for k in range(count)])
    return peft.get_peft_model(base, config).eval()


def calls(function: Callable[..., Any], *args: Any) -> int:
    """How many functions ``dorafx.runtime`` calls meanwhile, of Python's or of C's."""
    number = 0

    def count(frame: Any, event: str, _: Any) -> None:
        nonlocal number
        caller = frame if event == "c_call" else frame.f_back
        if event in ("call", "c_call") and caller is not None and caller.f_code.co_filename.startswith(RUNTIME):
            number += 1

    sys.setprofile(count)
    try:
        function(*args)
    finally:
        sys.setprofile(None)
    return number


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_no_call_a_norm(codegen: str) -> None:
    found = {}
    for count in (2, 8):
        model = layers(count)
        step = torch.compile(model, backend="dorafx", options={"dorafx.codegen": codegen})
        with torch.no_grad():
            step(one_token())
            one_by_one = calls(step, one_token())
            together = calls(step, one_token())
            assert_close(step(one_token()), model(one_token()), 1e-5)
        found[count] = one_by_one, together
    assert found[8][1] == found[2][1] <= 40
    assert found[8][0] - found[2][0] >= 6 * 10, "the counter counts"


def test_a_graph_that_serves_several_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives layers that are alike one graph."""
    model = layers(5)
    dorafx.optimize(model, scope="modules", codegen="eager", strict=True)
    asked = []
    kept = NormStore.kept
    monkeypatch.setattr(NormStore, "kept", lambda *args, **rest: asked.append(1) or kept(*args, **rest))
    with torch.no_grad():
        for number in (5, 5, 0, 0):
            asked.clear()
            model(one_token())
            assert len(asked) == number
        parameters(model)[3].data.mul_(1.5)
        model(one_token())
        assert len(asked) == 1, "the others are looked at together still"
        ours = model(one_token())
        dorafx.restore(model)
        assert_close(ours, model(one_token()), 1e-5)


def test_another_model_in_the_same_graph() -> None:
    """The tensors are other objects, at the same places."""
    first, second = layers(3), layers(4)
    decoders = [Decoder(m) for m in (first, second)]
    for _ in range(4):
        for decoder in decoders:
            decoder.step()


class Kept:
    """A store with one norm of some tensors, that has been taken once."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self.store = NormStore(NormCounters())
        self.together = Together(self.store)
        self.tensors = list(tensors)
        self.norm = torch.randn(4)
        self.store.keep(self.store.observe("n", self.tensors), self.norm)
        self.together.remember(self.tensors, [], [("n", self.tensors)])

    def taken(self) -> bool:
        taken = self.together.taken(self.tensors, [])
        norms = None if taken is None else taken.read(Streams())
        assert norms is None or norms[0] is self.norm
        return norms is not None


def kept() -> Kept:
    return Kept(torch.randn(4, 3), torch.randn(4, 2), torch.randn(2, 3))


def test_what_ends_in_the_store_ends_here() -> None:
    ways: list[Callable[[Kept], object]] = [
        lambda k: k.store.clear(),
        lambda k: k.store.drop("n", k.tensors),
        lambda k: k.store.recorded(k.tensors[:1]),
        lambda k: k.store.invalidate(k.tensors[1:2]),
        lambda k: k.store.kept("n", k.tensors, recomputing=True),
        lambda k: k.store.keep(k.store.observe("n", k.tensors), torch.randn(4)),
        lambda k: torch.optim.SGD([nn.Parameter(torch.ones(1))]).step(),
    ]
    for number, way in enumerate(ways):
        one = kept()
        assert one.taken()
        way(one)
        assert not one.taken(), number


LARGE = (640, 512)


@pytest.mark.parametrize("rows", [4, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_each_element_of_a_small_factor_is_compared(rows: int, dtype: torch.dtype, transposed: bool) -> None:
    right = torch.randn(rows, LARGE[1]).to(dtype)
    if transposed:
        right = right.t().contiguous().t()
    one = Kept(torch.randn(LARGE).to(dtype), torch.randn(LARGE[0], rows).to(dtype), right)
    assert one.taken()
    for tensor in one.tensors[1:]:
        for row, column in ((0, 0), (1, 2), (3, 1), (-1, -1), (tensor.shape[0] // 2, tensor.shape[1] // 3)):
            before = tensor.data[row, column].clone()
            tensor.data[row, column] += 1
            assert not one.taken(), (row, column)
            tensor.data[row, column] = before
            assert one.taken()
            tensor.data[row, column] += 1
            assert one.store.kept("n", one.tensors) is None, (row, column)
            tensor.data[row, column] = before
            one = Kept(*one.tensors)
    # Two of its rows exchanged are another factor.
    one.tensors[2].data[[0, 1]] = one.tensors[2].data[[1, 0]].clone()
    assert not one.taken()


def test_what_is_compared_whole() -> None:
    """At most 64 KiB, or a 128th of all that the norm is computed from; so a step reads at most a few hundredths more."""

    def whole(*shapes: tuple[int, ...]) -> list[bool]:
        tensors = [torch.zeros(shape) for shape in shapes]
        return [bool(state.bytes) for state in Watch(tensors, print).states]

    assert whole((128, 128), (128, 129), (8, 8)) == [True, False, True]
    assert whole((2048, 2048), (2048, 16), (16, 2048)) == [False, True, True]
    assert whole((2048, 2048), (2048, 17), (17, 2048)) == [False, False, False]


def test_numbers_and_missing_norms() -> None:
    one = kept()
    assert one.together.taken(one.tensors, [1.0]) is None
    one.together.remember(one.tensors, [], [("n", one.tensors), ("another", one.tensors)])
    assert one.taken(), "what is not kept is not remembered"


def test_it_keeps_no_norm_of_what_is_gone() -> None:
    one = kept()
    norm = weakref.ref(one.norm)
    del one.norm, one.tensors
    gc.collect()
    assert norm() is None


def test_layers_that_come_and_go_do_not_pile_up() -> None:
    store = NormStore(NormCounters())
    together = Together(store)
    alive = []
    for _ in range(100):
        alive = [torch.randn(4, 3) for _ in range(3)]
        for tensor in alive:
            store.keep(store.observe("n", [tensor]), torch.randn(4))
            together.remember([tensor], [], [("n", [tensor])])
    assert len(together._seen) <= 8
    assert together.taken(alive[:1], []) is not None


@pytest.mark.parametrize("position", [0, 1, 2])
def test_an_attribute_that_may_refer_to_others(position: int) -> None:
    """Of those tensors it is asked whether they are the same; of the others whose content they have."""
    tensors = [torch.randn(4, 3), torch.randn(4, 2), torch.randn(2, 3)]
    tensors[position].quant_state = [tensors[position]]  # type: ignore[attr-defined]
    for other in range(3):
        one = Kept(*tensors)
        assert one.taken()
        one.tensors[other] = nn.Parameter(one.tensors[other].detach(), requires_grad=False)
        assert one.together.taken([*one.tensors], []) is None
        one.tensors[other] = tensors[other]
        assert one.taken()
        with torch.no_grad():
            tensors[other][0] *= 2
        assert not one.taken()


def test_the_same_memory_of_another_storage() -> None:
    """As a parameter has it whose memory was given back and had by another, while somebody holds the first storage."""
    one = kept()
    with torch.no_grad():
        other = torch.from_numpy(one.tensors[1].numpy())
    assert other.data_ptr() == one.tensors[1].data_ptr()
    one.tensors[1].data = other
    assert not one.taken()


def test_each_norm_waits_for_its_own_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two norms that one stream computed, in two calls; a third that another did."""
    noted = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name, self.events = name, 0

        def record_event(self) -> str:
            self.events += 1
            return f"{self.name}{self.events}"

        def wait_event(self, event: str) -> None:
            noted.append(event)

    main, side = Stream("main"), Stream("side")
    current = [side]
    monkeypatch.setattr(streams, "_WITH_STREAMS", ("cpu",))
    monkeypatch.setattr(streams, "_current_stream", lambda _: current[0])
    monkeypatch.setattr(streams, "_hold", lambda part, stream: None)
    store = NormStore(NormCounters())
    together = Together(store)
    tensors = [torch.randn(4, 3) for _ in range(3)]
    for tensor, stream in zip(tensors, (side, side, main)):
        current[0] = stream
        store.keep(store.observe("n", [tensor]), torch.randn(4), Streams())
    together.remember(tensors, [], [("n", [tensor]) for tensor in tensors])
    for stream, expected in ((main, ["side1", "side2"]), (side, ["main1"])):
        current[0] = stream
        noted.clear()
        taken = together.taken(tensors, [])
        assert taken is not None
        taken.read(Streams())
        assert noted == expected


def test_what_changed_is_told() -> None:
    """Together they only say that something did."""
    decoder = Decoder(layers(3))
    for _ in range(3):
        decoder.step()
    before = dict(norm_store().counters.invalidated)
    parameters(decoder.model)[0].data.mul_(1.5)
    decoder.step()
    after = norm_store().counters.invalidated
    assert {reason: n - before.get(reason, 0) for reason, n in after.items() if n > before.get(reason, 0)} == {
        "a parameter's data was overwritten": 1
    }
