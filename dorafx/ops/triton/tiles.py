# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""What the row norms of dense and of quantised weights share: tiles of factors, their product, and the end of a sum of squares.

A tile of ``L·R`` is computed in one of two ways. If a whole block of rows of ``left`` fits into shared memory beside the other tiles,
it stays there in chunks of ``DEPTH`` along the rank (:func:`chunks`, :func:`resident_product`). Otherwise both factors are streamed
along the rank for each tile (:func:`streamed_product`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .configs import RowNormConfig


@triton.jit
def chunks(pointers, offsets, mask, depth, rank, stride, DEPTH: tl.constexpr, CHUNKS: tl.constexpr):
    """``CHUNKS`` tiles of a factor as a tuple, each ``DEPTH`` further along the rank; zero past the rank and outside ``mask``."""
    tiles = ()
    for k in tl.static_range(CHUNKS):
        start = pointers + tl.full([], k * DEPTH, tl.int64) * stride
        tiles += (tl.load(start + offsets, mask=mask & (depth < rank - k * DEPTH), other=0.0),)  # type: ignore[assignment]
    return tiles


@triton.jit
def converted(tiles, OPERAND: tl.constexpr, CHUNKS: tl.constexpr):
    results = ()
    for k in tl.static_range(CHUNKS):
        results += (tiles[k].to(OPERAND),)  # type: ignore[assignment]
    return results


@triton.jit
def resident_product(
    lefts, rights,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNKS: tl.constexpr, OPERAND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    delta = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    for k in tl.static_range(CHUNKS):
        delta = tl.dot(lefts[k], rights[k].to(OPERAND), delta, input_precision=PRECISION)
    return delta


@triton.jit
def streamed_product(
    left, right, left_offsets, right_offsets, row_mask, column_mask, rank, stride_lr, stride_rr,
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
def store_norms(squares, out, row, d_out, ROWS: tl.constexpr):
    """Store the sums of ``squares`` by row; if d_in is not divided, their roots."""
    total = tl.sum(squares, axis=1)
    if tl.num_programs(1) == 1:
        total = tl.sqrt_rn(total)
    rows = row + tl.arange(0, ROWS)
    tl.store(out + rows, total, mask=rows < d_out)


@triton.jit(do_not_specialize=["d_out", "parts"])
def finish_kernel(partial, out, changed, d_out, parts, ROWS: tl.constexpr):
    """The roots of the sums over all parts, which are added in a fixed order; of those norms that have changed, if there are flags."""
    index = tl.program_id(1).to(tl.int64)
    if changed is not None:
        if tl.load(changed + index) == 0:
            return
    partial += index * parts * d_out
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    mask = rows < d_out
    total = tl.zeros([ROWS], dtype=tl.float32)
    for part in range(parts):
        total += tl.load(partial + part * d_out + rows, mask=mask, other=0.0)
    tl.store(out + index * d_out + rows, tl.sqrt_rn(total), mask=mask)


def finish(sums: torch.Tensor, out: torch.Tensor, changed: torch.Tensor | None = None) -> None:
    """Launch :func:`finish_kernel` for the sums ``[norms, parts, d_out]``, if there are several parts.

    The first call on a device launches it in any case, which loads the kernel. The number of parts depends on how many norms are
    computed at once, so the first launch could otherwise come while a CUDA graph is captured, where nothing may be loaded."""
    norms, parts, d_out = sums.shape
    if parts > 1 or sums.device not in _FINISHES:
        _FINISHES.add(sums.device)
        grid = (triton.cdiv(d_out, 256), norms) if parts > 1 else (1, 1)
        finish_kernel[grid](sums, out, changed, d_out if parts > 1 else 0, parts, ROWS=256, num_warps=4)


_FINISHES: set[torch.device] = set()


def launched_on(device: torch.device) -> Any:
    """A context in which kernels are launched on a device."""
    return torch.accelerator.device_index(device.index if device.type == "cuda" else None)


def operand_type(
    left: torch.dtype, right: torch.dtype, interpreted: bool = False, requested: torch.dtype | None = None
) -> tl.dtype:
    """What the product's operands are cast to: the requested dtype, or their own half precision where they share it, else fp32.
    Triton's interpreter multiplies bf16 wrongly, so there everything is fp32, which holds the same values."""
    if requested in (torch.bfloat16, torch.float16):
        left = right = requested
    if left == right == torch.bfloat16 and not interpreted:
        return tl.bfloat16
    return tl.float16 if left == right == torch.float16 and not interpreted else tl.float32


def block_constants(config: RowNormConfig, rank: int, operand: tl.dtype) -> dict[str, Any]:
    """What a row norm's kernel is specialised by for its tiles, and for the dtype of the product's operands."""
    return {
        "ROWS": config.rows,
        "COLUMNS": config.columns,
        "DEPTH": config.depth,
        "CHUNKS": config.chunks(rank),
        "OPERAND": operand,
        "PRECISION": precision_of(operand),
        "STAGES": config.num_stages,
    }


def precision_of(operand: tl.dtype) -> str:
    """How tensor cores multiply: fp32 as three products of tf32; narrower operands are multiplied as they are."""
    return "tf32x3" if operand == tl.float32 else "tf32"
