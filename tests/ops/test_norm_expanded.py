"""The factored norm of fp32 operands on a CPU: as exact as the dense product's, in all rows, and chosen where it is faster."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from dorafx import DorafxWarning, rewrite_log
from dorafx.ops import norm, reference
from dorafx.ops.norm import factored, fastest, row_squares, tiled

SHAPES = [(300, 256, 8), (256, 1024, 16), (70, 2048, 40), (512, 512, 64), (128, 130, 5), (200, 515, 33)]


def operands(
    d_out: int, d_in: int, rank: int, size: float = 1.0, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``size``: of the left factor; with 0.02 the weight prevails, with 1 the product."""
    generator = torch.Generator().manual_seed(seed)
    weight, left, right = (torch.randn(s, generator=generator) for s in ((d_out, d_in), (d_out, rank), (rank, d_in)))
    return 0.02 * weight, size * left, 0.02 * right


def errors(found: torch.Tensor, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> float:
    """The root of the mean of the squared relative errors."""
    exact = (weight.double() + 2 * left.double() @ right.double()).norm(dim=1)
    return ((found.double() - exact) / exact).square().mean().sqrt().item()


@pytest.mark.parametrize("size", [1.0, 0.02, 1e-6])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kept", [False, True])
def test_as_exact_as_the_dense_product(shape: tuple[int, int, int], size: float, kept: bool) -> None:
    weight, left, right = operands(*shape, size)
    square = row_squares(weight) if kept else None
    ours = errors(factored(weight, left, right, 2.0, square), weight, left, right)
    dense = errors(torch.linalg.vector_norm(weight + 2.0 * (left @ right), dim=1), weight, left, right)
    assert ours <= 1.05 * dense


@settings(deadline=None)
@given(
    d_out=st.integers(1, 200),
    d_in=st.integers(128, 600),
    rank=st.integers(1, 80),
    scale=st.floats(-3, 3, width=32),
    layout=st.sampled_from(["rows", "columns", "strided"]),
    size=st.sampled_from([1.0, 0.02]),
    kept=st.booleans(),
    shrink=st.sampled_from([1, 4, 64]),
)
def test_any_shape_and_layout(
    d_out: int, d_in: int, rank: int, scale: float, layout: str, size: float, kept: bool, shrink: int
) -> None:
    made = operands(d_out, d_in, rank, size)
    if layout == "columns":
        made = tuple(t.t().contiguous().t() for t in made)  # type: ignore[assignment]
    if layout == "strided":
        made = tuple(t.repeat_interleave(2, 1)[:, ::2] for t in made)  # type: ignore[assignment]
    weight, left, right = made
    found = factored(*made, scale, row_squares(weight) if kept else None, shrink)
    exact = reference.row_norm(weight.double(), left.double(), right.double(), scale)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2e-6, atol=0)


@pytest.mark.parametrize("left_over", [0.0, 1e-6, 1e-3, 0.3])
def test_rows_that_cancel(left_over: float) -> None:
    """Of some rows the product is the weight's negative, or minus twice the weight: the expansion alone would lose their digits."""
    weight, left, right = operands(300, 256, 8)
    for rows, multiple in ((slice(3, 200, 7), -1.0), (slice(4, 200, 9), -2.0)):
        weight[rows] = (2 * left[rows] @ right) / multiple + left_over * weight[rows]
    exact = reference.row_norm(weight.double(), left.double(), right.double(), 2.0)
    expected = (tiled(weight, left, right, 2.0).double() - exact).abs().max()
    assert (factored(weight, left, right, 2.0).double() - exact).abs().max() <= 2 * expected


def test_all_rows_cancel_without_more_memory() -> None:
    weight, left, right = operands(1000, 256, 4)
    weight.copy_(-2 * left @ right)
    assert (factored(weight, left, right, 2.0) <= 1e-5).all()


def test_zero_rows_nan_and_inf() -> None:
    weight, left, right = operands(20, 256, 4)
    weight[2], left[2] = 0.0, 0.0
    weight[3, 5], weight[4, 6], left[5, 1] = float("nan"), float("inf"), float("inf")
    found, expected = factored(weight, left, right, 2.0), tiled(weight, left, right, 2.0)
    torch.testing.assert_close(found, expected, equal_nan=True)
    assert found[2] == 0.0


def test_what_is_multiplied() -> None:
    """The weight once; what else there is depends on the rank."""
    weight, left, right = operands(256, 512, 16)
    with FlopCounterMode(display=False) as counter:
        factored(weight, left, right, 2.0)
    assert counter.get_total_flops() == 2 * 16 * (256 * 512 + 16 * 256 + 16 * 512)


def test_less_memory() -> None:
    from test_out_of_memory import Limited, on_cpu

    weight, left, right = operands(400, 256, 12)
    exact = reference.row_norm(weight.double(), left.double(), right.double(), 2.0)
    with Limited(4800, on_cpu) as limited, pytest.warns(DorafxWarning, match="out of memory during a norm"):
        found = norm.row_norm(weight, left, right, 2.0, "factored")
    assert limited.failures
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)


def test_what_is_fastest() -> None:
    def chosen(d_out: int, d_in: int, rank: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> str:
        return fastest(d_out, d_in, rank, [torch.empty(0, dtype=dtype, device=device)])

    assert {chosen(n, n, r) for n, r in itertools.product((256, 1024, 2048, 8192), (1, 8, 32))} == {"factored"}
    assert {chosen(1024, 1024, 128), chosen(4096, 4096, 64)} == {"factored"}
    assert {chosen(4096, 4096, 128), chosen(4096, 4096, 384), chosen(1024, 1024, 129)} == {"tiled"}
    assert {chosen(4096, 128, 32), chosen(128, 128, 8), chosen(1024, 1024, 0)} == {"tiled"}
    assert chosen(1024, 1024, 8, torch.bfloat16) == chosen(1024, 1024, 8, device="meta") == "tiled"


@pytest.mark.parametrize(("dtype", "algorithm"), [(torch.float32, "factored"), (torch.bfloat16, "tiled")])
def test_programs_are_given_what_is_fastest(dtype: torch.dtype, algorithm: str) -> None:
    weight, left, right = (t.to(dtype) for t in operands(256, 256, 8))
    m = torch.rand(256, dtype=dtype)

    def layer(x: torch.Tensor) -> torch.Tensor:
        n = (weight + 2 * left @ right).norm(dim=1)
        return m / n * (x @ weight.T + 2 * (x @ right.T) @ left.T)

    x = torch.randn(20, 256).to(dtype)
    call = torch.compile(layer, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True})
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(call(x), layer(x), rtol=tolerance, atol=tolerance)
    (record,) = rewrite_log().records
    assert record.norm_algorithm == algorithm
