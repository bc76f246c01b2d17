"""A delta of some rows of a packed weight: q and v of a fused projection, put together by ``cat``, ``pad``, or writes into zeros."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from same_results import check_everything

from dorafx import rewrite_log

ROWS, D_IN, RANK = 4, 12, 3


class Packed:
    """q, k and v of a layer in one weight ``[3·4, 12]``; factors for q and v."""

    def __init__(self, trained: bool = False) -> None:
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator) * 0.3)

        self.W = parameter(3 * ROWS, D_IN).requires_grad_(trained)
        self.A, self.A2 = parameter(RANK, D_IN), parameter(2, D_IN)
        self.Bq, self.Bv, self.Bv2 = parameter(ROWS, RANK), parameter(ROWS, RANK), parameter(ROWS, 2)
        self.m = torch.nn.Parameter(1 + torch.rand(3 * ROWS, dtype=torch.float64, generator=generator))

    def trainable(self) -> list[torch.Tensor]:
        return [p for p in vars(self).values() if p.requires_grad]


Weight = Callable[[Packed], torch.Tensor]
WEIGHTS: dict[str, Weight] = {}


def weight(fn: Weight) -> Weight:
    WEIGHTS[fn.__name__] = fn
    return fn


def deltas(p: Packed) -> tuple[torch.Tensor, torch.Tensor]:
    return p.Bq @ p.A, p.Bv2 @ p.A2


@weight
def deltas_concatenated(p: Packed) -> torch.Tensor:
    q, v = deltas(p)
    return p.W + 0.5 * torch.cat([q, torch.zeros_like(q), v])


@weight
def deltas_of_one_factor_concatenated(p: Packed) -> torch.Tensor:
    return p.W + torch.cat([p.Bq @ p.A, p.W.new_zeros(ROWS, D_IN), 2 * (p.Bv @ p.A)], dim=-2)


@weight
def deltas_concatenated_and_detached(p: Packed) -> torch.Tensor:
    q, v = deltas(p)
    return p.W + torch.cat([q.detach(), torch.zeros_like(q), v])


@weight
def transposed_deltas_concatenated(p: Packed) -> torch.Tensor:
    q, v = deltas(p)
    return p.W + torch.cat([q.T, torch.zeros_like(q.T), v.T], dim=1).T


@weight
def sums_concatenated(p: Packed) -> torch.Tensor:
    q, v = deltas(p)
    return torch.cat((p.W[:ROWS] + q, p.W[ROWS : 2 * ROWS], p.W[2 * ROWS :] + v))


@weight
def sums_of_chunks_concatenated(p: Packed) -> torch.Tensor:
    q, k, v = p.W.chunk(3)
    return torch.cat((q + p.Bq @ p.A, k, v + p.Bv @ p.A))


@weight
def sums_of_several_views_concatenated(p: Packed) -> torch.Tensor:
    q, k, v = p.W[:ROWS, :], p.W.narrow(0, ROWS, ROWS), p.W.split(ROWS)[2]
    return torch.cat((q + p.Bq @ p.A, k, v + p.Bv @ p.A))


@weight
def delta_padded_below(p: Packed) -> torch.Tensor:
    return p.W + F.pad(p.Bq @ p.A, (0, 0, 0, 2 * ROWS))


@weight
def deltas_padded_and_added(p: Packed) -> torch.Tensor:
    q, v = deltas(p)
    return p.W + F.pad(q, (0, 0, 0, 2 * ROWS)) + F.pad(v, (0, 0, 2 * ROWS, 0), "constant", 0.0)


@weight
def columns_padded(p: Packed) -> torch.Tensor:
    """Of some columns and rows."""
    return p.W + F.pad(p.Bq @ p.A[:, :5], (3, 4, ROWS, ROWS))


@weight
def written_into_zeros(p: Packed) -> torch.Tensor:
    q, v = deltas(p)
    D = torch.zeros_like(p.W)
    D[:ROWS] = q
    D[2 * ROWS :] = v
    return p.W + D


@weight
def written_into_zeros_from_behind(p: Packed) -> torch.Tensor:
    D = torch.zeros(3 * ROWS, D_IN, dtype=p.W.dtype)
    D[-ROWS:, :] = p.Bv @ p.A
    q = p.Bq @ p.A
    q *= 2
    D[ROWS : 2 * ROWS, ...] = q
    return p.W + D


def layer(p: Packed, x: torch.Tensor, V: torch.Tensor, detached: bool = False) -> torch.Tensor:
    n = V.norm(dim=1)
    return F.linear(x, V * (p.m / (n.detach() if detached else n))[:, None])


@pytest.mark.default_cases("inductor-written_into_zeros", "inductor-sums_concatenated", *(f"eager-{name}" for name in WEIGHTS))  # fmt: skip
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_rewritten_whole(name: str, codegen: str) -> None:
    """Values, strides and gradients; the base weight trained and not, the norm detached and not."""
    for grad, trained, detached in ((True, False, True), (True, True, False), (False, False, False)):
        rewrite_log().clear()
        check_everything(
            lambda p, x, detached=detached: layer(p, x, WEIGHTS[name](p), detached),
            Packed(trained),
            torch.randn(2, 5, D_IN, dtype=torch.float64),
            codegen,
            grad,
        )
        assert [(r.status, r.pattern, r.reason) for r in rewrite_log().records] == [("rewritten", "linear", "")]


@pytest.mark.parametrize("name", WEIGHTS)
def test_factored_products(name: str) -> None:
    """The composition that the program writes itself: only the norm has the packed delta."""

    def program(p: Packed, x: torch.Tensor) -> torch.Tensor:
        return p.m / WEIGHTS[name](p).norm(dim=1).detach() * F.linear(x, p.W)

    check_everything(program, Packed(), torch.randn(3, D_IN, dtype=torch.float64))
    assert [r.rewritten for r in rewrite_log().records] == [True]


def overlapping(p: Packed) -> torch.Tensor:
    D = torch.zeros_like(p.W)
    D[: ROWS + 1] = F.pad(p.Bq @ p.A, (0, 0, 0, 1))
    D[ROWS : 2 * ROWS] = p.Bv @ p.A
    return p.W + D


def read_in_between(p: Packed) -> torch.Tensor:
    D = torch.zeros_like(p.W)
    D[:ROWS] = p.Bq @ p.A
    before = D.sum()
    D[ROWS : 2 * ROWS] = p.Bv @ p.A
    return p.W + D * before


def source_written_in_between(p: Packed) -> torch.Tensor:
    D = torch.zeros_like(p.W)
    q = p.Bq @ p.A
    D[:ROWS] = q
    q[0] = 1.0
    D[ROWS : 2 * ROWS] = p.Bv @ p.A
    return p.W + D * q.sum()


def written_without_gradients(p: Packed) -> torch.Tensor:
    D = torch.zeros_like(p.W)
    with torch.no_grad():
        D[:ROWS] = p.Bq @ p.A
    D[ROWS : 2 * ROWS] = p.Bv @ p.A
    return p.W + D


def every_second_row(p: Packed) -> torch.Tensor:
    D = torch.zeros_like(p.W)
    D[: 2 * ROWS : 2] = p.Bq @ p.A
    return p.W + D


def written_once_more_later(p: Packed) -> torch.Tensor:
    D = torch.zeros_like(p.W)
    D[:ROWS] = p.Bq @ p.A
    V = p.W + D
    D[ROWS : 2 * ROWS] = p.Bv @ p.A
    return V + D


def padded_with_ones(p: Packed) -> torch.Tensor:
    return p.W + F.pad(p.Bq @ p.A, (0, 0, 0, 2 * ROWS), value=1.0)


def padded_around(p: Packed) -> torch.Tensor:
    return p.W + F.pad((p.Bq @ p.A)[None], (0, 0, 4, 4), "reflect" if ROWS > 4 else "replicate")[0]


def chunks_in_another_order(p: Packed) -> torch.Tensor:
    return torch.cat((p.W[ROWS : 2 * ROWS] + p.Bq @ p.A, p.W[:ROWS], p.W[2 * ROWS :] + p.Bv @ p.A))


def a_chunk_twice(p: Packed) -> torch.Tensor:
    return torch.cat((p.W[:ROWS] + p.Bq @ p.A, p.W[:ROWS], p.W[2 * ROWS :] + p.Bv @ p.A))


def a_chunk_scaled(p: Packed) -> torch.Tensor:
    return torch.cat((p.W[:ROWS] + p.Bq @ p.A, 2 * p.W[ROWS : 2 * ROWS], p.W[2 * ROWS :]))


def concatenated_with_a_dense_delta(p: Packed) -> torch.Tensor:
    return p.W + torch.cat([p.Bq @ p.A, p.W[:ROWS].tanh(), p.Bv @ p.A])


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize(
    "program",
    [overlapping, read_in_between, source_written_in_between, written_without_gradients, every_second_row,
     written_once_more_later, padded_with_ones, padded_around, chunks_in_another_order, a_chunk_twice, a_chunk_scaled,
     concatenated_with_a_dense_delta],
)  # fmt: skip
def test_what_is_no_packed_delta_keeps_its_values(program: Weight, codegen: str) -> None:
    """Left alone, with a record that says so."""
    for grad in (True,) if program is written_without_gradients else (True, False):
        rewrite_log().clear()
        x = torch.randn(3, D_IN, dtype=torch.float64)
        check_everything(lambda p, x: layer(p, x, program(p)), Packed(True), x, codegen, grad)
        assert [(r.status, bool(r.reason)) for r in rewrite_log().records] == [("missed", True)]
