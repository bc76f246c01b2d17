"""Programs that look like DoRA and are not, or not wholly: the unsound part must stay, with a reason that names it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from programs import Layer, S, lora
from tests_support import check_same

from dorafx import rewrite_log

NEGATIVES: dict[str, tuple[Callable[[Layer, torch.Tensor], torch.Tensor], list[str], str]] = {}


def negative(expected: list[str], reason: str = "") -> Callable[..., Callable[..., torch.Tensor]]:
    """Register a program with the patterns that the log must show ("missed" for a miss) and a part of the reason."""

    def register(fn: Callable[[Layer, torch.Tensor], torch.Tensor]) -> Callable[..., torch.Tensor]:
        NEGATIVES[fn.__name__] = (fn, expected, reason)
        return fn

    return register


@negative([])
def no_dora_at_all(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.W) + S * lora(p, x)


@negative([])
def weight_norm_without_a_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.m_column * p.W / p.W.norm(dim=1, keepdim=True))


@negative([])
def one_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.linalg.vector_norm(p.W + p.B @ p.A, ord=1, dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative([])
def norm_of_the_whole_matrix(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return (F.linear(x, p.W) + lora(p, x)) / (p.W + p.B @ p.A).norm()


@negative(["norm_only"], "no product with the norm's weight")
def output_uses_another_weight(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W.sin()) + lora(p, x))


@negative(["norm_only"], "not scaled by the same vector")
def bias_like_part_of_another_scaling(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    return (p.m / n) * F.linear(x, p.W) + lora(p, x)


@negative(["norm_only"], "no activation is scaled by it")
def scaled_after_an_activation(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    return torch.relu(F.linear(x, p.W) + lora(p, x)).sin() + (p.m / n).sum()


@negative(["missed"], "operator dropout")
def dropout_between_delta_and_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + F.dropout(p.B @ p.A, 1.0, True)).norm(dim=1)  # drops everything, so that two runs are equal
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator tanh")
def non_linear_operator_on_the_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + torch.tanh(p.B @ p.A)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator mul")
def hadamard_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    delta = (p.B @ p.A) * (p.B2 @ p.A2)
    return (p.m / (p.W + delta).norm(dim=1)) * F.linear(x, p.W + delta)


@negative([], "")
def non_linear_operator_between_the_factors(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + torch.relu(p.B) @ torch.relu(p.A)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + F.linear(F.relu(F.linear(x, p.A)), p.B))


@negative(["norm_only"], "")
def wrong_axis_scaling(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=0)
    return F.linear(x * n, p.W) + lora(p, x) * n.sum()


@negative(["missed"], "is written in place before the norm is taken")
def in_place_write_to_the_sum_seen_elsewhere(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + p.B @ p.A
    view = adapted[:2]
    adapted.mul_(2.0)
    return (p.m / adapted.norm(dim=1)) * (F.linear(x, p.W) + lora(p, x)) + view.sum()


@negative(["linear"], "")
def dense_sum_is_used_elsewhere(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    y = (p.m / adapted.norm(dim=1)) * (F.linear(x, p.W) + S * lora(p, x))
    return y + adapted.sum()


@negative(["linear"], "")
def magnitude_is_used_elsewhere(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + S * lora(p, x)) + p.m.sin()


@negative(["linear"], "")
def another_scaling_in_the_output_than_in_the_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """Unusual, but the algebra is exact: each keeps its own."""
    n = (p.W + 2.0 * (p.B @ p.A)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + 3.0 * lora(p, x))


@negative(["linear"], "")
def residual_is_not_drawn_in(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).norm(dim=1)
    y = (p.m / n) * (F.linear(x, p.W) + S * lora(p, x))
    return y + torch.relu(x[..., : p.d_out])


@pytest.mark.parametrize("name", sorted(NEGATIVES))
def test_only_the_sound_part_is_rewritten(name: str) -> None:
    program, expected, reason = NEGATIVES[name]
    check_same(program, Layer(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True), tolerance=1e-10)
    records = rewrite_log().records
    if name == "non_linear_operator_between_the_factors":
        # relu(B) and relu(A) are factors like any other; the output's product is not linear in x.
        assert {r.pattern for r in records} <= {"norm_only", "linear"}
        return
    assert [r.pattern if r.rewritten else "missed" for r in records] == expected, records
    if reason:
        assert all(reason in r.reason for r in records), [r.reason for r in records]


def test_integer_and_complex_weights_are_left_alone() -> None:
    def program(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return (w + b @ a).norm(dim=1)

    operands = [torch.randn(*s, dtype=torch.complex64) for s in ((4, 5), (4, 2), (2, 5))]
    compiled = torch.compile(program, backend="dorafx", options={"dorafx.codegen": "eager"})
    torch.testing.assert_close(compiled(*operands), program(*operands))
    assert rewrite_log().records == []
