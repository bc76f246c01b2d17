# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""The tiled row norm of a quantised weight: codes are dequantised in registers, one tile at a time, so the dense weight is never in
memory. The loop is that of :mod:`dorafx.ops.triton.row_norm`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dorafx.ops.quantized import TABLES, Packed

from . import configs
from .row_norm import loadable, norm_of_rows
from .tiles import block_constants, finish, launched_on, operand_type


@triton.jit
def quantized_row_norm_kernel(
    packed,
    scales,
    zeros,
    left,
    right,
    out,
    scale,
    d_out,
    d_in,
    rank,
    part,
    group,
    stride_lo,
    stride_lr,
    stride_rr,
    stride_ri,
    FORMAT: tl.constexpr,
    ZEROS: tl.constexpr,
    VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    WIDTH: tl.constexpr = 2 if FORMAT == "nf4" or FORMAT == "fp4" else 1
    norm_of_rows(
        packed, left, right, scales, zeros, out, scale, d_out, d_in, rank, part, group,
        d_in // WIDTH, 1, stride_lo, stride_lr, stride_rr, stride_ri,
        FORMAT, ZEROS, VALUE, ROWS, COLUMNS, DEPTH, CHUNKS, OPERAND, PRECISION, STAGES,
    )  # fmt: skip


def serves(weight: Packed) -> bool:
    """Whether the kernel dequantises this format, for this shape and these scales."""
    d_in = weight.shape[1]
    if not weight.numel or not weight.packed.is_contiguous() or not weight.scales.is_contiguous():
        return False
    if weight.format in TABLES:
        return d_in % 2 == 0 and d_in % weight.group == 0
    zeros = weight.zeros
    return weight.format in ("bnb8", "affine") and (zeros is None or zeros.is_contiguous())


def launch(
    weight: Packed,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    parts: int | None = None,
    config: configs.RowNormConfig | None = None,
    operand: torch.dtype | None = None,
) -> torch.Tensor:
    """See :func:`dorafx.ops.quantized.row_norm_quantized`. The operands must be checked, on one CUDA device, not fp64, not empty, and
    of a format that the kernel supports (:func:`serves`).

    Args:
        parts: into how many parts d_in is divided; by default as many as fill the device.
        config: block sizes; by default those of the table.
        operand: the dtype that the factors are multiplied in, where it is narrower than theirs.
    """
    left, right = loadable(left, right, operand)
    device, (d_out, d_in), rank = weight.packed.device, weight.shape, right.shape[0]
    multiplied = operand_type(left.dtype, right.dtype, device.type == "cpu", operand)
    problem = configs.Problem(
        rank,
        operand_bytes=4 if multiplied == tl.float32 else 2,
        factor_bytes=max(left.element_size(), right.element_size()),
        weight_bytes=configs.code_bytes(
            weight.format, weight.scales.element_size(), 0 if weight.zeros is None else weight.zeros.element_size()
        ),
    )
    gpu = configs.gpu(device)
    if config is None:
        config = configs.row_norm_config(problem, gpu)
    row_blocks, parts, part = configs.division(config, problem, gpu, weight.shape, parts=parts)
    out = torch.empty(d_out, dtype=torch.float32, device=device)
    sums = torch.empty(1, parts, d_out, dtype=torch.float32, device=device) if parts > 1 else out.view(1, 1, d_out)
    codes = weight.packed.reshape(-1).view(torch.uint8 if weight.format in TABLES else torch.int8)
    with launched_on(device):
        quantized_row_norm_kernel[(row_blocks, parts)](
            codes,
            weight.scales,
            weight.scales if weight.zeros is None else weight.zeros,
            left,
            right,
            sums,
            scale,
            d_out,
            d_in,
            rank,
            part,
            d_in if weight.format == "bnb8" else weight.group,
            *left.stride(),
            *right.stride(),
            FORMAT=weight.format,
            ZEROS=weight.zeros is not None,
            VALUE=_rounded_to(weight.dtype, device.type == "cpu"),
            **block_constants(config, rank, multiplied),
            num_warps=config.num_warps,
        )
        finish(sums, out)
    return out


def _rounded_to(dtype: torch.dtype, interpreted: bool) -> tl.dtype:
    """The dtype that dequantised values are rounded to. Triton's interpreter truncates to bf16 instead of rounding, so there it is
    fp32."""
    if dtype == torch.bfloat16:
        return tl.float32 if interpreted else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32
