"""Programs that look like DoRA and are not, or not wholly, each with what the log must show."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from programs import Layer, S, lora
from torch.utils.checkpoint import checkpoint

__all__ = ["NEGATIVES", "negative"]


@torch.compiler.allow_in_graph
def opaque_scaling(t: torch.Tensor) -> torch.Tensor:
    return t.mul_(3.0).clone()


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
def layers_that_are_added_and_normalised(p: Layer, x: torch.Tensor) -> torch.Tensor:
    h = F.linear(x, p.W) + lora(p, x)
    flat = h.flatten(0, 1)
    return flat / flat.norm(dim=1, keepdim=True) * p.m


@negative([])
def a_residual_and_a_scaled_one_that_are_normalised(p: Layer, x: torch.Tensor) -> torch.Tensor:
    flat = x.flatten(0, 1)
    h = flat + flat * p.A[0] + F.linear(F.linear(flat, p.W), p.W.t())
    return h / h.norm(dim=1, keepdim=True)


@negative([])
def weight_norm_without_a_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.m_column * p.W / p.W.norm(dim=1, keepdim=True))


@negative(["missed"], "is of order 1: DoRA's is the 2-norm")
def one_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.linalg.vector_norm(p.W + p.B @ p.A, ord=1, dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "is of the whole weight: DoRA's is by row or by column")
def norm_of_the_whole_matrix(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return (F.linear(x, p.W) + lora(p, x)) / (p.W + p.B @ p.A).norm()


@negative(["missed"], "is of the whole weight: DoRA's is by row or by column")
def norm_of_the_whole_matrix_by_squares(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return (F.linear(x, p.W) + lora(p, x)) / (p.W + p.B @ p.A).pow(2).sum().sqrt()


@negative(["missed"], "is of the whole weight: DoRA's is by row or by column")
def norm_of_the_flattened_matrix(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return (F.linear(x, p.W) + lora(p, x)) / (p.W + p.B @ p.A).flatten().norm()


@negative(["missed"], "operator linalg_matrix_norm at")
def frobenius_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return (F.linear(x, p.W) + lora(p, x)) / torch.linalg.matrix_norm(p.W + p.B @ p.A)


@negative(["missed"], "operator sin")
def squares_changed_before_their_root(p: Layer, x: torch.Tensor) -> torch.Tensor:
    squares = (p.W + p.B @ p.A).square().sum(dim=1)
    return (F.linear(x, p.W) + lora(p, x)) * p.m / squares.sin().add(2).sqrt()


@negative(["norm_only"], "no product with the norm's weight")
def output_uses_another_weight(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W.sin()) + lora(p, x))


@negative(["norm_only"], "not scaled by the same vector")
def bias_like_part_of_another_scaling(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    return (p.m / n) * F.linear(x, p.W) + lora(p, x)


@negative(["norm_only"], "operator sum at")
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


@negative(["missed"], "operator mul")
def hadamard_delta_times_a_parameter(p: Layer, x: torch.Tensor) -> torch.Tensor:
    delta = (p.B @ p.A) * (p.B2 @ p.A2) * p.d[0] * 0.5
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


@negative(["norm_only"], "no product with the norm's weight")
def output_uses_the_weight_of_another_layer(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W.flip(0)) + lora(p, x))


@negative(["linear"], "")
def output_uses_the_weight_plus_something(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """Exact: the second dense matrix gets a product of its own, which for ten tokens costs less than forming the sum."""
    n = (p.W + p.B @ p.A).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W + 0.25 * p.W.abs()) + lora(p, x))


@negative(["missed"], "is of order inf")
def maximum_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.linalg.vector_norm(p.W + p.B @ p.A, float("inf"), dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator amax at")
def largest_element(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).amax(dim=1)
    return (p.m / (n * n + 1)) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator std at")
def standard_deviation(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).std(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator sigmoid")
def sigmoid_of_the_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + torch.sigmoid(p.B @ p.A)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator round")
def rounded_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + torch.round(p.B @ p.A)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator where")
def masked_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + torch.where(p.W > 0, p.B @ p.A, 0.0)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator triu")
def triangle_of_the_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + torch.triu(p.B @ p.A)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator flip")
def delta_flipped(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + (p.B @ p.A).flip(1)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator roll")
def rows_rolled(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).roll(1, 0).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator mul")
def elementwise_gate_on_the_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + (p.B @ p.A) * torch.sigmoid(p.W)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator kron")
def kronecker_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    # [2, 3] x [5, 4] is [10, 12]
    delta = torch.kron(p.B[:2] @ p.A[:, :3], p.B[:5, :1] @ p.A[:1, :4])
    return (p.m / (p.W + delta).norm(dim=1)) * F.linear(x, p.W + delta)


def _merged(p: Layer, x: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return (p.m / (p.W + delta).norm(dim=1)) * F.linear(x, p.W + delta)


@negative([], "")
def norm_from_elsewhere(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """Without the norm nothing dense is formed, and nothing is left to save."""
    return p.m / p.b.abs() * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator kron at")
def kronecker_delta_of_parameters(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return _merged(p, x, torch.kron(p.A[:2, :3], p.B[:5, :1].expand(5, 4)))


@negative(["missed"], "operator kron at")
def kronecker_delta_times_a_parameter(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return _merged(p, x, torch.kron(p.A[:2, :3], p.B[:5, :1].expand(5, 4)) * p.d[0])


@negative(["missed"], "operator scatter at")
def sparse_delta_by_scatter(p: Layer, x: torch.Tensor) -> torch.Tensor:
    flat = torch.zeros(120, dtype=x.dtype).scatter(0, torch.arange(0, 120, 7), p.A.reshape(-1)[:18])
    return _merged(p, x, flat.view(10, 12))


@negative(["missed"], "is written in place, and no product of factors")
def sparse_delta_by_assignment(p: Layer, x: torch.Tensor) -> torch.Tensor:
    delta = torch.zeros(10, 12, dtype=x.dtype)
    delta[[0, 3, 5], [1, 2, 3]] = p.A[0, :3]
    return _merged(p, x, delta)


@negative(["missed"], "operator fft_ifft2 at")
def delta_of_few_frequencies(p: Layer, x: torch.Tensor) -> torch.Tensor:
    at = torch.tensor([0, 3, 5]), torch.tensor([1, 2, 3])
    return _merged(p, x, torch.fft.ifft2(torch.zeros(10, 12, dtype=x.dtype).index_put(at, p.A[0, :3])).real)


@negative(["missed"], "which is all that a factored norm serves")
def repeated_block(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return _merged(p, x, p.B2[:5].repeat(2, 6))


@negative(["missed"], "is another for each token (its shape is [2, 5, 10, 12])")
def delta_routed_by_token(p: Layer, x: torch.Tensor) -> torch.Tensor:
    gates = torch.softmax(F.linear(x, p.A), -1)
    weights = p.W + torch.einsum("btr,or,ri->btoi", gates, p.B, p.A)
    return p.m / weights.norm(dim=-1) * torch.einsum("btoi,bti->bto", weights, x)


@negative(["linear"], "")
def delta_routed_by_batch(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """Gates that all tokens share are scalings like any other: one delta, computed anew for each batch."""
    gates = torch.softmax(F.linear(x, p.A).mean((0, 1)), -1)
    second = F.linear(F.linear(x, p.A2), p.B2)
    n = (p.W + gates[0] * (p.B @ p.A) + gates[1] * (p.B2 @ p.A2)).norm(dim=1)
    return p.m / n * (F.linear(x, p.W) + gates[0] * lora(p, x) + gates[1] * second)


@negative(["missed"], "operator to at")
def integer_weights(p: Layer, x: torch.Tensor) -> torch.Tensor:
    rounded = (p.W * 100).to(torch.int64) + (100 * (p.B @ p.A).detach()).to(torch.int64)
    return p.m / rounded.to(x.dtype).norm(dim=1) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator abs at")
def complex_weights(p: Layer, x: torch.Tensor) -> torch.Tensor:
    delta = p.B @ p.A
    adapted = torch.complex(p.W, p.W) + torch.complex(delta, delta)
    return p.m / adapted.abs().pow(2).sum(1).sqrt() * (F.linear(x, p.W) + lora(p, x))


@negative(["norm_only"], "operator where at")
def norm_replaced_where_it_is_zero(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    return p.m / torch.where(n == 0, torch.ones_like(n), n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator threshold")
def sparse_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    delta = F.threshold(p.B @ p.A, 0.05, 0.0)
    n = (p.W + delta).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + F.linear(x, delta))


@negative(["missed"], "operator cumsum")
def running_sum_of_the_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + torch.cumsum(p.B @ p.A, 1)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "sin at ")
def two_dense_weights(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + torch.sin(p.W) + p.B @ p.A).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "scaled or diagonal part (sum at ")
def weight_scaled_by_a_computed_number(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.d.sum() * p.W + p.B @ p.A).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "no dense weight")
def sum_of_two_products_only(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.B @ p.A + p.B2 @ p.A2).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "scaled by a vector")
def weight_scaled_by_a_vector_inside(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W * p.b[:, None] + p.B @ p.A).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["norm_only"], "operator relu")
def relu_of_the_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.relu((p.W + p.B @ p.A).norm(dim=1) - 0.1) + 0.1
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["norm_only"], "operator clamp")
def norm_bounded_from_above(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1).clamp(1e-6, 1.0)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["norm_only"], "operator round")
def norm_rounded(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1).detach().round(decimals=1) + 0.05
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["norm_only"], "operator roll")
def norm_of_the_neighbouring_row(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1).roll(1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["norm_only"], "the norm itself is an output")
def norm_is_returned(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return (p.W + p.B @ p.A).norm(dim=1)


@negative(["norm_only"], "not scaled by the same vector")
def adapter_scaled_by_the_magnitude_only(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    return p.m / n * F.linear(x, p.W) + p.m * lora(p, x)


@negative(["linear"], "")
def residual_of_another_product_is_not_drawn_in(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x)) + F.linear(x, p.W.cos())


@negative(["norm_only"], "")
def relu_between_base_and_scaling(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    return (p.m / n) * torch.relu(F.linear(x, p.W) + lora(p, x))


@negative(["norm_only"], "no low-rank product is added")
def adapter_is_missing_in_the_output(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    return (p.m / n) * F.linear(x, p.W)


@negative(["norm_only"], "")
def scaled_along_the_tokens(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    y = (F.linear(x, p.W) + lora(p, x))[0, :1].expand(10, 10)
    return y * (p.m / n)[:, None]


@negative(["missed"], "is written in place before the norm is taken")
def delta_written_through_a_view(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + p.B @ p.A
    adapted[:, 0].mul_(3.0)
    return (p.m / adapted.norm(dim=1)) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "is written in place before the norm is taken")
def sum_written_by_a_function_that_is_given_it_by_name(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + p.B @ p.A
    F.relu(input=adapted, inplace=True)
    return (p.m / adapted.norm(dim=1)) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "is written in place before the norm is taken")
def sum_written_by_an_operator_that_is_given_it_by_name(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + p.B @ p.A
    torch.relu_(input=adapted)
    return (p.m / adapted.norm(dim=1)) * (F.linear(x, p.W) + lora(p, x))


@negative(["norm_only"], "no low-rank product is added")
def composition_written_by_a_function_that_is_given_it_by_name(p: Layer, x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, p.W) + lora(p, x)
    F.leaky_relu(input=y, inplace=True)
    return (p.m / (p.W + p.B @ p.A).norm(dim=1)) * y


@negative(["missed"], "is written in place before the norm is taken")
def sum_written_by_an_operator_of_ones_own(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = (p.W + p.B @ p.A).detach()
    torch.ops.dorafx_tests.scale(adapted, 3.0)
    return (p.m / adapted.norm(dim=1)) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "is written in place before the norm is taken")
def sum_written_by_an_overload_that_is_given_it_by_name(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = (p.W + p.B @ p.A).detach()
    torch.ops.dorafx_tests.scale.default(t=adapted, by=3.0)
    return (p.m / adapted.norm(dim=1)) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "is written in place before the norm is taken")
def sum_written_in_a_branch(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        adapted = p.W + p.B @ p.A
        torch.cond(x.sum() > 0, lambda t: t.mul_(2.0) + 1, lambda t: t.mul_(3.0) + 1, (adapted,))
    return (p.m / adapted.norm(dim=1)) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "is written in place before the norm is taken")
def sum_written_in_a_checkpointed_function(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        adapted = p.W + p.B @ p.A
        checkpoint(lambda t: t.mul_(2.0) + 1, adapted, use_reentrant=False)
    return (p.m / adapted.norm(dim=1)) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "is written in place before the norm is taken")
def sum_written_by_a_function_that_no_tracer_enters(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = (p.W + p.B @ p.A).detach()
    opaque_scaling(adapted)
    return (p.m / adapted.norm(dim=1)) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "is written in place")
def norm_given_to_be_written(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        n = (p.W + p.B @ p.A).norm(dim=1)
        torch.norm(p.W, 2, 1, False, n)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["linear"], "")
def norm_plus_a_multiple_by_position(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.ops.aten.add.Scalar((p.W + p.B @ p.A).norm(dim=1), 2.0, 3.0)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["norm_only"], "operator rsub")
def multiple_minus_the_norm_by_position(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.ops.aten.rsub.Scalar((p.W + p.B @ p.A).norm(dim=1), 2.0, 3.0)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "is written in place before the norm is taken")
def sum_written_without_gradients(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """A write that is not recorded leaves the gradients that the sum has."""
    adapted = p.W + p.B @ p.A
    with torch.no_grad():
        adapted.mul_(2.0)
    return (p.m / adapted.norm(dim=1)) * (F.linear(x, p.W) + lora(p, x))


@negative(["norm_only"], "no low-rank product is added")
def composition_written_without_gradients(p: Layer, x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, p.W) + lora(p, x)
    with torch.no_grad():
        y.mul_(2.0)
    return (p.m / (p.W + p.B @ p.A).norm(dim=1)) * y


@negative(["missed"], "is written in place")
def norm_written_in_part(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        n = (p.W + p.B @ p.A).norm(dim=1)
        n[0] = 1.0
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator renorm")
def renormalised_weight(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m * F.linear(x, torch.renorm(p.W + p.B @ p.A, 2, 0, 1.0))


@negative(["missed"], "operator cosine_similarity")
def cosines(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m * F.cosine_similarity(x[..., None, :], p.W + p.B @ p.A, dim=-1)


@negative(["missed"], "operator pow")
def norm_of_order_four(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = ((p.W + p.B @ p.A) ** 4).sum(1) ** 0.25
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator norm_except_dim")
def norm_over_all_other_axes(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.norm_except_dim(p.W + p.B @ p.A, 2, 0).view(-1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "is over dimensions 2 of a weight of 3")
def norm_of_a_batch_of_one(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A)[None].norm(dim=2)[0]
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["missed"], "operator sum")
def squares_summed_in_integers(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (10 * (p.W + p.B @ p.A)).detach().square().sum(1, dtype=torch.int64).sqrt()
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x))


@negative(["linear"], "")
def weight_is_written_between_norm_and_output(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """A write that nobody else sees is a new value: the output has half the weight, and keeps it."""
    weight = p.W.clone()
    n = (weight + p.B @ p.A).norm(dim=1)
    weight.mul_(0.5)
    return (p.m / n) * (F.linear(x, weight) + lora(p, x))


@negative(["linear"], "")
def norm_is_used_elsewhere(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x)) + n.sum()


@negative(["linear"], "")
def output_is_used_twice(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    y = (p.m / n) * (F.linear(x, p.W) + lora(p, x))
    return y + torch.relu(y)


@negative(["linear"], "")
def low_rank_product_is_used_elsewhere(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(dim=1)
    low = lora(p, x)
    return (p.m / n) * (F.linear(x, p.W) + low) + low.sin()
