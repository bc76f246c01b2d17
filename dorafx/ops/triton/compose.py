# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""The composition in one pass over its operands, and its gradients in one pass over theirs.

Forward: ``y = g ⊙ (base + s·lora) + bias`` or ``y = result + (g - 1) ⊙ base + g ⊙ s·lora``, and, if g is trained, the sum that
its gradient needs. Backward: each program takes a part of the tokens, writes the gradients of base and lora, and sums those of g and
bias over its tokens; the parts are then added in a fixed order. There are no atomics, so results do not change between runs.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import configs
from .tiles import launched_on


@triton.jit
def _tile(pointer, outer, row, column, stride_o, stride_r, stride_c, tile_rows, tile_columns):
    pointer += outer * stride_o + row * stride_r + column * stride_c
    return pointer + (tile_rows[:, None] * stride_r + tile_columns[None, :] * stride_c)


@triton.jit
def compose_kernel(
    result,
    base,
    lora,
    g,
    bias,
    out,
    total,
    scale,
    rows,
    columns,
    row_blocks,
    column_blocks,
    stride_ro,
    stride_rr,
    stride_rc,
    stride_bo,
    stride_br,
    stride_bc,
    stride_lo,
    stride_lr,
    stride_lc,
    stride_yo,
    stride_yr,
    stride_yc,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    # In 64 bits: there may be more than 2**31 tokens or elements before a tile.
    column = (program % column_blocks).to(tl.int64) * COLUMNS
    block = program // column_blocks
    row = (block % row_blocks).to(tl.int64) * ROWS
    outer = (block // row_blocks).to(tl.int64)
    tile_rows, tile_columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    column_mask = tile_columns < columns - column
    mask = (tile_rows < rows - row)[:, None] & column_mask[None, :]
    if WIDE:
        tile_rows, tile_columns = tile_rows.to(tl.int64), tile_columns.to(tl.int64)
    # Inductor passes scalars in fp64, which would make everything after it fp64.
    scale = tl.full([], scale, tl.float32)
    factor = tl.load(g + column + tile_columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    base_tile = _tile(base, outer, row, column, stride_bo, stride_br, stride_bc, tile_rows, tile_columns)
    x = tl.load(base_tile, mask=mask, other=0.0).to(tl.float32)
    summed = x
    if lora is not None:
        lora_tile = _tile(lora, outer, row, column, stride_lo, stride_lr, stride_lc, tile_rows, tile_columns)
        low_rank = tl.load(lora_tile, mask=mask, other=0.0).to(tl.float32)
        summed = x + low_rank * scale
    offset = outer * stride_yo + row * stride_yr + column * stride_yc
    offsets = tile_rows[:, None] * stride_yr + tile_columns[None, :] * stride_yc
    if total is not None:
        tl.store(total + offset + offsets, summed.to(total.dtype.element_ty), mask=mask)
    if result is not None:
        result_tile = _tile(result, outer, row, column, stride_ro, stride_rr, stride_rc, tile_rows, tile_columns)
        y = tl.load(result_tile, mask=mask, other=0.0).to(tl.float32)
        y += (factor - 1) * x + (factor * scale) * low_rank
    else:
        y = summed * factor
        if bias is not None:
            y += tl.load(bias + column + tile_columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    tl.store(out + offset + offsets, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def compose_backward_kernel(
    grad,
    g,
    total,
    d_base,
    d_lora,
    sums_g,
    sums_bias,
    scale,
    rows,
    columns,
    row_blocks,
    column_blocks,
    blocks,
    part,
    stride_go,
    stride_gr,
    stride_gc,
    stride_to,
    stride_tr,
    stride_tc,
    stride_do,
    stride_dr,
    stride_dc,
    DELTA: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    program = tl.program_id(0)
    column = (program % column_blocks).to(tl.int64) * COLUMNS
    index = program // column_blocks
    tile_rows, tile_columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    column_mask = tile_columns < columns - column
    wide_rows, wide_columns = tile_rows, tile_columns
    if WIDE:
        wide_rows, wide_columns = tile_rows.to(tl.int64), tile_columns.to(tl.int64)
    scale = tl.full([], scale, tl.float32)
    factor = tl.load(g + column + tile_columns, mask=column_mask, other=0.0).to(tl.float32)[None, :]
    base_factor = factor - 1 if DELTA else factor
    d_offsets = wide_rows[:, None] * stride_dr + wide_columns[None, :] * stride_dc
    if sums_g is not None:
        d_g = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if sums_bias is not None:
        d_bias = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    first = index * part
    for block in range(first, tl.minimum(first + part, blocks)):
        row = (block % row_blocks).to(tl.int64) * ROWS
        outer = (block // row_blocks).to(tl.int64)
        mask = (tile_rows < rows - row)[:, None] & column_mask[None, :]
        grad_tile = _tile(grad, outer, row, column, stride_go, stride_gr, stride_gc, wide_rows, wide_columns)
        dy = tl.load(grad_tile, mask=mask, other=0.0).to(tl.float32)
        offset = outer * stride_do + row * stride_dr + column * stride_dc
        if d_base is not None:
            tl.store(d_base + offset + d_offsets, (dy * base_factor).to(d_base.dtype.element_ty), mask=mask)
        if d_lora is not None:
            tl.store(d_lora + offset + d_offsets, (dy * (factor * scale)).to(d_lora.dtype.element_ty), mask=mask)
        if sums_g is not None:
            total_tile = _tile(total, outer, row, column, stride_to, stride_tr, stride_tc, wide_rows, wide_columns)
            d_g += dy * tl.load(total_tile, mask=mask, other=0.0).to(tl.float32)
        if sums_bias is not None:
            d_bias += dy
    sum_offsets = index.to(tl.int64) * columns + column + tile_columns
    if sums_g is not None:
        tl.store(sums_g + sum_offsets, tl.sum(d_g, axis=0).to(sums_g.dtype.element_ty), mask=column_mask)
    if sums_bias is not None:
        tl.store(sums_bias + sum_offsets, tl.sum(d_bias, axis=0).to(sums_bias.dtype.element_ty), mask=column_mask)


@triton.jit
def add_parts_kernel(sums, out, columns, parts, COLUMNS: tl.constexpr):
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = column < columns
    total = tl.zeros([COLUMNS], dtype=tl.float32)
    sums += column
    for _ in range(parts):
        total += tl.load(sums, mask=mask, other=0.0)
        sums += columns
    tl.store(out + column, total.to(out.dtype.element_ty), mask=mask)


def launch_forward(
    result: torch.Tensor | None,
    base: torch.Tensor,
    lora: torch.Tensor | None,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    out: torch.Tensor,
    total: torch.Tensor | None,
) -> None:
    """Write the composition into ``out`` and, where ``total`` is given, ``base + s·lora`` into it.

    Args:
        result, base, lora: ``[.., d_out]`` of one shape, any strides, fp16, bf16 or fp32. With ``result`` it is the delta form,
            which has no bias.
        g, bias: ``[d_out]``.
        out, total: of base's shape, with equal strides; ``out`` may be base or result itself.
    """
    if not _walkable(out):
        y = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        summed = None if total is None else torch.empty_like(y, dtype=total.dtype)
        launch_forward(result, base, lora, g, bias, scale, y, summed)
        out.copy_(y)
        if total is not None and summed is not None:
            total.copy_(summed)
        return
    outer, rows, columns, strides, operands = _planes(out, [result, base, lora])
    config = configs.compose_config(columns, _along_rows(strides[0]), configs.architecture(out.device)).forward
    row_blocks, column_blocks = triton.cdiv(rows, config.rows), triton.cdiv(columns, config.columns)
    with launched_on(out.device):
        compose_kernel[(outer * row_blocks * column_blocks,)](
            *operands,
            g.contiguous(),
            None if bias is None else bias.contiguous(),
            out,
            total,
            float(scale),
            rows,
            columns,
            row_blocks,
            column_blocks,
            *strides[1],
            *strides[2],
            *strides[3],
            *strides[0],
            WIDE=_wide(strides, config),
            ROWS=config.rows,
            COLUMNS=config.columns,
            num_warps=config.num_warps,
        )


def launch_backward(
    grad: torch.Tensor,
    g: torch.Tensor,
    total: torch.Tensor | None,
    scale: float,
    delta: bool,
    d_base: torch.Tensor | None,
    d_lora: torch.Tensor | None,
    d_g: torch.Tensor | None,
    d_bias: torch.Tensor | None,
    parts: int | None = None,
) -> None:
    """Write gradients into those of ``d_base``, ``d_lora``, ``d_g`` and ``d_bias`` that are not None.

    Args:
        grad, total: ``[.., d_out]`` of one shape, any strides; ``total`` is needed for ``d_g`` only.
        d_base, d_lora: of grad's shape, with equal strides.
        d_g, d_bias: ``[d_out]``, contiguous.
        parts: into how many parts the tokens are divided; by default as many as fill the device.
    """
    targets = [t for t in (d_base, d_lora) if t is not None]
    if targets and not _walkable(targets[0]):
        packed = [torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in targets]
        first = packed[0] if d_base is not None else None
        launch_backward(
            grad, g, total, scale, delta, first, packed[-1] if d_lora is not None else None, d_g, d_bias, parts
        )
        for target, source in zip(targets, packed):
            target.copy_(source)
        return
    outer, rows, columns, strides, operands = _planes(targets[0] if targets else None, [grad, total])
    config = configs.compose_config(columns, _along_rows(strides[1]), configs.architecture(grad.device)).backward
    row_blocks, column_blocks = triton.cdiv(rows, config.rows), triton.cdiv(columns, config.columns)
    blocks = outer * row_blocks
    if parts is None:
        # Without d_g and d_bias there are no partial sums, so each block of tokens can be a part.
        programs = configs.PROGRAMS_PER_PROCESSOR * configs.multiprocessors(grad.device)
        parts = blocks if d_g is None and d_bias is None else triton.cdiv(programs, column_blocks)
    part = triton.cdiv(blocks, min(parts, blocks))
    parts = triton.cdiv(blocks, part)
    vectors = [d_g, d_bias]
    sums = [
        vector if vector is None or parts == 1 else torch.empty(parts, columns, dtype=torch.float32, device=grad.device)
        for vector in vectors
    ]
    with launched_on(grad.device):
        compose_backward_kernel[(parts * column_blocks,)](
            operands[0],
            g.contiguous(),
            operands[1],
            d_base,
            d_lora,
            *sums,
            float(scale),
            rows,
            columns,
            row_blocks,
            column_blocks,
            blocks,
            part,
            *strides[1],
            *strides[2],
            *strides[0],
            DELTA=delta,
            WIDE=_wide(strides, config),
            ROWS=config.rows,
            COLUMNS=config.columns,
            num_warps=config.num_warps,
        )
        for partial, vector in zip(sums, vectors):
            if parts > 1 and partial is not None:
                add_parts_kernel[(triton.cdiv(columns, 128),)](
                    partial, vector, columns, parts, COLUMNS=128, num_warps=4
                )


Strides = tuple[int, int, int]


def _planes(
    out: torch.Tensor | None, operands: Sequence[torch.Tensor | None]
) -> tuple[int, int, int, list[Strides], list[torch.Tensor | None]]:
    """Outer size, rows and columns by which all tensors can be traversed; the three strides of each tensor, those of ``out`` first;
    and the operands.

    Leading dimensions are merged into at most two, which a convolution's activations seen with channels last need. An operand for
    which no common split exists is copied.
    """
    reference = next(t for t in (out, *operands) if t is not None)
    lead, columns = reference.shape[:-1], reference.shape[-1]
    present = [t for t in (out, *operands) if t is not None]
    fits = [k for k in range(max(len(lead), 1)) if all(_splits(t, k) for t in present)]
    if fits:
        split, sources = fits[0], list(operands)
    else:
        split = next(k for k in range(len(lead)) if out is None or _splits(out, k))
        sources = [t if t is None or _splits(t, split) else t.contiguous() for t in operands]
    strides = [(0, 0, 0) if t is None else _strides(t, split) for t in (out, *sources)]
    return math.prod(lead[:split]), math.prod(lead[split:]), columns, strides, sources


def _merged_stride(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The stride of several dimensions seen as one; None if they cannot be merged."""
    dims = [(n, stride) for n, stride in zip(shape, strides) if n != 1]
    if any(s != n * inner for (_, s), (n, inner) in itertools.pairwise(dims)):
        return None
    return dims[-1][1] if dims else 0


def _splits(tensor: torch.Tensor, split: int) -> bool:
    shape, strides = tensor.shape[:-1], tensor.stride()[:-1]
    return all(_merged_stride(shape[p], strides[p]) is not None for p in (slice(None, split), slice(split, None)))


def _walkable(tensor: torch.Tensor) -> bool:
    return any(_splits(tensor, k) for k in range(max(tensor.dim() - 1, 1)))


def _strides(tensor: torch.Tensor, split: int) -> Strides:
    shape, strides = tensor.shape[:-1], tensor.stride()
    outer, row = _merged_stride(shape[:split], strides[:split]), _merged_stride(shape[split:], strides[split:-1])
    assert outer is not None and row is not None
    return outer, row, strides[-1]


def _along_rows(strides: Strides) -> bool:
    return strides[1] == 1 != strides[2]


def _wide(strides: Sequence[Strides], config: configs.ComposeConfig) -> bool:
    """Whether an offset within a tile may need more than 31 bits."""
    return any(config.rows * row + config.columns * column >= 2**31 for _, row, column in strides)
