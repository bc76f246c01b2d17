# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""A DoRA linear in one kernel: ``y = g ⊙ (x·Wᵀ + s·h·Bᵀ) + bias`` with ``h = x·Aᵀ``.

Both products accumulate into one fp32 tile, the low-rank one first, so the scaling s needs no second tile; g and bias are the
epilogue. Neither product is ever written to memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import configs
from .tiles import launched_on, operand_type, precision_of


@triton.jit
def _accumulate(
    total,
    left,
    right,
    depth,
    row_mask,
    column_mask,
    rows,
    columns,
    stride_lr,
    stride_ld,
    stride_rc,
    stride_rd,
    WIDE: tl.constexpr,
    DEPTH: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """``total + left · rightᵀ`` over ``depth``."""
    steps = tl.arange(0, DEPTH)
    wide_steps = steps
    advance = tl.full([], DEPTH, tl.int32)
    if WIDE:
        wide_steps, advance = steps.to(tl.int64), advance.to(tl.int64)
    left += rows[:, None] * stride_lr + wide_steps[None, :] * stride_ld
    right += columns[None, :] * stride_rc + wide_steps[:, None] * stride_rd
    for start in tl.range(0, depth, DEPTH, num_stages=STAGES):
        inside = steps < depth - start
        a = tl.load(left, mask=row_mask[:, None] & inside[None, :], other=0.0)
        b = tl.load(right, mask=column_mask[None, :] & inside[:, None], other=0.0)
        total = tl.dot(a.to(OPERAND), b.to(OPERAND), total, input_precision=PRECISION)
        left += advance * stride_ld
        right += advance * stride_rd
    return total


@triton.jit
def dora_linear_kernel(
    x,
    weight,
    h,
    left,
    g,
    bias,
    out,
    total,
    scale,
    tokens,
    d_out,
    d_in,
    rank,
    row_blocks,
    column_blocks,
    stride_xt,
    stride_xi,
    stride_wo,
    stride_wi,
    stride_ht,
    stride_hr,
    stride_lo,
    stride_lr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    # Groups of row blocks, column by column, so that programs that run at the same time share rows of x and of W in the L2 cache.
    in_group = GROUP * column_blocks
    first = program // in_group * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    row = (first + program % in_group % height).to(tl.int64) * ROWS
    column = (program % in_group // height).to(tl.int64) * COLUMNS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row_mask, column_mask = rows < tokens - row, columns < d_out - column
    offsets = rows.to(tl.int64)[:, None] * d_out + columns[None, :]
    if WIDE:
        rows, columns = rows.to(tl.int64), columns.to(tl.int64)
    acc = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    acc = _accumulate(
        acc, h + row * stride_ht, left + column * stride_lo, rank, row_mask, column_mask, rows, columns,
        stride_ht, stride_hr, stride_lo, stride_lr, WIDE, DEPTH, OPERAND, PRECISION, STAGES,
    )  # fmt: skip
    acc *= tl.full([], scale, tl.float32)
    acc = _accumulate(
        acc, x + row * stride_xt, weight + column * stride_wo, d_in, row_mask, column_mask, rows, columns,
        stride_xt, stride_xi, stride_wo, stride_wi, WIDE, DEPTH, OPERAND, PRECISION, STAGES,
    )  # fmt: skip
    mask = row_mask[:, None] & column_mask[None, :]
    offsets += row * d_out + column
    if total is not None:
        tl.store(total + offsets, acc.to(total.dtype.element_ty), mask=mask)
    output_columns = column + columns
    acc *= tl.load(g + output_columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        acc += tl.load(bias + output_columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(out + offsets, acc.to(out.dtype.element_ty), mask=mask)


def launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    h: torch.Tensor,
    left: torch.Tensor,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
    total: torch.Tensor | None,
    config: configs.LinearConfig | None = None,
) -> None:
    """Write the layer's output into ``out`` and, if ``total`` is given, ``x·Wᵀ + s·h·Bᵀ`` into it.

    Args:
        x, weight, h, left: ``[.., d_in]``, ``[d_out, d_in]``, ``[.., r]``, ``[d_out, r]``, of one dtype (fp16, bf16 or
            fp32), any strides.
        g, bias: ``[d_out]``.
        out, total: ``[.., d_out]``, contiguous.
        config: block sizes; by default those of the table.
    """
    x, h = (t.flatten(0, -2) if t.dim() > 1 else t[None] for t in (x, h))
    (tokens, d_in), (d_out, rank) = x.shape, left.shape
    operand = operand_type(x.dtype, weight.dtype, x.device.type == "cpu")
    if config is None:
        width = 4 if operand == tl.float32 else 2
        config = configs.linear_config(width, tokens, configs.architecture(x.device))
    row_blocks, column_blocks = triton.cdiv(tokens, config.rows), triton.cdiv(d_out, config.columns)
    strides = (*x.stride(), *weight.stride(), *h.stride(), *left.stride())
    with launched_on(x.device):
        dora_linear_kernel[(row_blocks * column_blocks,)](
            x,
            weight,
            h,
            left,
            g.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            total,
            float(scale),
            tokens,
            d_out,
            d_in,
            rank,
            row_blocks,
            column_blocks,
            *strides,
            WIDE=max(strides) * (max(config.rows, config.columns) + config.depth) >= 2**31,
            ROWS=config.rows,
            COLUMNS=config.columns,
            DEPTH=config.depth,
            GROUP=8,
            OPERAND=operand,
            PRECISION=precision_of(operand),
            STAGES=config.num_stages,
            num_warps=config.num_warps,
        )
