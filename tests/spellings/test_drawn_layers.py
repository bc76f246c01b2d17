"""Layers of the kinds that the random programs of tests/soundness do not draw: convolutions of a merged weight, and linear layers with
packed rows, guarded norms, weight deltas and interpolated scalings. Any way to write each part, with any other."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from convolution_programs import ConvLayer, positions
from same_results import check_everything, defects

from dorafx import rewrite_log


def statuses(program: Any, layer: Any, x: torch.Tensor, codegen: str) -> set[str]:
    """Run a program as it is and through dorafx, compare all that a caller can see, and return what the log says of its sites."""
    rewrite_log().clear()
    check_everything(program, layer, x, codegen)
    records = rewrite_log().records
    assert not defects(records), records
    return {r.status for r in records}


# -- convolutions -----------------------------------------------------------------------------------------------------

Delta = Callable[[ConvLayer], torch.Tensor]
Scaling = Callable[[ConvLayer, torch.Tensor], torch.Tensor]
Composed = Callable[[ConvLayer, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]

DELTAS: dict[str, Delta] = {
    "flat": lambda p: (p.B_flat @ p.A_flat).view(p.W.shape),
    "flattened": lambda p: (p.B.flatten(1) @ p.A.flatten(1)).reshape_as(p.W),
    "einsum": lambda p: torch.einsum(f"or,ri{positions(p)}->oi{positions(p)}", p.B_flat, p.A),
    "tensordot": lambda p: torch.tensordot(p.B_flat, p.A, dims=1),
    "Tucker": lambda p: torch.einsum("i j ..., j r, i p -> p r ...", p.T, p.D, p.B_flat.t()),
    "convolved": lambda p: p.conv(p.A.transpose(0, 1), p.B, plain=True).transpose(0, 1),
    "scaled between": lambda p: (p.B_flat @ (p.D.flatten()[: p.rank, None] * p.A_flat)).view(p.W.shape),
    "two": lambda p: (p.B_flat @ p.A_flat).view(p.W.shape) - (p.B.flatten(1) @ p.A.flatten(1)).view(p.W.shape),
}
SCALES: dict[str, Callable[[ConvLayer, torch.Tensor], torch.Tensor]] = {
    "none": lambda p, d: d,
    "number": lambda p, d: 0.7 * d,
    "tensor": lambda p, d: d * p.multiplier,
    "both": lambda p, d: (d * p.multiplier) * 2,
}
NORMS: dict[str, Callable[[ConvLayer, torch.Tensor], torch.Tensor]] = {
    "by output, flat": lambda p, v: v.flatten(1).norm(dim=1).view(-1, 1, *p.ones()),
    "by output, axes": lambda p, v: v.norm(p=2, dim=tuple(range(1, v.dim())), keepdim=True),
    "by output, squares": lambda p, v: v.flatten(1).square().sum(1, keepdim=True).sqrt().view(-1, 1, *p.ones()),
    "by input, flat": lambda p, v: v.transpose(0, 1).reshape(v.shape[1], -1).norm(dim=1).view(1, -1, *p.ones()),
    "by input, axes": lambda p, v: torch.linalg.vector_norm(v, dim=(0, *range(2, v.dim())), keepdim=True),
    "by input, squares": lambda p, v: v.pow(2).sum((0, *range(2, v.dim())), keepdim=True).sqrt(),
}
GUARDS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda n: n,
    "detached": lambda n: n.detach(),
    "epsilon": lambda n: n + 1e-7,
    "bound": lambda n: n.clamp(min=1e-6),
    "where": lambda n: torch.where(n > 0, n, torch.ones_like(n)),
    "maximum": lambda n: torch.maximum(n, n.new_tensor(1e-6)),
}
CONVOLVED: dict[str, Composed] = {
    "merged": lambda p, x, v, g: p.conv(x, v * g, p.bias),
    "merged, cast": lambda p, x, v, g: p.conv(x, (g * v).to(x.dtype)),
    "weight delta": lambda p, x, v, g: p.conv(x, p.W, p.bias) + p.conv(x, v * g - p.W),
    "weight delta alone": lambda p, x, v, g: p.conv(x, g * v - p.W).tanh(),
    "interpolated": lambda p, x, v, g: p.conv(x, v * (0.6 * (g - 1) + 1), p.bias),
    "difference added": lambda p, x, v, g: p.conv(x, p.W + (v * g - p.W), p.bias),
}
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"padding": 1},
    {"stride": 2},
    {"dilation": 2, "padding": 2},
    {"stride": 2, "padding": 1, "dilation": 2},
    {"padding": "same"},
)


class Convolution(NamedTuple):
    delta: str
    scale: str
    norm: str
    guard: str
    layer: str
    dim: int
    kernel: int
    options: int
    trained: bool
    channels_last: bool


def drawn_convolutions(count: int, seed: int) -> list[Convolution]:
    chance = random.Random(seed)
    parts: tuple[Any, ...] = (
        list(DELTAS), list(SCALES), list(NORMS), list(GUARDS), list(CONVOLVED), [1, 2, 2, 3], [1, 2, 3], range(len(OPTIONS)),
        [True, False, False], [True, False],
    )  # fmt: skip
    return [Convolution(*(chance.choice(options) for options in parts)) for _ in range(count)]


def check_convolution(case: Convolution, codegen: str) -> None:
    def program(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
        v = p.W + SCALES[case.scale](p, DELTAS[case.delta](p))
        n = GUARDS[case.guard](NORMS[case.norm](p, v))
        return CONVOLVED[case.layer](p, x, v, (p.m_in if "input" in case.norm else p.m) / n)

    layer = ConvLayer(case.dim, case.kernel, options=OPTIONS[case.options], trained_weight=case.trained)
    assert statuses(program, layer, layer.x(9, case.channels_last and case.dim == 2), codegen) == {"rewritten"}, case


@pytest.mark.parametrize("seed", range(3))
def test_convolutions(seed: int) -> None:
    for case in drawn_convolutions(6, seed):
        check_convolution(case, "eager")


def test_convolutions_through_inductor() -> None:
    for case in drawn_convolutions(2, 100):
        check_convolution(case, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 11))
def test_many_convolutions(seed: int) -> None:
    for case in drawn_convolutions(30, seed):
        check_convolution(case, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(101, 105))
def test_many_convolutions_through_inductor(seed: int) -> None:
    for case in drawn_convolutions(8, seed):
        check_convolution(case, "inductor")


# -- linear layers ----------------------------------------------------------------------------------------------------

D_OUT, D_IN, RANK, HEADS = 12, 10, 2, 3


class Packed:
    """W ``[d_out, d_in]`` of three blocks of rows, factors for each block and for all of them, m ``[d_out]``."""

    def __init__(self, trained: bool) -> None:
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator) * 0.5)

        self.W = parameter(D_OUT, D_IN).requires_grad_(trained)
        self.A, self.B = parameter(RANK, D_IN), parameter(D_OUT, RANK)
        self.A2, self.B2 = parameter(RANK, D_IN), parameter(D_OUT // HEADS, RANK)
        self.A3, self.B3 = parameter(RANK, D_IN), parameter(D_OUT // HEADS, RANK)
        self.m = torch.nn.Parameter(parameter(D_OUT).detach().abs() + 0.5)
        self.gate = parameter(D_OUT)
        self.bias = parameter(D_OUT)

    def trainable(self) -> list[torch.Tensor]:
        return [p for p in vars(self).values() if p.requires_grad]


def _written(p: Packed) -> torch.Tensor:
    made = torch.zeros_like(p.W)
    made[: D_OUT // HEADS] = p.B2 @ p.A2
    made[-D_OUT // HEADS :] += p.B3 @ p.A3
    return made


def _copied(p: Packed) -> torch.Tensor:
    made = p.W.new_zeros(D_OUT, D_IN)
    made[: D_OUT // HEADS].copy_(p.B2 @ p.A2)
    made[D_OUT // HEADS : 2 * D_OUT // HEADS].add_(p.B3 @ p.A3)
    return made


def _copied(p: Packed) -> torch.Tensor:
    made = p.W.new_zeros(D_OUT, D_IN)
    made[: D_OUT // HEADS].copy_(p.B2 @ p.A2)
    made[D_OUT // HEADS : 2 * D_OUT // HEADS].add_(p.B3 @ p.A3)
    return made


ROWS: dict[str, Callable[[Packed], torch.Tensor]] = {
    "all": lambda p: p.B @ p.A,
    "concatenated": lambda p: torch.cat([p.B2 @ p.A2, p.W.new_zeros(D_OUT // HEADS, D_IN), p.B3 @ p.A3]),
    "padded": lambda p: (
        F.pad(p.B2 @ p.A2, (0, 0, 0, D_OUT - D_OUT // HEADS)) + F.pad(p.B3 @ p.A3, (0, 0, D_OUT - D_OUT // HEADS, 0))
    ),
    "written": _written,
    "copied": _copied,
    "all and one block": lambda p: p.B @ p.A + F.pad(p.B2 @ p.A2, (0, 0, D_OUT - D_OUT // HEADS, 0)),
}
OF_ROWS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "norm": lambda v: v.norm(dim=1),
    "column": lambda v: v.norm(dim=1, keepdim=True)[:, 0],
    "squares": lambda v: v.square().sum(-1).sqrt(),
    "float_power": lambda v: v.pow(2).sum(1).float_power(0.5).to(v.dtype),
    "Gram": lambda v: (v @ v.t()).diagonal().sqrt(),
    "einsum": lambda v: torch.einsum("oi,oi->o", v, v) ** 0.5,
}
GUARDED: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **GUARDS,
    "two-sided": lambda n: n.clamp(1e-6, 1e6),
    "masked_fill": lambda n: n.masked_fill(n == 0, 1.0),
    "nan_to_num": lambda n: n.nan_to_num(1.0),
}
SCALED: dict[str, Callable[[Packed, torch.Tensor], torch.Tensor]] = {
    "divided": lambda p, n: p.m / n,
    "reciprocal": lambda p, n: p.m * n.reciprocal(),
    "interpolated": lambda p, n: 0.6 * (p.m / n - 1) + 1,
    "lerp": lambda p, n: torch.lerp(torch.ones_like(n), p.m / n, 0.6),
}
LINEAR: dict[str, Callable[[Packed, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "merged": lambda p, x, v, g: F.linear(x, g[:, None] * v, p.bias),
    "merged, matmul": lambda p, x, v, g: x @ (v * g.unsqueeze(1)).t() + p.bias,
    "weight delta": lambda p, x, v, g: F.linear(x, p.W, p.bias) + F.linear(x, g[:, None] * v - p.W),
    "weight delta alone": lambda p, x, v, g: F.linear(x, g[:, None] * v - p.W),
    "weight delta, gated": lambda p, x, v, g: F.linear(x, p.W) + p.gate.sigmoid() * F.linear(x, g[:, None] * v - p.W),
    "weight delta, in part": lambda p, x, v, g: F.linear(x, p.W) + 0.3 * F.linear(x, g[:, None] * v - p.W),
    "scaled result": lambda p, x, v, g: F.linear(x, v) * g + p.bias,
}


def tokens() -> torch.Tensor:
    return torch.randn(2, 5, D_IN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Linear(NamedTuple):
    rows: str
    norm: str
    guard: str
    scaled: str
    layer: str
    trained: bool


def drawn_layers(count: int, seed: int) -> list[Linear]:
    chance = random.Random(seed)
    parts: tuple[Any, ...] = list(ROWS), list(OF_ROWS), list(GUARDED), list(SCALED), list(LINEAR), [True, False, False]
    return [Linear(*(chance.choice(options) for options in parts)) for _ in range(count)]


def check_layer(case: Linear, codegen: str) -> None:
    def program(p: Packed, x: torch.Tensor) -> torch.Tensor:
        v = p.W + 0.5 * ROWS[case.rows](p)
        n = GUARDED[case.guard](OF_ROWS[case.norm](v))
        return LINEAR[case.layer](p, x, v, SCALED[case.scaled](p, n))

    assert statuses(program, Packed(case.trained), tokens(), codegen) == {"rewritten"}, case


def _rows_twice(p: Packed) -> torch.Tensor:
    made = torch.zeros_like(p.W)
    made[:4] += p.B2 @ p.A2
    made[2:6] += p.B3 @ p.A3
    return made


def _read_between(p: Packed) -> torch.Tensor:
    made = torch.zeros_like(p.W)
    rows = made[:4]
    rows.add_(p.B2 @ p.A2)
    made[8:] = p.B3 @ p.A3
    return made + rows.sum()


def _scaled_rows(p: Packed) -> torch.Tensor:
    made = torch.zeros_like(p.W)
    made[:4].add_(p.B2 @ p.A2, alpha=2)
    made[:4].mul_(3)
    return made


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("delta", [_rows_twice, _read_between, _scaled_rows])
def test_zeros_that_are_written_otherwise(delta: Callable[[Packed], torch.Tensor], codegen: str) -> None:
    """No rows beside each other: left as they are, and not in silence."""

    def program(p: Packed, x: torch.Tensor) -> torch.Tensor:
        v = p.W + 0.5 * delta(p)
        return F.linear(x, (p.m / v.norm(dim=1))[:, None] * v)

    assert "missed" in statuses(program, Packed(False), tokens(), codegen)


@pytest.mark.parametrize("seed", range(3))
def test_linear_layers(seed: int) -> None:
    for case in drawn_layers(8, seed):
        check_layer(case, "eager")


@pytest.mark.slow
def test_linear_layers_through_inductor() -> None:
    for case in drawn_layers(2, 100):
        check_layer(case, "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3, 11))
def test_many_linear_layers(seed: int) -> None:
    for case in drawn_layers(40, seed):
        check_layer(case, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(101, 105))
def test_many_linear_layers_through_inductor(seed: int) -> None:
    for case in drawn_layers(10, seed):
        check_layer(case, "inductor")
