"""The same checks on a real GPU: ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

import dorafx.ops  # noqa: F401
from dorafx.ops import reference
from dorafx.ops.quantized import Packed, dequantize_rows

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SHAPES = [(1, 1, 1), (5, 123, 3), (130, 257, 17), (4096, 4096, 16), (1000, 3000, 384), (8192, 1024, 64)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_row_norm(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    d_out, d_in, rank = shape
    generator = torch.Generator().manual_seed(0)
    weight, left, right = (
        torch.randn(s, generator=generator).to(dtype).cuda() for s in ((d_out, d_in), (d_out, rank), (rank, d_in))
    )
    exact = reference.row_norm(weight.double(), left.double(), right.double(), 0.1)
    for w in (weight, weight.t().contiguous().t()):
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        got = torch.ops.dorafx.row_norm(w, left, right, 0.1)
        transient = torch.cuda.max_memory_allocated() - before
        tolerance = 1e-12 if dtype == torch.float64 else 2e-5
        torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=1e-6)
        assert transient <= max(d_out * d_in * weight.element_size() // 8, 1 << 20)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=generator).cuda().requires_grad_() for s in ((70, 90), (70, 9), (9, 90))]
    torch.ops.dorafx.row_norm(*leaves, 0.7).sin().sum().backward()
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    (exact[0] + 0.7 * exact[1] @ exact[2]).norm(dim=1).sin().sum().backward()
    for leaf, wanted in zip(leaves, exact):
        assert leaf.grad is not None and wanted.grad is not None
        torch.testing.assert_close(leaf.grad.double(), wanted.grad, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [4, 32, 200])
@pytest.mark.parametrize("format", ["nf4", "fp4", "bnb8", "affine"])
def test_row_norm_of_a_quantized_weight(format: str, rank: int, dtype: torch.dtype) -> None:
    d_out, d_in, group = 1000, 2048, 2048 if format == "bnb8" else 64
    generator = torch.Generator().manual_seed(0)
    four_bits = format in ("nf4", "fp4")
    codes = torch.randint(
        0 if four_bits else -128, 256 if four_bits else 128, (d_out, d_in // (1 + four_bits)), generator=generator
    )
    scales = torch.rand(d_out, d_in // group, generator=generator)
    weight = Packed(
        codes.to(torch.uint8 if four_bits else torch.int8).cuda(),
        (scales.to(dtype) if format == "affine" else scales).cuda(),
        None,
        format,
        (d_out, d_in),
        group,
        torch.float32 if format == "bnb8" else dtype,
    )
    left, right = (torch.randn(s, generator=generator).to(dtype).cuda() for s in ((d_out, rank), (rank, d_in)))
    exact = reference.row_norm(dequantize_rows(weight, 0, d_out).double(), left.double(), right.double(), 0.3)
    got = torch.ops.dorafx.row_norm_quantized(
        weight.packed, weight.scales, None, left, right, 0.3, format, [d_out, d_in], group, weight.dtype
    )
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=1e-5)
