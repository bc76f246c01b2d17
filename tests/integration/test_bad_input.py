"""Bad input: an error that says what is wrong, or the same IEEE values as the original program's."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integration_support import compile_eagerly, peft_perceptron
from peft import LoraConfig, get_peft_model
from torch import nn

from dorafx import rewrite_log


def first_layer(model: Any) -> Any:
    return model.base_model.model.first


def prompt(*shape: int) -> torch.Tensor:
    return torch.randn((*shape, 24), generator=torch.Generator().manual_seed(1))


def same(ours: torch.Tensor, stock: torch.Tensor) -> None:
    """Finite values agree, and everything else is in the same places."""
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["weight", "lora_A", "lora_B"])
@pytest.mark.parametrize("shape", [(1,), (3, 5)], ids=["decode", "prefill"])
def test_nan_and_infinity_are_where_peft_has_them(value: float, where: str, shape: tuple[int, ...]) -> None:
    model = peft_perceptron()
    layer = first_layer(model)
    target = layer.base_layer.weight if where == "weight" else getattr(layer, where)["default"].weight
    target.data[1, 2] = value
    compiled = compile_eagerly(model.base_model.model.first)
    with torch.no_grad():
        ours, stock = compiled(prompt(*shape)), layer(prompt(*shape))
    assert not stock.isfinite().all()
    same(ours, stock)


@pytest.mark.parametrize("shape", [(1,), (3, 5)], ids=["decode", "prefill"])
def test_a_zero_row_is_nan_as_in_peft(shape: tuple[int, ...]) -> None:
    model = peft_perceptron()
    layer = first_layer(model)
    layer.base_layer.weight.data[3] = 0
    layer.lora_B["default"].weight.data[3] = 0
    layer.lora_magnitude_vector["default"].weight.data[3] = 0
    with torch.no_grad():
        ours, stock = compile_eagerly(layer)(prompt(*shape)), layer(prompt(*shape))
    assert stock[..., 3].isnan().all() and not stock[..., 4].isnan().any()
    same(ours, stock)


class Layer(nn.Module):
    """A DoRA layer from scratch of which row 2 is zero; ``norm`` makes the vector that the magnitude is divided by."""

    def __init__(self, norm: Callable[[torch.Tensor], torch.Tensor], rank: int = 3) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(12, 24, generator=generator), requires_grad=False)
        self.a = nn.Parameter(torch.randn(rank, 24, generator=generator))
        self.b = nn.Parameter(torch.randn(12, rank, generator=generator))
        self.m = nn.Parameter(torch.ones(12))
        with torch.no_grad():
            self.weight[2], self.b[2] = 0, 0
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(self.weight + 0.5 * self.b @ self.a).detach()
        return self.m / n * (F.linear(x, self.weight) + 0.5 * F.linear(F.linear(x, self.a), self.b))


NORMS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], bool]] = {
    "none": (lambda w: w.norm(dim=1), True),
    "added": (lambda w: w.norm(dim=1) + 1e-4, False),
    "inside the root": (lambda w: (w.square().sum(1) + 1e-4).sqrt(), False),
    "a bound": (lambda w: w.norm(dim=1).clamp_min(1e-4), False),
}


@pytest.mark.parametrize("name", NORMS)
def test_a_zero_row_is_what_the_epsilon_makes_of_it(name: str) -> None:
    norm, is_nan = NORMS[name]
    layer = Layer(norm)
    ours, stock = compile_eagerly(layer)(prompt(3, 5)), layer(prompt(3, 5))
    assert bool(stock[..., 2].isnan().all()) == is_nan
    same(ours, stock)
    assert rewrite_log().rewrites


@pytest.mark.parametrize(("d_in", "d_out"), [(24, 1), (1, 20), (1, 1)])
@pytest.mark.parametrize("tokens", [(3,), (1,), (1, 1)])
def test_a_side_of_one(d_in: int, d_out: int, tokens: tuple[int, ...]) -> None:
    """A matrix with a side of one is a vector by its shape; PEFT's spelling is rewritten whole all the same."""
    config = LoraConfig(target_modules=["0"], use_dora=True, r=2, init_lora_weights=False)
    model = get_peft_model(nn.Sequential(nn.Linear(d_in, d_out)), config)
    x = torch.randn(*tokens, d_in)
    same(compile_eagerly(model)(x), model(x))
    assert [(r.pattern, r.reason) for r in rewrite_log().records] == [("linear", "")]


def test_rank_zero() -> None:
    """No delta at all."""
    layer = Layer(NORMS["added"][0], rank=0)
    compiled = compile_eagerly(layer)
    for shape in ((1,), (3, 5)):
        same(compiled(prompt(*shape)), layer(prompt(*shape)))
    assert {r.pattern for r in rewrite_log().rewrites} == {"linear"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda layer: setattr(layer, "a", nn.Parameter(torch.randn(4, 24))), "12x3|12, 3|3, 12|4, 24|4x24"),
        (lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(12, 23))), "23"),
        (lambda layer: setattr(layer, "b", nn.Parameter(torch.randn(12, 3, dtype=torch.float64))), "(?i)dtype|Float"),
        (lambda layer: setattr(layer, "b", nn.Parameter(torch.randn(12, 3, dtype=torch.bfloat16))), "(?i)dtype"),
        (lambda layer: setattr(layer, "b", nn.Parameter(torch.randn(12, 3, device="meta"))), "(?i)device|meta"),
    ],
    ids=["rank", "d_in", "fp64", "bf16", "device"],
)
def test_operands_that_do_not_fit_are_torchs_error(change: Callable[[Layer], None], text: str) -> None:
    """The program is traced before dorafx sees it, so the error is the tracer's, with the user's line."""
    layer = Layer(NORMS["added"][0])
    change(layer)
    with pytest.raises(RuntimeError):
        layer(prompt(3, 5))
    with pytest.raises(RuntimeError, match=text):
        compile_eagerly(layer)(prompt(3, 5))
