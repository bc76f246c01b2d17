# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""The tiled row norm on tensor cores: ``W + s·L·R`` is formed tile by tile in registers, squared and summed.

One pass over W. A program owns a block of rows and a part of d_in. Where the blocks of rows do not fill the device, d_in
is divided too; the partial sums are then added in a fixed order, so results do not change between runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import configs

__all__ = ["finish_kernel", "grouped_row_norm_kernel", "launch", "launch_group", "row_norm_kernel"]


@triton.jit
def _squares_of_rows(
    weight,
    left,
    right,
    scale,
    d_out,
    d_in,
    rank,
    part,
    stride_wo,
    stride_wi,
    stride_lo,
    stride_lr,
    stride_rr,
    stride_ri,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SINGLE: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    row = tl.program_id(0) * ROWS
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, d_in)
    tile_rows, tile_columns, depth = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    row_mask = tile_rows[:, None] < d_out - row
    # Scalars have 64 bits, since an embedding of 256k x 16k has more than 2**31 elements; offsets within a tile have 32,
    # since there are as many as a tile has elements, and they live in registers.
    weight += row.to(tl.int64) * stride_wo + first.to(tl.int64) * stride_wi
    left += row.to(tl.int64) * stride_lo
    right += first.to(tl.int64) * stride_ri
    weight_offsets = tile_rows[:, None] * stride_wo + tile_columns[None, :] * stride_wi
    left_offsets = tile_rows[:, None] * stride_lo + depth[None, :] * stride_lr
    right_offsets = depth[:, None] * stride_rr + tile_columns[None, :] * stride_ri
    total = tl.zeros([ROWS], dtype=tl.float32)
    if SINGLE:
        side = tl.load(left + left_offsets, mask=row_mask & (depth[None, :] < rank), other=0.0).to(OPERAND)
    for start in tl.range(first, last, COLUMNS, num_stages=STAGES if SINGLE else 1):
        column_mask = tile_columns[None, :] < last - start
        if SINGLE:
            other = tl.load(right + right_offsets, mask=column_mask & (depth[:, None] < rank), other=0.0)
            delta = tl.dot(side, other.to(OPERAND), input_precision=PRECISION)
        else:
            delta = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
            a_pointers, b_pointers = left + left_offsets, right + right_offsets
            for k in tl.range(0, rank, DEPTH, num_stages=STAGES):
                a = tl.load(a_pointers, mask=row_mask & (depth[None, :] < rank - k), other=0.0)
                b = tl.load(b_pointers, mask=column_mask & (depth[:, None] < rank - k), other=0.0)
                delta = tl.dot(a.to(OPERAND), b.to(OPERAND), delta, input_precision=PRECISION)
                a_pointers += DEPTH * stride_lr
                b_pointers += DEPTH * stride_rr
        block = tl.load(weight + weight_offsets, mask=row_mask & column_mask, other=0.0)
        value = block.to(tl.float32) + delta * scale
        total += tl.sum(value * value, axis=1)
        weight += COLUMNS * stride_wi
        right += COLUMNS * stride_ri
    return total


@triton.jit
def row_norm_kernel(
    weight,
    left,
    right,
    out,
    scale,
    d_out,
    d_in,
    rank,
    part,
    stride_wo,
    stride_wi,
    stride_lo,
    stride_lr,
    stride_rr,
    stride_ri,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SINGLE: tl.constexpr,
    SPLIT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    total = _squares_of_rows(
        weight, left, right, scale, d_out, d_in, rank, part,
        stride_wo, stride_wi, stride_lo, stride_lr, stride_rr, stride_ri,
        ROWS, COLUMNS, DEPTH, SINGLE, OPERAND, PRECISION, STAGES,
    )  # fmt: skip
    if not SPLIT:
        total = tl.sqrt_rn(total)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tl.store(out + tl.program_id(1) * d_out + rows, total, mask=rows < d_out)


@triton.jit
def grouped_row_norm_kernel(
    pointers,
    out,
    scale,
    d_out,
    d_in,
    rank,
    part,
    stride_wo,
    stride_wi,
    stride_lo,
    stride_lr,
    stride_rr,
    stride_ri,
    WEIGHT: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    SINGLE: tl.constexpr,
    SPLIT: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    index = tl.program_id(2)
    weight = tl.load(pointers + 3 * index).to(tl.pointer_type(WEIGHT))
    left = tl.load(pointers + 3 * index + 1).to(tl.pointer_type(LEFT))
    right = tl.load(pointers + 3 * index + 2).to(tl.pointer_type(RIGHT))
    if ALIGNED:
        # What the launcher tells of arguments, it cannot tell of addresses in memory: without it loads are not vectors.
        weight, left, right = tl.multiple_of(weight, 16), tl.multiple_of(left, 16), tl.multiple_of(right, 16)
    total = _squares_of_rows(
        weight, left, right, scale, d_out, d_in, rank, part,
        stride_wo, stride_wi, stride_lo, stride_lr, stride_rr, stride_ri,
        ROWS, COLUMNS, DEPTH, SINGLE, OPERAND, PRECISION, STAGES,
    )  # fmt: skip
    if not SPLIT:
        total = tl.sqrt_rn(total)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out += (index * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * d_out
    tl.store(out + rows, total, mask=rows < d_out)


@triton.jit
def finish_kernel(partial, out, d_out, parts, ROWS: tl.constexpr):
    index = tl.program_id(1).to(tl.int64)
    partial += index * parts * d_out
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < d_out
    total = tl.zeros([ROWS], dtype=tl.float32)
    for part in range(parts):
        total += tl.load(partial + part * d_out + rows, mask=mask, other=0.0)
    tl.store(out + index * d_out + rows, tl.sqrt_rn(total), mask=mask)


def operand_type(left: torch.dtype, right: torch.dtype, interpreted: bool = False) -> tl.dtype:
    """What the product's operands are cast to: their own half precision where they share it, else fp32. Triton's
    interpreter multiplies bf16 wrongly, so there everything is fp32, which holds the same values."""
    if left == right == torch.bfloat16 and not interpreted:
        return tl.bfloat16
    return tl.float16 if left == right == torch.float16 and not interpreted else tl.float32


def launch(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    parts: int | None = None,
    config: configs.RowNormConfig | None = None,
) -> torch.Tensor:
    """See :func:`dorafx.ops.norm.row_norm`; operands on one CUDA device, checked, not fp64, not empty.

    Args:
        parts: into how many parts d_in is divided; by default as many as fill the device.
        config: block sizes; by default those of the table.
    """
    return launch_group([(weight, left, right)], scale, parts, config)[0]


def launch_group(
    norms: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    scale: float,
    parts: int | None = None,
    config: configs.RowNormConfig | None = None,
) -> list[torch.Tensor]:
    """Norms of ``(weight, left, right)`` that agree in shapes, dtypes, strides and alignment, in one launch (two where d_in
    is divided). Otherwise as :func:`launch`."""
    weight, left, right = norms[0]
    (d_out, d_in), rank = weight.shape, right.shape[0]
    operand = operand_type(left.dtype, right.dtype, weight.device.type == "cpu")
    if config is None:
        width = 4 if operand == tl.float32 else 2
        config = configs.row_norm_config(width, rank, configs.architecture(weight.device))
    row_blocks, column_blocks = triton.cdiv(d_out, config.rows), triton.cdiv(d_in, config.columns)
    if parts is None:
        processors = configs.multiprocessors(weight.device)
        parts = configs.splits(row_blocks * len(norms), column_blocks, processors)
    part = triton.cdiv(column_blocks, parts) * config.columns
    parts = triton.cdiv(d_in, part)
    out = torch.empty((len(norms), d_out) if len(norms) > 1 else d_out, dtype=torch.float32, device=weight.device)
    sums = torch.empty(len(norms), parts, d_out, dtype=torch.float32, device=weight.device) if parts > 1 else out
    sizes = (scale, d_out, d_in, rank, part, *weight.stride(), *left.stride(), *right.stride())
    constants = {
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "DEPTH": config.depth,
        "SINGLE": config.single,
        "SPLIT": parts > 1,
        "OPERAND": operand,
        "PRECISION": "tf32x3" if operand == tl.float32 else "tf32",
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }
    with torch.accelerator.device_index(weight.device.index if weight.device.type == "cuda" else None):
        if len(norms) == 1:
            row_norm_kernel[(row_blocks, parts)](weight, left, right, sums, *sizes, **constants)
        else:
            addresses = [t.data_ptr() for operands in norms for t in operands]
            grouped_row_norm_kernel[(row_blocks, parts, len(norms))](
                torch.tensor(addresses, dtype=torch.int64).to(weight.device, non_blocking=True),
                sums,
                *sizes,
                WEIGHT=_TYPES[weight.dtype],
                LEFT=_TYPES[left.dtype],
                RIGHT=_TYPES[right.dtype],
                ALIGNED=not any(address % 16 for address in addresses),
                **constants,
            )
        if parts > 1:
            finish_kernel[(triton.cdiv(d_out, 256), len(norms))](sums, out, d_out, parts, ROWS=256, num_warps=4)
    # Copies: results of an operator share no memory, and one that is kept does not keep the others.
    return [row.clone() for row in out] if len(norms) > 1 else [out]


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
