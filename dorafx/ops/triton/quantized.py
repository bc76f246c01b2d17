# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""The tiled row norm of a quantised weight: codes are dequantised in registers, a tile at a time, and the dense weight is never
in memory. As :mod:`dorafx.ops.triton.row_norm` otherwise, whose kernels finish divided sums.

A tile of 4-bit codes is loaded as half as many bytes; its columns are then in two halves, even ones and odd ones, which the
right factor is loaded in, too: a sum of squares does not depend on the order of columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dorafx.ops.quantized import TABLES, Packed

from . import configs
from .row_norm import finish_kernel, operand_type

__all__ = ["launch", "quantized_row_norm_kernel", "serves"]


@triton.jit
def _nf4(code):
    # Selections by one bit after another: a table would be loads of single values, from memory that the L1 has to hold.
    low0 = tl.where((code & 1) != 0, -0.6961928009986877, -1.0)
    low1 = tl.where((code & 1) != 0, -0.39491748809814453, -0.5250730514526367)
    low2 = tl.where((code & 1) != 0, -0.18477343022823334, -0.28444138169288635)
    low3 = tl.where((code & 1) != 0, 0.0, -0.09105003625154495)
    high0 = tl.where((code & 1) != 0, 0.16093020141124725, 0.07958029955625534)
    high1 = tl.where((code & 1) != 0, 0.33791524171829224, 0.24611230194568634)
    high2 = tl.where((code & 1) != 0, 0.5626170039176941, 0.44070982933044434)
    high3 = tl.where((code & 1) != 0, 1.0, 0.7229568362236023)
    low = tl.where((code & 4) != 0, tl.where((code & 2) != 0, low3, low2), tl.where((code & 2) != 0, low1, low0))
    high = tl.where((code & 4) != 0, tl.where((code & 2) != 0, high3, high2), tl.where((code & 2) != 0, high1, high0))
    return tl.where((code & 8) != 0, high, low)


@triton.jit
def _fp4(code):
    low = tl.where(
        (code & 2) != 0,
        tl.where((code & 1) != 0, 1.0, 0.6666666865348816),
        tl.where((code & 1) != 0, 0.0052083334885537624, 0.0),
    )
    high = tl.where(
        (code & 2) != 0,
        tl.where((code & 1) != 0, 0.25, 0.1666666716337204),
        tl.where((code & 1) != 0, 0.5, 0.3333333432674408),
    )
    size = tl.where((code & 4) != 0, high, low)
    return tl.where((code & 8) != 0, -size, size)


@triton.jit
def _delta(
    left, right, row_mask, column_mask, rank, left_offsets, right_offsets, stride_lr, stride_rr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    depth = tl.arange(0, DEPTH)
    delta = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    a_pointers, b_pointers = left + left_offsets, right + right_offsets
    for k in tl.range(0, rank, DEPTH, num_stages=STAGES):
        a = tl.load(a_pointers, mask=row_mask & (depth[None, :] < rank - k), other=0.0)
        b = tl.load(b_pointers, mask=column_mask & (depth[:, None] < rank - k), other=0.0)
        delta = tl.dot(a.to(OPERAND), b.to(OPERAND), delta, input_precision=PRECISION)
        a_pointers += DEPTH * stride_lr
        b_pointers += DEPTH * stride_rr
    return delta


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
    WEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SPLIT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    # COLUMNS are those of one product: of a 4-bit weight, bytes, each of which has two.
    WIDTH: tl.constexpr = 2 if FORMAT == "nf4" or FORMAT == "fp4" else 1
    row = tl.program_id(0) * ROWS
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, d_in)
    tile_rows, tile_columns, depth = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    row_mask = tile_rows[:, None] < d_out - row
    left += row.to(tl.int64) * stride_lo
    right += first.to(tl.int64) * stride_ri
    packed += row.to(tl.int64) * (d_in // WIDTH) + first // WIDTH
    groups = d_in // group
    scales += row.to(tl.int64) * groups
    zeros += row.to(tl.int64) * groups
    left_offsets = tile_rows[:, None] * stride_lo + depth[None, :] * stride_lr
    right_offsets = depth[:, None] * stride_rr + tile_columns[None, :] * (WIDTH * stride_ri)
    packed_offsets = tile_rows[:, None] * (d_in // WIDTH) + tile_columns[None, :]
    total = tl.zeros([ROWS], dtype=tl.float32)
    for start in tl.range(first, last, WIDTH * COLUMNS, num_stages=1):
        # d_in of a 4-bit weight is even, so that both halves of a byte lie within a row, and in one group.
        column_mask = tile_columns[None, :] * WIDTH < last - start
        mask = row_mask & column_mask
        codes = tl.load(packed + packed_offsets, mask=mask, other=0)
        of_group = tile_rows[:, None] * groups + (start + tile_columns[None, :] * WIDTH) // group
        factor = tl.load(scales + of_group, mask=mask, other=0.0)
        if WIDTH == 2:
            whole = codes.to(tl.int32)
            delta = _delta(
                left, right, row_mask, column_mask, rank, left_offsets, right_offsets, stride_lr, stride_rr,
                ROWS, COLUMNS, DEPTH, OPERAND, PRECISION, STAGES,
            )  # fmt: skip
            even = _nf4(whole >> 4) if FORMAT == "nf4" else _fp4(whole >> 4)
            value = (even * factor).to(WEIGHT).to(tl.float32) + delta * scale
            total += tl.sum(tl.where(mask, value * value, 0.0), axis=1)
            right_odd = right + stride_ri
            delta = _delta(
                left, right_odd, row_mask, column_mask, rank, left_offsets, right_offsets, stride_lr, stride_rr,
                ROWS, COLUMNS, DEPTH, OPERAND, PRECISION, STAGES,
            )  # fmt: skip
            odd = _nf4(whole & 15) if FORMAT == "nf4" else _fp4(whole & 15)
            value = (odd * factor).to(WEIGHT).to(tl.float32) + delta * scale
            total += tl.sum(tl.where(mask, value * value, 0.0), axis=1)
        else:
            if FORMAT == "bnb8":
                value = codes.to(tl.float32) * factor.to(tl.float32) * 7.874015718698502e-3
            else:
                # Differences of 8-bit integers are exact in every dtype of weights, so only the product is rounded.
                value = codes.to(tl.float32)
                if ZEROS:
                    value -= tl.load(zeros + of_group, mask=mask, other=0).to(tl.float32)
                value *= factor.to(tl.float32)
            delta = _delta(
                left, right, row_mask, column_mask, rank, left_offsets, right_offsets, stride_lr, stride_rr,
                ROWS, COLUMNS, DEPTH, OPERAND, PRECISION, STAGES,
            )  # fmt: skip
            value = value.to(WEIGHT).to(tl.float32) + delta * scale
            total += tl.sum(tl.where(mask, value * value, 0.0), axis=1)
        packed += COLUMNS
        right += WIDTH * COLUMNS * stride_ri
    if not SPLIT:
        total = tl.sqrt_rn(total)
    rows = row + tile_rows
    tl.store(out + tl.program_id(1) * d_out + rows, total, mask=rows < d_out)


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
) -> torch.Tensor:
    """See :func:`dorafx.ops.quantized.row_norm_quantized`; operands on one CUDA device, checked, not fp64, not empty, of a format
    that the kernel :func:`serves`.

    Args:
        parts: into how many parts d_in is divided; by default as many as fill the device.
        config: block sizes; by default those of the table.
    """
    (d_out, d_in), rank = weight.shape, right.shape[0]
    device = weight.packed.device
    operand = operand_type(left.dtype, right.dtype, device.type == "cpu")
    if config is None:
        config = configs.quantized_config(4 if operand == tl.float32 else 2, rank)
    width = 2 if weight.format in TABLES else 1
    columns = config.columns * width
    row_blocks, column_blocks = triton.cdiv(d_out, config.rows), triton.cdiv(d_in, columns)
    if parts is None:
        parts = configs.splits(row_blocks, column_blocks, configs.multiprocessors(device))
    part = triton.cdiv(column_blocks, parts) * columns
    parts = triton.cdiv(d_in, part)
    out = torch.empty(d_out, dtype=torch.float32, device=device)
    sums = torch.empty(parts, d_out, dtype=torch.float32, device=device) if parts > 1 else out
    codes = weight.packed.reshape(-1).view(torch.uint8 if weight.format in TABLES else torch.int8)
    with torch.accelerator.device_index(device.index if device.type == "cuda" else None):
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
            WEIGHT=_rounded_to(weight.dtype, device.type == "cpu"),
            ROWS=config.rows,
            COLUMNS=config.columns,
            DEPTH=config.depth,
            SPLIT=parts > 1,
            OPERAND=operand,
            PRECISION="tf32x3" if operand == tl.float32 else "tf32",
            STAGES=config.num_stages,
            num_warps=config.num_warps,
        )
        if parts > 1:
            finish_kernel[(triton.cdiv(d_out, 256), 1)](sums, out, d_out, parts, ROWS=256, num_warps=4)
    return out


def _rounded_to(dtype: torch.dtype, interpreted: bool) -> tl.dtype:
    """What dequantised values are rounded to. Triton's interpreter cuts bf16 off instead of rounding, so that there they keep
    their fp32."""
    if dtype == torch.bfloat16:
        return tl.float32 if interpreted else tl.bfloat16
    return tl.float16 if dtype == torch.float16 else tl.float32
