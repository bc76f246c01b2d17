"""The gradients of the row norm: every dtype and layout against fp64, and no dense gradient on the way."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dorafx.ops  # noqa: F401
from dorafx.ops import norm, reference

row_norm = torch.ops.dorafx.row_norm


def operands(d_out: int, d_in: int, rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(d_out + d_in + rank)
    shapes = ((d_out, d_in), (d_out, rank), (rank, d_in))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def in_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return tensor.t().contiguous().t()
    if layout == "strided":
        return torch.stack([tensor, tensor], 2)[:, :, 0]
    return tensor


def exact_gradients(tensors: list[torch.Tensor], scale: float) -> list[torch.Tensor]:
    weight, left, right = (t.detach().double().requires_grad_() for t in tensors)
    n = torch.linalg.vector_norm(weight + scale * left @ right, dim=1)
    return list(torch.autograd.grad(n.sin().sum(), (weight, left, right)))


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 40, 5), (64, 9, 12), (3, 50, 0), (1, 1, 1)])
def test_against_fp64(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    leaves = [in_layout(t, layout).requires_grad_() for t in operands(*shape, dtype)]
    row_norm(*leaves, 0.3).sin().sum().backward()
    # fp32 inside, then one rounding to the gradient's dtype, which is the operand's.
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for leaf, exact in zip(leaves, exact_gradients(leaves, 0.3), strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == dtype
        torch.testing.assert_close(leaf.grad.double(), exact, rtol=tolerance, atol=tolerance)


def test_column_norm() -> None:
    """By column it is the same operator on transposed views; the gradients arrive at the parameters."""
    weight, left, right = (t.requires_grad_() for t in operands(24, 40, 5, torch.float64))
    row_norm(weight.t(), right.t(), left.t(), 0.3).sin().sum().backward()
    exact = [t.detach().clone().requires_grad_() for t in (weight, left, right)]
    torch.linalg.vector_norm(exact[0] + 0.3 * exact[1] @ exact[2], dim=0).sin().sum().backward()
    for ours, wanted in zip((weight, left, right), exact, strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad)


def test_filters_of_a_convolution() -> None:
    weight = torch.randn(6, 4, 3, 3, dtype=torch.float64, requires_grad=True)
    left, right = torch.randn(6, 2, dtype=torch.float64), torch.randn(2, 36, dtype=torch.float64)
    row_norm(weight.flatten(1), left, right, 0.3).sum().backward()
    exact = weight.detach().clone().requires_grad_()
    (exact + 0.3 * (left @ right).view_as(exact)).square().sum((1, 2, 3)).sqrt().sum().backward()
    torch.testing.assert_close(weight.grad, exact.grad)


def test_one_dtype_each() -> None:
    weight, left, right = operands(24, 40, 5, torch.float64)
    leaves = [weight.bfloat16(), left.float(), right.half()]
    leaves = [t.requires_grad_() for t in leaves]
    row_norm(*leaves, 0.3).sin().sum().backward()
    for leaf, exact in zip(leaves, exact_gradients(leaves, 0.3), strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == leaf.dtype
        torch.testing.assert_close(leaf.grad.double(), exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("wide", [0, 1, 2])
@pytest.mark.parametrize("narrow", [torch.float32, torch.bfloat16])
def test_fp64_where_one_operand_is(narrow: torch.dtype, wide: int) -> None:
    """As type promotion has it: a narrow weight with fp64 factors, or one of them, gives an fp64 norm and exact gradients."""
    tensors = [t if i == wide else t.to(narrow) for i, t in enumerate(operands(40, 90, 5, torch.float64))]
    exact = reference.row_norm(*(t.double() for t in tensors), 0.3)
    lists = [[t] for t in tensors]
    squares = norm.row_squares(tensors[0], torch.float64)
    found = [
        *(row_norm(*tensors, 0.3, algorithm) for algorithm in ("tiled", "factored")),
        *torch.ops.dorafx.row_norms(*lists, [0.3], "auto", []),
        *torch.ops.dorafx.row_norms(*lists, [0.3], "factored", [squares]),
        norm.row_norm_unrolled(*tensors, 0.3),
    ]
    for n in found:
        torch.testing.assert_close(n, exact, rtol=1e-12, atol=0)
    leaves = [t.requires_grad_() for t in tensors]
    gradients = torch.autograd.grad(row_norm(*leaves, 0.3).sin().sum(), leaves)
    torch.testing.assert_close(gradients[wide], exact_gradients(leaves, 0.3)[wide], rtol=1e-11, atol=1e-12)
    torch.library.opcheck(row_norm.default, (*leaves, 0.3), test_utils=("test_schema", "test_faketensor"))


class Largest(TorchDispatchMode):
    """The largest storage that an operator made."""

    def __init__(self, *known: torch.Tensor) -> None:
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in known}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


SIZES = [(512, 512, 16), (1024, 256, 64), (256, 1024, 8), (768, 1536, 32)]


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SIZES)
def test_no_dense_gradient(shape: tuple[int, int, int], dtype: torch.dtype, layout: str) -> None:
    """Of a frozen weight nothing is made but blocks of it, and factors: the gradients themselves, and their fp32 copies."""
    d_out, d_in, rank = shape
    weight, left, right = (in_layout(t, layout) for t in operands(*shape, dtype))
    n, grad = norm.row_norm(weight, left, right, 1.0), torch.randn(d_out)
    with Largest(weight, left, right, n, grad) as largest:
        norm.row_norm_backward(grad, weight, left, right, n, 1.0, False, True, True)
    assert 0 < largest.bytes <= max(d_out * d_in * dtype.itemsize // 8, 4 * max(d_out, d_in) * rank)


@pytest.mark.parametrize("algorithm", ["tiled", "factored"])
@pytest.mark.parametrize("layout", ["transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SIZES)
def test_forward_copies_no_strided_weight(
    shape: tuple[int, int, int], dtype: torch.dtype, layout: str, algorithm: str
) -> None:
    tensors = [in_layout(t, layout) for t in operands(*shape, dtype)]
    with Largest(*tensors) as largest:
        norm.row_norm(*tensors, 1.0, algorithm)
    assert 0 < largest.bytes < shape[0] * shape[1] * dtype.itemsize / 8


def test_only_the_gradient_of_a_trained_weight_is_dense() -> None:
    weight, left, right = operands(512, 512, 16, torch.float32)
    n, grad = norm.row_norm(weight, left, right, 1.0), torch.randn(512)
    sizes: list[int] = []

    class Dense(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and func in (
                torch.ops.aten.empty_strided.default,
                torch.ops.aten.addmm.default,
            ):
                sizes.append(out.numel())
            return out

    with Dense():
        norm.row_norm_backward(grad, weight, left, right, n, 1.0, True, False, False)
    assert sum(size >= 512 * 512 / 8 for size in sizes) == 1
