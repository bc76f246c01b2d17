"""Where the bias is: added to the base product and taken from it again, inside of the scaling, outside, another one, written meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import Layer, S, lora
from same_results import CAPTURES, check_captured, check_everything

import dorafx
from dorafx.match import CompositionPlan, Emit, Match, forms
from dorafx.rewriter import Emitter


def scaling(p: Layer) -> torch.Tensor:
    return p.m / (p.W + S * (p.B @ p.A).detach()).norm(dim=1).detach()


def as_peft(p: Layer, x: torch.Tensor) -> torch.Tensor:
    base, g = F.linear(x, p.W, p.b), scaling(p)
    return base + ((g - 1) * (base - p.b) + g * S * lora(p, x))


def with_a_frozen_bias(p: Layer, x: torch.Tensor) -> torch.Tensor:
    b = p.b.detach()
    base = F.linear(x, p.W, b)
    return scaling(p) * (base - b + S * lora(p, x)) + b


def detached_where_it_is_added_again(p: Layer, x: torch.Tensor) -> torch.Tensor:
    base = F.linear(x, p.W, p.b)
    return scaling(p) * (base - p.b + S * lora(p, x)) + p.b.detach()


def detached_where_it_is_taken_out(p: Layer, x: torch.Tensor) -> torch.Tensor:
    base = F.linear(x, p.W, p.b)
    return scaling(p) * (base - p.b.detach() + S * lora(p, x)) + p.b


def without_gradients(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        base = F.linear(x, p.W, p.b)
    return scaling(p) * (base - p.b + S * lora(p, x)) + p.b


def another_one_is_added(p: Layer, x: torch.Tensor) -> torch.Tensor:
    base = F.linear(x, p.W, p.b)
    return scaling(p) * (base - p.b + S * lora(p, x)) + 2 * p.b


def another_one_is_inside(p: Layer, x: torch.Tensor) -> torch.Tensor:
    base = F.linear(x, p.W, 2 * p.b)
    return scaling(p) * (base - 2 * p.b + S * lora(p, x)) + p.b


def scaled(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return scaling(p) * (F.linear(x, p.W, p.b) + S * lora(p, x))


def scaled_and_added(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return scaling(p) * (F.linear(x, p.W, p.b) + S * lora(p, x)) + p.b


def base_returned_too(p: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    base, g = F.linear(x, p.W, p.b), scaling(p)
    return base + ((g - 1) * (base - p.b) + g * S * lora(p, x)), base


def with_and_without(p: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    base, plain, g = F.linear(x, p.W, p.b), F.linear(x, p.W), scaling(p)
    return base + ((g - 1) * plain + g * S * lora(p, x)), plain


def base_written_after(p: Layer, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    base, g = F.linear(x, p.W, p.b), scaling(p)
    y = base + ((g - 1) * (base - p.b) + g * S * lora(p, x))
    return y, base.mul_(2.0)


def delta_of_the_weight(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    g = p.m / adapted.norm(dim=1).detach()
    return F.linear(x, p.W, p.b) + F.linear(x, g[:, None] * adapted - p.W)


def delta_of_the_weight_and_bias(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    g = p.m / adapted.norm(dim=1).detach()
    return F.linear(x, p.W, p.b) + F.linear(x, g[:, None] * adapted - p.W, 0.5 * p.b) - 0.5 * p.b.detach()


def bias_written_meanwhile(p: Layer, x: torch.Tensor) -> torch.Tensor:
    b = p.b * 1.0
    before = b.clone()
    base = F.linear(x, p.W, b)
    b.mul_(2.0)
    return scaling(p) * (base - before + S * lora(p, x)) + b


def zero_scaling(p: Layer, x: torch.Tensor) -> torch.Tensor:
    base, g = F.linear(x, p.W, p.b), scaling(p) * 0.0
    return base + ((g - 1) * (base - p.b) + g * S * lora(p, x))


def negative_scaling(p: Layer, x: torch.Tensor) -> torch.Tensor:
    base, g = F.linear(x, p.W, p.b), -3.0 * scaling(p)
    return base + ((g - 1) * (base - p.b) + g * S * lora(p, x))


PROGRAMS: list[Callable[[Layer, torch.Tensor], Any]] = [
    as_peft,
    with_a_frozen_bias,
    detached_where_it_is_added_again,
    detached_where_it_is_taken_out,
    without_gradients,
    another_one_is_added,
    another_one_is_inside,
    scaled,
    scaled_and_added,
    base_returned_too,
    with_and_without,
    base_written_after,
    delta_of_the_weight,
    delta_of_the_weight_and_bias,
    bias_written_meanwhile,
    zero_scaling,
    negative_scaling,
]


@pytest.mark.parametrize(
    ("codegen", "grad"),
    [("eager", True), ("eager", False), ("inductor", True), pytest.param("inductor", False, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_values_and_gradients(
    program: Callable[[Layer, torch.Tensor], Any], trained: bool, codegen: str, grad: bool
) -> None:
    p = Layer()
    p.b.requires_grad_(trained)
    x = torch.randn(3, p.W.shape[1], dtype=p.W.dtype)
    check_everything(program, p, x, codegen, grad)
    if program is not bias_written_meanwhile:
        assert dorafx.rewrite_log().rewrites, dorafx.rewrite_log()


@pytest.mark.parametrize("capture", CAPTURES)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_other_tracers(program: Callable[[Layer, torch.Tensor], Any], capture: str) -> None:
    """Their tensors may not say that a product's gradient is needed, and it still is."""
    dorafx.rewrite_log().clear()
    p = Layer()
    check_captured(program, p, torch.randn(3, p.W.shape[1], dtype=p.W.dtype), capture)
    if program is not bias_written_meanwhile:
        assert dorafx.rewrite_log().rewrites, dorafx.rewrite_log()


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_a_row_of_zeros(program: Callable[[Layer, torch.Tensor], Any], trained: bool) -> None:
    """Its scaling is infinite or NaN. No gradient, nor value, is NaN or infinite where the program's own is not: that of a bias that is
    added last is the output's."""
    p = Layer()
    p.b.requires_grad_(trained)
    with torch.no_grad():
        p.W[:2], p.B[:2], p.m[1] = 0.0, 0.0, 0.0
    compiled = torch.compile(lambda x: program(p, x), backend="dorafx", options={"dorafx.codegen": "eager"})
    x = torch.randn(3, p.W.shape[1], dtype=p.W.dtype)
    leaves = [p.m, p.A, p.B, *([p.b] if trained else [])]
    results = []
    for run in (lambda x: program(p, x), compiled):
        y = run(x)
        y = y[0] if isinstance(y, tuple) else y
        results.append([y, *torch.autograd.grad(y.sum(), leaves, allow_unused=True)])
    for wanted, got in zip(*results):
        if wanted is not None:
            finite = wanted.isfinite()
            torch.testing.assert_close(got[finite], wanted[finite])


@pytest.mark.parametrize("compose", ["auto", "epilogue", "accumulated"])
@pytest.mark.parametrize("bias", ["none", "frozen", "trained"])
def test_no_product_accumulates_into_a_base_with_its_bias(
    bias: str, compose: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless that is asked for: then the base is made again without it. Without a bias the choice is as ever."""
    form = type(forms()["linear"])
    rewrite, make, seen = form.rewrite, Emitter.compose, []

    def planned(self: Any, match: Match, plan: CompositionPlan, emit: Emit) -> Any:
        seen.append(plan.accumulate)
        return rewrite(self, match, plan, emit)

    def composed(self: Any, *args: Any) -> Any:
        seen.append(args[-1])
        return make(self, *args)

    monkeypatch.setattr(form, "rewrite", planned)
    monkeypatch.setattr(Emitter, "compose", composed)
    options = {"dorafx.codegen": "eager", "dorafx.strict": True, "dorafx.compose": compose}
    p = Layer()
    p.b.requires_grad_(bias == "trained")
    with_bias = bias != "none"

    def layer(x: torch.Tensor) -> torch.Tensor:
        if with_bias:
            return as_peft(p, x)
        return scaling(p) * (F.linear(x, p.W) + S * lora(p, x))

    x = torch.randn(20, p.W.shape[1], dtype=p.W.dtype)
    torch.testing.assert_close(torch.compile(layer, backend="dorafx", options=options)(x), layer(x))
    accumulates = compose == "accumulated" or (compose == "auto" and not with_bias)
    assert seen[0] == accumulates
    assert (seen[1] is True) == (with_bias and not accumulates)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda f: f.__name__)
def test_as_many_base_products_as_before(program: Callable[[Layer, torch.Tensor], Any], trained: bool) -> None:
    """The product that is made again with the bias detached takes the place of the program's."""
    p = Layer()
    p.b.requires_grad_(trained)
    x = torch.randn(20, p.d_in, dtype=torch.float64)
    compiled = torch.compile(lambda x: program(p, x), backend="dorafx", options={"dorafx.codegen": "eager"})
    compiled(x)
    with torch.profiler.profile(record_shapes=True) as profile:
        compiled(x)
    shapes = [event.input_shapes for event in profile.events() if event.name in ("aten::mm", "aten::addmm")]
    assert shapes
    products = sum([20, p.d_in] in each and [p.d_in, p.d_out] in each for each in shapes)
    assert products == 1
