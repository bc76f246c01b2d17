"""The row norm against fp64: values, gradients, memory, FLOPs, errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dorafx.ops  # noqa: F401
from dorafx.bench.allocations import allocations
from dorafx.ops import norm, reference

row_norm = torch.ops.dorafx.row_norm
SHAPES = [(5, 123, 3), (1, 1, 1), (7, 1, 1), (1, 9, 2), (64, 32, 8), (33, 65, 70), (128, 300, 16)]


def operands(d_out: int, d_in: int, rank: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(d_out * 1000 + d_in + rank)
    shapes = ((d_out, d_in), (d_out, rank), (rank, d_in))
    return tuple(torch.randn(*s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes)


@pytest.mark.parametrize("algorithm", ["tiled", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape: tuple[int, int, int], dtype: torch.dtype, algorithm: str) -> None:
    weight, left, right = operands(*shape, dtype)
    exact = reference.row_norm(weight.double(), left.double(), right.double(), 0.7)
    got = row_norm(weight, left, right, 0.7, algorithm)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)


def test_reference_forms_agree() -> None:
    weight, left, right = operands(11, 17, 4, torch.float64)
    torch.testing.assert_close(
        reference.row_norm_factored(weight, left, right, 2.0), reference.row_norm(weight, left, right, 2.0)
    )


@settings(max_examples=60, deadline=None)
@given(
    d_out=st.integers(1, 40),
    d_in=st.integers(1, 70),
    rank=st.integers(0, 12),
    scale=st.floats(-4, 4, allow_nan=False, width=32),
    transposed=st.booleans(),
    strided=st.booleans(),
    mixed=st.booleans(),
)
def test_any_shape_stride_and_dtype_mix(
    d_out: int, d_in: int, rank: int, scale: float, transposed: bool, strided: bool, mixed: bool
) -> None:
    weight, left, right = operands(d_out, d_in, rank)
    if mixed:
        weight = weight.bfloat16()
    if transposed:
        weight = weight.t().contiguous().t()
    if strided:
        weight = torch.cat([weight, weight], 1)[:, ::2][:, :d_in]
        right = right.t().contiguous().t()
    exact = reference.row_norm(weight.double(), left.double(), right.double(), scale)
    for algorithm in ("tiled", "factored"):
        got = row_norm(weight, left, right, scale, algorithm).double()
        # The expansion cancels where the delta nearly undoes the weight: its error is absolute in the size of its terms.
        size = weight.double().norm(dim=1) + abs(scale) * (left.double() @ right.double()).norm(dim=1)
        slack = 1e-5 * size if algorithm == "tiled" else 2e-3 * size
        assert bool(((got - exact).abs() <= slack + 1e-30).all())


def test_no_cancellation_in_the_tiled_form() -> None:
    """A delta that undoes the weight to within one part in a million: the tiled norm is still right, by row."""
    _, left, right = operands(16, 64, 4)
    weight = -(left.double() @ right.double()).float() * (1 + 1e-6)
    exact = reference.row_norm(weight.double(), left.double(), right.double(), 1.0)
    dense = torch.linalg.vector_norm(weight + left @ right, dim=1).double()
    got = row_norm(weight, left, right, 1.0, "tiled").double()
    assert (got - exact).norm() <= 1.5 * (dense - exact).norm() + 1e-7


def test_zero_rows_nan_and_inf() -> None:
    weight, left, right = operands(4, 8, 2)
    weight[0], left[0] = 0, 0
    weight[1, 3] = float("nan")
    weight[2, 3] = float("inf")
    for algorithm in ("tiled", "factored"):
        n = row_norm(weight, left, right, 1.0, algorithm)
        assert n[0] == 0
        assert n[1].isnan()
        assert n[2].isinf() or n[2].isnan()
    assert row_norm(weight, left, right, 1.0)[2] == float("inf")


@pytest.mark.parametrize("needs", [(True, True, True), (False, True, True), (False, False, True), (True, False, False)])
def test_gradients(needs: tuple[bool, bool, bool]) -> None:
    tensors = [t.requires_grad_(n) for t, n in zip(operands(6, 9, 3, torch.float64), needs)]
    assert torch.autograd.gradcheck(lambda *t: row_norm(*t, 0.7), tensors)


def test_gradient_of_a_zero_row_is_zero_as_in_aten() -> None:
    weight, left, right = operands(3, 5, 2)
    weight[1], left[1] = 0, 0
    left.requires_grad_()
    row_norm(weight, left, right, 1.0).sum().backward()
    assert left.grad is not None
    assert bool((left.grad[1] == 0).all())


def test_second_derivative_is_refused() -> None:
    weight, left, right = operands(3, 5, 2, torch.float64)
    left.requires_grad_()
    n = row_norm(weight, left, right, 1.0)
    with pytest.raises(RuntimeError, match="row_norm has no second derivative"):
        torch.autograd.grad(n.sum(), left, create_graph=True)


@pytest.mark.parametrize("algorithm", ["tiled", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("d_out", "d_in", "rank"),
    [(512, 512, 16), (256, 1024, 64), (1024, 256, 64), (1024, 96, 8), (64, 64, 4), (768, 1536, 256), (3, 9000, 8)],
)
def test_largest_allocation(d_out: int, d_in: int, rank: int, dtype: torch.dtype, algorithm: str) -> None:
    """No buffer reaches one eighth of the weight, let alone the dense product's size."""
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in inputs:
                largest = max(largest, out.untyped_storage().nbytes())
            return out

    weight, left, right = operands(d_out, d_in, rank, dtype)
    inputs = {t.untyped_storage().data_ptr() for t in (weight, left, right)}
    with Largest():
        norm.row_norm(weight, left, right, 1.0, algorithm)
    assert 0 < largest < d_out * d_in * weight.element_size() / 8


@pytest.mark.parametrize(("size", "rank"), [(512, 32), (512, 33), (1024, 64), (1024, 128), (1536, 96)])
def test_largest_allocation_inside_of_operators(size: int, rank: int) -> None:
    """As the profiler sees them: a sum in another dtype, for one, makes a copy of what it sums."""
    weight, left, right = operands(size, size, rank)
    with torch.no_grad():
        largest = allocations(lambda: norm.row_norm(weight, left, right, 1.0, "factored"), "cpu").largest
    assert 0 < largest < size * size * 4 / 8


@pytest.mark.parametrize("algorithm", ["tiled", "factored"])
@pytest.mark.parametrize("transposed", [False, True])
def test_many_chunks_of_columns_against_fp64(algorithm: str, transposed: bool) -> None:
    """A high rank leaves room to cast few columns of a factor at a time; a column norm is that of transposed views."""
    weight, left, right = operands(96, 320, 64, torch.bfloat16)
    if transposed:
        weight, left, right = weight.t().contiguous().t(), left.t().contiguous().t(), right.t().contiguous().t()
    rows, columns = norm._block(weight, 64, torch.float32, True, 64)
    assert rows < 96 / 3 and columns < 320 / 4
    exact = reference.row_norm(weight.double(), left.double(), right.double(), 0.7)
    torch.testing.assert_close(row_norm(weight, left, right, 0.7, algorithm).double(), exact, rtol=1e-5, atol=1e-5)


def test_flops_are_counted() -> None:
    weight, left, right = operands(40, 30, 5)
    with FlopCounterMode(display=False) as counter:
        row_norm(weight, left, right, 1.0)
    assert counter.get_total_flops() == 2 * 40 * 30 * 5


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda w, b, a: (w, b[:, :1], a), ValueError, "weight \\[d_out, d_in\\], left \\[d_out, r\\]"),
        (lambda w, b, a: (w[0], b, a), ValueError, "takes matrices"),
        (lambda w, b, a: (w.int(), b, a), TypeError, "weight is torch.int32"),
        (lambda w, b, a: (w, b.to("meta"), a), ValueError, "one device is needed"),
    ],
)
def test_wrong_operands_are_named(change, error, text) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=text):
        norm.row_norm(*change(*operands(4, 6, 2)), 1.0)


def test_unknown_algorithm() -> None:
    with pytest.raises(ValueError, match="allowed are 'auto', 'tiled', 'factored'"):
        row_norm(*operands(4, 6, 2), 1.0, "fast")


def test_rank_zero_is_the_plain_norm() -> None:
    weight, left, right = operands(4, 6, 0)
    torch.testing.assert_close(row_norm(weight, left, right, 1.0), weight.norm(dim=1))


@pytest.mark.parametrize("algorithm", ["auto", "tiled", "factored"])
@pytest.mark.parametrize("zero", ["left", "right"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(64, 48), (300, 512), (40, 4096), (512, 1)])
def test_without_a_delta_it_is_the_norm_of_the_weight(
    shape: tuple[int, int], transposed: bool, zero: str, algorithm: str
) -> None:
    """To the bit: at the start of a training the magnitude is what the same call gives."""
    weight, left, right = operands(*shape, 4)
    weight = weight.t().contiguous().t() if transposed else weight
    (left if zero == "left" else right).zero_()
    got = row_norm(weight, left, right, 0.7, algorithm)
    squares = [norm.row_squares(weight)] if algorithm == "factored" else []
    (listed,) = torch.ops.dorafx.row_norms([weight], [left], [right], [0.7], "factored", squares)
    exact = torch.linalg.vector_norm(weight, dim=1)
    assert torch.equal(got, exact) and torch.equal(listed, exact)
    batch = torch.stack([weight, weight])
    together = torch.ops.dorafx.row_norm_batched(batch, torch.stack([left] * 2), torch.stack([right] * 2), 0.7)
    assert torch.equal(together, torch.linalg.vector_norm(batch, dim=2))


@pytest.mark.parametrize(
    ("where", "special"),
    [
        ("left", float("nan")),
        ("left", float("inf")),
        ("right", float("nan")),
        ("right", float("inf")),
        ("scale", float("inf")),
    ],
)
def test_a_zero_factor_does_not_hide_what_is_not_finite(where: str, special: float) -> None:
    weight, left, right = operands(300, 512, 4)
    scale = special if where == "scale" else 1.0
    (right if where == "left" else left).zero_()
    if where != "scale":
        (left if where == "left" else right)[0, 0] = special
    exact = torch.linalg.norm(weight + scale * (left @ right), dim=1)
    assert exact.isnan().any()
    assert torch.equal(row_norm(weight, left, right, scale).isnan(), exact.isnan())


def test_one_row_of_a_factor_is_enough_of_a_delta() -> None:
    weight, left, right = operands(300, 512, 4)
    for row in (0, 150, 299):
        few = torch.zeros_like(left)
        few[row] = left[row]
        exact = reference.row_norm(weight.double(), few.double(), right.double(), 2.0)
        torch.testing.assert_close(row_norm(weight, few, right, 2.0).double(), exact, rtol=1e-6, atol=0)


def test_operator_contract() -> None:
    torch.library.opcheck(row_norm.default, (*(t.requires_grad_() for t in operands(4, 6, 2)), 0.5, "auto"))


@pytest.mark.parametrize("algorithm", ["tiled", "factored"])
def test_autocast_around_it_changes_nothing(algorithm: str) -> None:
    """The operator runs inside the user's autocast regions, and must not multiply in their dtype."""
    plain = [t.requires_grad_() for t in operands(33, 65, 7)]
    cast = [t.detach().clone().requires_grad_() for t in plain]
    expected = row_norm(*plain, 0.7, algorithm)
    expected.sin().sum().backward()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = row_norm(*cast, 0.7, algorithm)
        assert torch.equal(got, expected)
        got.sin().sum().backward()
    for one, other in zip(cast, plain):
        assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
