"""The prologue: norms in one call, and the squares of frozen weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import assert_close, peft_model, peft_perceptron, run, tokens
from reuse_support import LAYERS, OPTIMIZERS, Decoder, counts, overwrite, parameters, prompt

from dorafx.ops import norm
from dorafx.runtime import norm_store, prologue


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many norms each call of the operator computes."""
    seen: list[int] = []

    def counted(weights: list[torch.Tensor], *args: Any) -> list[torch.Tensor]:
        seen.append(len(weights))
        found: list[torch.Tensor] = torch.ops.dorafx.row_norms.default(weights, *args)
        return found

    monkeypatch.setattr(prologue, "_row_norms", counted)
    return seen


@pytest.mark.default_cases("llama")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_one_call_computes_all_norms_of_a_graph(kind: str, calls: list[int]) -> None:
    model = peft_model(kind, layers=2)
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True})
    with torch.no_grad():
        for _ in range(2):
            assert_close(compiled(input_ids=tokens()).logits, model(input_ids=tokens()).logits, 1e-5)
            norm_store().clear()
    assert calls == [14 if kind == "llama" else 8] * 2


def test_only_what_is_stale_is_computed(calls: list[int]) -> None:
    decoder = Decoder().warm()
    overwrite(decoder.model.base_model.model.first.lora_A["default"].weight)
    decoder.step()
    assert calls == [LAYERS, 1]


def factored(**options: Any) -> Decoder:
    return Decoder(**{"dorafx.norm": "factored", **options})


@pytest.fixture
def squares(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the weights whose squares are computed."""
    seen: list[int] = []

    def counted(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        seen.append(weight.numel())
        return norm.row_squares(weight, dtype)

    monkeypatch.setattr(prologue, "row_squares", counted)
    return seen


def test_squares_of_frozen_weights_are_computed_once(squares: list[int]) -> None:
    decoder = factored()
    for _ in range(3):
        decoder.step(prompt())
        for p in parameters(decoder.model):
            overwrite(p)
    assert len(squares) == LAYERS and counts() == (3 * LAYERS, 0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_squares_outlive_the_steps_of_optimizers_of_others(name: str, squares: list[int]) -> None:
    decoder = factored()
    optimizer = OPTIMIZERS[name](parameters(decoder.model))
    for _ in range(3):
        expected = run(decoder.model, lambda: decoder.model(prompt()))
        actual = run(decoder.model, lambda: decoder.compiled(prompt()))
        assert_close(actual.output, expected.output, 1e-5)
        for key, gradient in expected.gradients.items():
            # Rounding alone: at a rate as large as this the tiled norm, which keeps nothing, is as far off by the third step.
            assert_close(actual.gradients[key], gradient, 3e-5)
        optimizer.step()
    assert len(squares) == LAYERS


def base(model: Any) -> torch.nn.Parameter:
    weight: torch.nn.Parameter = model.base_model.model.first.base_layer.weight
    return weight


def _trained_unseen(model: Any) -> None:
    """The weight is thawed, stepped by a fused optimizer with gradients of the stock model, and frozen again."""
    weight = base(model)
    weight.requires_grad_(True)
    optimizer = torch.optim.SGD([weight], lr=0.5, fused=True)
    model(prompt()).sin().sum().backward()
    optimizer.step()
    weight.grad = None
    weight.requires_grad_(False)


def _one_row(model: Any) -> None:
    base(model).data[5] *= 3


def _merged(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


CHANGES: list[Callable[[Any], None]] = [
    lambda model: overwrite(base(model)),
    lambda model: base(model).data.mul_(1.5),
    _one_row,
    _trained_unseen,
    _merged,
    lambda model: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}),
]
NAMES = ["data_copy", "data_scaled", "one_row", "trained", "merged", "load_state_dict"]


@pytest.mark.parametrize("change", CHANGES, ids=NAMES)
def test_squares_are_never_stale(change: Callable[[Any], None], squares: list[int]) -> None:
    decoder = factored()
    decoder.step(prompt())
    change(decoder.model)
    decoder.step(prompt())
    assert len(squares) > LAYERS
    decoder.step(prompt())


def test_no_squares_of_what_is_trained_or_never_reused(squares: list[int]) -> None:
    factored(**{"dorafx.norm_reuse": "never"}).step(prompt())
    model = peft_perceptron()
    for p in model.parameters():
        p.requires_grad_(True)
    Decoder(model, **{"dorafx.norm": "factored"}).step(prompt())
    assert not squares


def test_columns_have_squares_of_their_own() -> None:
    """GPT-2's weights are stored transposed: their norms are by column."""
    model = peft_model("gpt2")
    options = {"dorafx.codegen": "eager", "dorafx.strict": True, "dorafx.norm": "factored"}
    compiled = torch.compile(model, backend="dorafx", options=options)
    with torch.no_grad():
        for _ in range(3):
            assert_close(compiled(input_ids=tokens()).logits, model(input_ids=tokens()).logits, 1e-5)
            for p in model.parameters():
                if not p.requires_grad and p.dim() == 2:
                    overwrite(p)


def test_invalidate_forgets_squares(squares: list[int]) -> None:
    decoder = factored()
    decoder.step(prompt())
    norm_store().invalidate(list(decoder.model.parameters()))
    decoder.step(prompt())
    assert len(squares) == 2 * LAYERS
