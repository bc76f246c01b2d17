"""The row norms of a batch of weights in one call: against fp64, forward and backward, and what is in memory meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import dorafx.ops  # noqa: F401
from dorafx.ops import batched

row_norm_batched = torch.ops.dorafx.row_norm_batched
SHAPES = [
    (3, 24, 40, 5),
    (40, 8, 9, 2),
    (1, 16, 7, 3),
    (5, 4, 4, 0),
    (2, 1, 1, 1),
    (0, 4, 5, 2),
    (2, 0, 4, 2),
    (2, 4, 0, 2),
]
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 4e-3}


def operands(batch: int, d_out: int, d_in: int, rank: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(d_out + d_in + rank)
    shapes = ((batch, d_out, d_in), (batch, d_out, rank), (batch, rank, d_in))
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def in_layout(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    if layout == "transposed":
        return tensor.mT.contiguous().mT
    if layout == "experts last":
        return tensor.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return torch.stack([tensor, tensor], 3)[..., 0] if layout == "strided" else tensor


@pytest.mark.parametrize("algorithm", ["tiled", "factored"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "experts last", "strided"])
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_fp64(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, algorithm: str) -> None:
    leaves = [in_layout(t, layout).requires_grad_() for t in operands(*shape, dtype)]
    n = row_norm_batched(*leaves, 0.3, algorithm)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = torch.linalg.vector_norm(exact[0] + 0.3 * exact[1] @ exact[2], dim=2)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert n.dtype == wide
    torch.testing.assert_close(n.double(), wanted, rtol=1e-12 if wide == torch.float64 else 1e-5, atol=1e-5)
    torch.testing.assert_close(batched.row_norm_batched_unrolled(*leaves, 0.3), n, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(n.sin().sum(), leaves)
    for leaf, got, right in zip(leaves, gradients, torch.autograd.grad(wanted.sin().sum(), exact)):
        assert got.dtype == leaf.dtype
        torch.testing.assert_close(got.double(), right, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


def test_zero_rows_and_infinite_ones() -> None:
    weight, left, right = operands(3, 4, 5, 2, torch.float32)
    weight[1, 2], left[1, 2], weight[2, 0, 0] = 0.0, 0.0, torch.inf
    leaves = [t.requires_grad_() for t in (weight, left, right)]
    n = row_norm_batched(*leaves, 1.0)
    wanted = torch.linalg.vector_norm(weight + left @ right, dim=2)
    torch.testing.assert_close(n, wanted)
    for got, exact in zip(torch.autograd.grad(n.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves)):
        torch.testing.assert_close(got, exact, equal_nan=True)


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


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 512, 512, 16), (32, 64, 128, 4)])
def test_no_dense_intermediate(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str) -> None:
    tensors = [in_layout(t, layout) for t in operands(*shape, dtype)]
    weight, left, right = tensors
    dense, factor = weight.numel() * dtype.itemsize, 4 * max(left.numel(), right.numel())
    for algorithm in ("tiled", "factored"):
        with Largest(*tensors) as largest:
            n = batched.row_norm_batched(*tensors, 0.7, algorithm)
        assert 0 < largest.bytes < max(dense / 8, factor)
    grad = torch.randn_like(n)
    with Largest(*tensors, n, grad) as largest:
        batched.row_norm_batched_backward(grad, *tensors, n, 0.7, False, True, True)
    assert 0 < largest.bytes <= max(dense / 8, factor)


def test_flops() -> None:
    tensors = [t.requires_grad_() for t in operands(3, 8, 6, 2, torch.float32)]
    with FlopCounterMode(display=False) as counter:
        row_norm_batched(*tensors, 1.0)
    assert counter.get_total_flops() == 2 * 3 * 8 * 6 * 2


def test_wrong_operands_are_refused() -> None:
    weight, left, right = operands(3, 8, 6, 2, torch.float32)
    with pytest.raises(ValueError, match="takes batches of matrices"):
        row_norm_batched(weight[0], left[0], right[0], 1.0)
    with pytest.raises(ValueError, match="must agree"):
        row_norm_batched(weight, left[:1], right, 1.0)
    with pytest.raises(TypeError, match=r"left is torch\.int64"):
        row_norm_batched(weight, left.long(), right, 1.0)
    with pytest.raises(RuntimeError, match="no second derivative"):
        n = row_norm_batched(weight.requires_grad_(), left, right, 1.0)
        torch.autograd.grad(n.sum(), weight, create_graph=True)
