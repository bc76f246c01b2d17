"""Norms by content: what a forward of many tokens, or one that trains, compares before it computes a norm."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from integration_support import assert_close, compile_eagerly, peft_model, peft_perceptron, run, tokens
from reuse_support import LAYERS, Decoder, counts, one_token, parameters, prompt
from test_staleness import CHANGES

import dorafx
from dorafx.runtime import norm_store
from dorafx.runtime.content import Contents, NormsByContent


def _first(model: Any) -> Any:
    return model.base_model.model.first


def _one_element_of_the_base(model: Any) -> None:
    _first(model).base_layer.weight.data[5, 7] += 0.5


def _two_rows_exchanged(model: Any) -> None:
    """The same numbers in another order."""
    b = _first(model).lora_B["default"].weight
    b.data[[0, 1]] = b.data[[1, 0]].clone()


def _through_numpy(model: Any) -> None:
    _first(model).lora_A["default"].weight.detach().numpy()[:] *= 1.5


def _swapped(model: Any) -> None:
    for p in parameters(model):
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach() * 1.5))


UNSEEN: list[Callable[[Any], None]] = [_one_element_of_the_base, _two_rows_exchanged, _through_numpy, _swapped]


@pytest.mark.parametrize("record", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("change", [*CHANGES, *UNSEEN], ids=lambda f: f.__name__.strip("_"))
def test_change_between_prefills(change: Callable[[Any], None], record: bool) -> None:
    decoder = Decoder()
    for _ in range(2):
        decoder.prefill(record)
    assert counts() == (LAYERS, LAYERS), "the second forward found the contents of the first"
    change(decoder.model)
    decoder.prefill(record)
    computed = counts()[0]
    decoder.prefill(record)
    assert counts()[0] == computed


@pytest.mark.parametrize("change", [*CHANGES, *UNSEEN], ids=lambda f: f.__name__.strip("_"))
def test_change_between_tokens(change: Callable[[Any], None]) -> None:
    """A token looks at the parameters that it was given before, and compares small ones whole."""
    decoder = Decoder()
    for _ in range(3):
        decoder.step(one_token())
    assert counts() == (LAYERS, 2 * LAYERS)
    change(decoder.model)
    decoder.step(one_token())


def test_a_truncated_rank_and_a_transposed_square() -> None:
    decoder = Decoder()
    decoder.step(prompt())
    model = decoder.model.base_model.model
    for layer in (model.first, model.second):
        for of in (layer.lora_A["default"].weight, layer.lora_B["default"].weight):
            of.data = of.data[:2] if of.shape[0] < of.shape[1] else of.data[:, :2]
    decoder.step(prompt())
    weight = torch.randn(24, 24)
    assert Contents().of([weight]) != Contents().of([weight.t()])
    assert Contents().of([weight]) != Contents().of([weight.t().contiguous()])


@pytest.mark.parametrize("checkpointed", [False, True])
def test_micro_batches_compute_norms_once_a_step(checkpointed: bool) -> None:
    model = peft_perceptron().train()
    twin = copy.deepcopy(model)
    compiled = compile_eagerly(model)
    optimizers = [torch.optim.AdamW(parameters(m), lr=1e-2, fused=True) for m in (model, twin)]

    def call(function: Any, x: torch.Tensor) -> torch.Tensor:
        if not checkpointed:
            return function(x)  # type: ignore[no-any-return]
        out: torch.Tensor = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=False)
        return out

    for step in range(3):
        for micro in range(4):
            x = torch.randn((8, 24), generator=torch.Generator().manual_seed(10 * step + micro))
            for function in (compiled, twin):
                call(function, x).sin().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, stock in zip(parameters(model), parameters(twin)):
        assert_close(ours, stock, 1e-4)
    assert counts() == (3 * LAYERS, (21 if checkpointed else 9) * LAYERS)


@pytest.mark.slow
def test_through_inductor() -> None:
    model = peft_model(layers=1).train()
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.strict": True})
    for scale in (1.0, 1.0, 1.5):
        with torch.no_grad():
            for p in parameters(model):
                p.data.mul_(scale)
        expected = run(model, lambda: model(input_ids=tokens()).logits)
        actual = run(model, lambda: compiled(input_ids=tokens()).logits)
        assert_close(actual.output, expected.output, 1e-5)
        for name, gradient in expected.gradients.items():
            assert_close(actual.gradients[name], gradient, 1e-4, name)
    assert counts() == (14, 7)


def test_decoding_asks_for_contents_where_the_watch_is_in_doubt() -> None:
    """An optimizer of other parameters, or a forward that trains, makes the watch forget; the bytes are the same."""
    decoder = Decoder().warm()
    other = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([other], lr=0.1)
    other.sum().backward()
    optimizer.step()
    decoder.step()
    decoder.compiled(one_token()).sum().backward()
    decoder.step()
    assert counts()[0] == LAYERS


def test_never_and_invalidated() -> None:
    decoder = Decoder(**{"dorafx.norm_reuse": "never"})
    for _ in range(2):
        decoder.step(prompt())
    assert counts() == (2 * LAYERS, 0) and len(norm_store().by_content) == 0
    decoder = Decoder()
    decoder.step(prompt())
    dorafx.invalidate(decoder.model)
    decoder.step(prompt())
    assert counts() == (4 * LAYERS, 0)


def test_what_a_program_receives_is_not_what_is_kept() -> None:
    """The norm is written to by the program that returned it."""
    w, a, b = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)

    def norm(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = (w + b @ a).norm(dim=1)
        return n, x @ w.T / n

    compiled = torch.compile(norm, backend="dorafx", options={"dorafx.codegen": "eager"})
    x = torch.randn(20, 8)
    for _ in range(3):
        n, y = compiled(x)
        assert_close(n, norm(x)[0], 1e-5)
        assert_close(y, norm(x)[1], 1e-5)
        n.zero_()


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t(),
    "slice of rows": lambda t: t[1:3],
    "slice of columns": lambda t: t[:, 1:4],
    "every other column": lambda t: t[:, ::2],
    "expanded": lambda t: t[:1].expand(4, -1),
    "vector": lambda t: t[0],
    "scalar": lambda t: t[0, 0],
    "empty": lambda t: t[:0],
}


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8]),
    st.integers(0, 10**6),
)
def test_content_is_every_byte_that_counts(layout: str, dtype: torch.dtype, seed: int) -> None:
    base = torch.randint(1, 100, (4, 6), generator=torch.Generator().manual_seed(seed)).to(dtype)
    tensor = LAYOUTS[layout](base)
    before = Contents().of([tensor])
    assert before is not None
    elsewhere = LAYOUTS[layout](base.clone())
    assert Contents().of([elsewhere]) == before
    if tensor.numel():
        place = seed % tensor.numel()
        elsewhere[tuple(torch.tensor(place).remainder(n) for n in elsewhere.shape)] += 1  # some element
        assert Contents().of([elsewhere]) != before


def test_what_has_no_content() -> None:
    class Subclass(torch.nn.Parameter):
        pass

    few, freed = torch.randn(100, 100)[:, :1], torch.randn(8)
    freed.untyped_storage().resize_(0)
    seen: list[Any] = []
    torch.vmap(lambda t: (seen.append(Contents().of([t])), t)[1])(torch.randn(2, 3))
    assert seen == [None]
    for tensor in (few, freed, torch.randn(2, device="meta"), Subclass(torch.randn(2)), torch.eye(3).to_sparse()):
        assert Contents().of([torch.randn(2), tensor]) is None
    positive = torch.randn(3)
    negative = torch._neg_view(positive)
    assert torch.equal(negative, -positive) and Contents().of([negative]) != Contents().of([positive])


def test_the_least_recently_used_are_removed() -> None:
    kept = NormsByContent(limit=3 * 16)
    content = Contents().of([torch.ones(2)])
    assert content is not None
    for place in range(3):
        kept.keep(place, content, torch.ones(4))
    assert kept.get(0, content) is not None
    kept.keep(3, content, torch.ones(4))
    assert [kept.get(place, content) is not None for place in range(4)] == [True, False, True, True]
    kept.keep(3, content, torch.ones(40))
    assert len(kept) == 1, "one that is larger than the limit is kept alone"
    kept.clear()
    assert len(kept) == 0 and kept.get(3, content) is None
