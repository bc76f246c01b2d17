"""``0·p``, ``b - b`` and ``u/u`` are not nothing: they give gradients of zeros, and NaN."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from programs import Layer, S, lora
from same_results import check_everything

from dorafx import rewrite_log

VANISHING: dict[str, tuple[Callable[[Layer, torch.Tensor], torch.Tensor], list[str]]] = {}


def vanishing(*patterns: str) -> Callable[..., Callable[..., torch.Tensor]]:
    """Register a program with what the log must show of it."""

    def register(fn: Callable[[Layer, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        VANISHING[fn.__name__] = (fn, list(patterns))
        return fn

    return register


def norm(p: Layer) -> torch.Tensor:
    return (p.W + S * (p.B @ p.A)).norm(dim=1)


def dora(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m / norm(p) * (F.linear(x, p.W) + S * lora(p, x))


def unused(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, p.A2), p.B2)


@vanishing("linear")
def a_parameter_kept_in_use(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return dora(p, x) + 0.0 * p.bias.sum()


@vanishing("linear")
def an_adapter_at_scale_zero(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return dora(p, x) + unused(p, x) * 0


@vanishing("norm_only")
def an_adapter_at_scale_zero_inside(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m / norm(p) * (F.linear(x, p.W) + S * lora(p, x) + 0.0 * unused(p, x))


@vanishing("missed")
def a_delta_at_scale_zero(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A) + 0.0 * (p.B2 @ p.A2)).norm(dim=1)
    return p.m / n * (F.linear(x, p.W) + S * lora(p, x))


@vanishing("missed")
def the_only_delta_at_scale_zero(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.add(p.W, p.B @ p.A, alpha=0).norm(dim=1)
    return p.m / n * (F.linear(x, p.W) + 0 * lora(p, x))


@vanishing("missed")
def the_weight_at_scale_zero_beside_itself(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """``W + 0·W`` is NaN where ``W`` is infinite."""
    n = (p.W + S * (p.B @ p.A) + 0.0 * p.W).norm(dim=1)
    return p.m / n * (F.linear(x, p.W) + S * lora(p, x))


@vanishing("linear")
def a_bias_taken_off_itself(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return dora(p, x) + (p.bias - p.bias)


@vanishing("linear")
def a_bias_taken_off_and_added(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """Nothing vanishes: the bias is in the sum. (Where it is infinite, so is the result; the gradient of the scaling, which the original
    takes of ``inf - inf``, is a number.)"""
    base = F.linear(x, p.W, p.bias)
    return p.m / norm(p) * (base - p.bias + S * lora(p, x)) + p.bias


@vanishing("linear")
def a_vector_over_itself(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return dora(p, x) * (p.b / p.b)


@vanishing("linear")
def multiplied_and_divided(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return dora(p, x) * p.b / p.b


@vanishing("norm_only")
def divided_in_the_scaling(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m * p.b / norm(p) / p.b * (F.linear(x, p.W) + S * lora(p, x))


@vanishing("linear")
def divided_and_left_as_a_factor(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """``b/b·b`` is NaN for zeros, and ``b`` is not."""
    return dora(p, x) / p.b * p.b * p.b


@vanishing("linear")
def bounded_after_a_zero(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (norm(p) + 0.0 * p.b).clamp_min(1e-3)
    return p.m / n * (F.linear(x, p.W) + S * lora(p, x))


@vanishing("norm_only")
def a_zero_under_the_root(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = ((p.W + S * (p.B @ p.A)).square().sum(1) + 0.0 * p.b).sqrt()
    return p.m / n * (F.linear(x, p.W) + S * lora(p, x)) + 0 * norm(p)


@vanishing("linear")
def a_detached_twin_does_not_stand_for_the_gradient(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return dora(p, x) + 0.0 * p.bias + p.bias.detach()


@pytest.mark.parametrize("name", VANISHING)
def test_gradients_of_zeros_and_nan_stay(name: str) -> None:
    program, patterns = VANISHING[name]
    p = Layer()
    x = torch.randn(4, p.d_in, dtype=torch.float64)
    rewrite_log().clear()
    check_everything(program, p, x)
    records = rewrite_log().records
    assert [r.pattern if r.rewritten else r.status for r in records] == patterns
    if patterns != ["linear"]:
        assert "operator" in records[0].reason or "is multiplied by zero, or cancels out" in records[0].reason
    with torch.no_grad():
        for vector in (p.b,) if program is a_bias_taken_off_and_added else (p.b, p.bias):
            vector[0], vector[1], vector[2] = 0.0, float("inf"), float("nan")
        p.A2[0, 0] = p.W[0, 0] = float("inf")
    check_everything(program, p, x)


@pytest.mark.slow
def test_inductor() -> None:
    """All of them in one program, through the default code generator."""

    def every(p: Layer, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(program(p, x) for program, _ in VANISHING.values())

    p = Layer(4, 5, 2)
    check_everything(every, p, torch.randn(3, 5, dtype=torch.float64), codegen="inductor")
