# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""The tiled row norm on tensor cores: ``W + s·L·R`` is formed tile by tile in registers, squared and summed.

There is one pass over W. A program takes a block of rows and a part of d_in. If the blocks of rows alone do not fill the device, d_in
is divided too; the partial sums are then added in a fixed order, so results do not change between runs. Squares are added column by
column, where the tensor cores left the values, and summed along the row only once, at the end: no tile is moved for its sum.

Quantised weights (:mod:`dorafx.ops.triton.quantized`) use the same loop. One kernel serves a single norm and several: a launch always
takes the addresses of ``GROUP`` norms as arguments. So while a CUDA graph is captured the same kernel runs as in the calls before, and
the graph stores the addresses itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import configs
from .codes import dequantized
from .tiles import (
    block_constants,
    chunks,
    converted,
    finish,
    launched_on,
    operand_type,
    resident_product,
    store_norms,
    streamed_product,
)

Norm = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Guard(NamedTuple):
    """What decides, on the device, which norms of a group are computed.

    Attributes:
        changed: an int32 for each norm, not zero where it is to be computed.
        out: ``[norms, d_out]`` fp32, which holds the norms of before, and is overwritten where they are computed.
    """

    changed: torch.Tensor
    out: torch.Tensor


GROUP = 8
"""The most norms of a launch. Their addresses are arguments of the kernel, and the host takes longer for more arguments."""


@triton.jit
def norm_of_rows(
    weight, left, right, scales, zeros, out, scale, d_out, d_in, rank, part, group,
    stride_wo, stride_wi, stride_lo, stride_lr, stride_rr, stride_ri,
    FORMAT: tl.constexpr, ZEROS: tl.constexpr, VALUE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, CHUNKS: tl.constexpr,
    OPERAND: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The norms of a block of rows of one matrix; if d_in is divided, their sums of squares over a part of it.

    Args:
        weight: pointer to values, or to the codes of a quantised weight, whose rows have ``d_in`` or half as many bytes.
        scales, zeros, group: for a quantised weight, see :func:`dequantized`.
        out: pointer to the norms, or to a row for each part.
        FORMAT: of codes, or "dense".
        CHUNKS: chunks of the rank in which ``left`` is resident; 0 streams both factors.
        STAGES: tiles in flight that the compiler pipelines. With 1 and a resident ``left``, the next tile of ``right`` is kept in
            registers while this one is multiplied, which needs half the shared memory.
    """
    row = tl.program_id(0) * ROWS
    first = tl.program_id(1) * part
    last = tl.minimum(first + part, d_in)
    tile_rows, tile_columns, depth = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    row_mask = tile_rows[:, None] < d_out - row
    # Scalar offsets have 64 bits: an embedding of 256k x 16k has more than 2**31 elements. Offsets within a tile have 32 bits: there
    # is one for each element of the tile, and they are in registers.
    WIDTH: tl.constexpr = 2 if FORMAT == "nf4" or FORMAT == "fp4" else 1
    weight += row.to(tl.int64) * stride_wo + (first // WIDTH).to(tl.int64) * stride_wi
    left += row.to(tl.int64) * stride_lo
    right += first.to(tl.int64) * stride_ri
    weight_offsets = tile_rows[:, None] * stride_wo + tile_columns[None, :] * stride_wi
    left_offsets = tile_rows[:, None] * stride_lo + depth[None, :] * stride_lr
    right_offsets = depth[:, None] * stride_rr + tile_columns[None, :] * stride_ri
    groups = 0
    if FORMAT != "dense":
        groups = d_in // group
        scales += row.to(tl.int64) * groups
        zeros += row.to(tl.int64) * groups
    squares = tl.zeros([ROWS, COLUMNS], dtype=tl.float32)
    if CHUNKS > 0:
        lefts = chunks(left, left_offsets, row_mask, depth[None, :], rank, stride_lr, DEPTH, CHUNKS)
        lefts = converted(lefts, OPERAND, CHUNKS)
    AHEAD: tl.constexpr = CHUNKS > 0 and STAGES == 1
    if AHEAD:
        inside = tile_columns[None, :] < last - first
        rights = chunks(right, right_offsets, inside, depth[:, None], rank, stride_rr, DEPTH, CHUNKS)
    for start in tl.range(first, last, COLUMNS, num_stages=STAGES if CHUNKS > 0 else 1):
        column_mask = tile_columns[None, :] < last - start
        # Loaded before the product, which hides the latency of the load.
        if FORMAT == "dense":
            block = tl.load(weight + weight_offsets, mask=row_mask & column_mask, other=0.0)
        else:
            block = dequantized(
                weight, scales, zeros, row_mask, tile_rows, start, last, groups, group, stride_wo,
                COLUMNS, FORMAT, ZEROS, VALUE,
            )  # fmt: skip
        weight += COLUMNS // WIDTH * stride_wi
        if AHEAD:
            right += COLUMNS * stride_ri
            inside = tile_columns[None, :] < last - start - COLUMNS
            following = chunks(right, right_offsets, inside, depth[:, None], rank, stride_rr, DEPTH, CHUNKS)
            delta = resident_product(lefts, rights, ROWS, COLUMNS, CHUNKS, OPERAND, PRECISION)
            rights = following
        elif CHUNKS > 0:
            rights = chunks(right, right_offsets, column_mask, depth[:, None], rank, stride_rr, DEPTH, CHUNKS)
            delta = resident_product(lefts, rights, ROWS, COLUMNS, CHUNKS, OPERAND, PRECISION)
            right += COLUMNS * stride_ri
        else:
            delta = streamed_product(
                left, right, left_offsets, right_offsets, row_mask, column_mask, rank, stride_lr, stride_rr,
                ROWS, COLUMNS, DEPTH, OPERAND, PRECISION, STAGES,
            )  # fmt: skip
            right += COLUMNS * stride_ri
        value = block.to(tl.float32) + delta * scale
        squares += value * value
    store_norms(squares, out + tl.program_id(1).to(tl.int64) * d_out, row, d_out, ROWS)


@triton.jit
def _addressed(addresses, operand: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """The pointer to an operand (0: weight, 1: left, 2: right) of the norm that this program is for."""
    address = addresses[operand]
    for i in tl.static_range(1, GROUP):
        address = tl.where(tl.program_id(2) == i, addresses[3 * i + operand], address)
    pointer = address.to(tl.pointer_type(DTYPE))
    # Triton knows the alignment of pointers, but not of addresses in integers; without the hint loads are not vectorised.
    return tl.multiple_of(pointer, 16) if ALIGNED else pointer


@triton.jit
def row_norm_kernel(
    addresses,
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
    changed,
    GROUP: tl.constexpr,
    WEIGHT: tl.constexpr,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHUNKS: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    if changed is not None:  # a flag for each norm: without it the norm is left as it is
        if tl.load(changed + tl.program_id(2)) == 0:
            return
    weight = _addressed(addresses, 0, GROUP, WEIGHT, ALIGNED)
    left = _addressed(addresses, 1, GROUP, LEFT, ALIGNED)
    right = _addressed(addresses, 2, GROUP, RIGHT, ALIGNED)
    out += (tl.program_id(2) * tl.num_programs(1)).to(tl.int64) * d_out
    norm_of_rows(
        weight, left, right, weight, weight, out, scale, d_out, d_in, rank, part, 1,
        stride_wo, stride_wi, stride_lo, stride_lr, stride_rr, stride_ri,
        "dense", False, WEIGHT, ROWS, COLUMNS, DEPTH, CHUNKS, OPERAND, PRECISION, STAGES,
    )  # fmt: skip


def launch(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    parts: int | None = None,
    config: configs.RowNormConfig | None = None,
    operand: torch.dtype | None = None,
) -> torch.Tensor:
    """See :func:`dorafx.ops.norm.row_norm`. The operands must be checked, on one CUDA device, not fp64 and not empty.

    Args:
        parts: into how many parts d_in is divided; by default as many as fill the device.
        config: block sizes; by default those of the table.
        operand: the dtype that the factors are multiplied in, where it is narrower than theirs.
    """
    return launch_group([(weight, left, right)], scale, parts, config, operand)[0]


def launch_group(
    norms: Sequence[Norm],
    scale: float,
    parts: int | None = None,
    config: configs.RowNormConfig | None = None,
    operand: torch.dtype | None = None,
    guard: Guard | None = None,
) -> list[torch.Tensor]:
    """Norms of ``(weight, left, right)`` that agree in shapes, dtypes, strides and alignment: ``GROUP`` norms a launch, and one more
    launch if d_in is divided. Otherwise as :func:`launch`.

    Args:
        guard: to compute only those that have changed, into given memory; views of that are returned.
    """
    norms = [(weight, *loadable(left, right, operand)) for weight, left, right in norms]
    weight, left, right = norms[0]
    device, (d_out, d_in), rank = weight.device, weight.shape, right.shape[0]
    multiplied = operand_type(left.dtype, right.dtype, device.type == "cpu", operand)
    problem = configs.Problem(
        rank,
        operand_bytes=4 if multiplied == tl.float32 else 2,
        factor_bytes=max(left.element_size(), right.element_size()),
        weight_bytes=weight.element_size(),
        scattered=not _side_by_side(weight),
    )
    gpu = configs.gpu(device)
    if config is None:
        config = configs.row_norm_config(problem, gpu)
    row_blocks, parts, part = configs.division(config, problem, gpu, weight.shape, min(len(norms), GROUP), parts)
    if guard is not None:
        out = guard.out
    else:
        out = torch.empty((len(norms), d_out) if len(norms) > 1 else d_out, dtype=torch.float32, device=device)
    sums = (
        torch.empty(len(norms), parts, d_out, dtype=torch.float32, device=device)
        if parts > 1
        else out.view(-1, 1, d_out)
    )
    sizes = (scale, d_out, d_in, rank, part, *weight.stride(), *left.stride(), *right.stride())
    constants = {
        "GROUP": GROUP,
        "WEIGHT": _TYPES[weight.dtype],
        "LEFT": _TYPES[left.dtype],
        "RIGHT": _TYPES[right.dtype],
        "ALIGNED": not any(t.data_ptr() % 16 for operands in norms for t in operands),
        **block_constants(config, rank, multiplied),
        "num_warps": config.num_warps,
    }
    with launched_on(device):
        for start in range(0, len(norms), GROUP):
            some = norms[start : start + GROUP]
            addresses = [t.data_ptr() for operands in some for t in operands]
            addresses += addresses[:3] * (GROUP - len(some))
            changed = None if guard is None else guard.changed[start:]
            row_norm_kernel[(row_blocks, parts, len(some))](
                tuple(addresses), sums[start:], *sizes, changed, **constants
            )
        finish(sums, out, None if guard is None else guard.changed)
    if guard is not None:
        return list(out.view(len(norms), d_out))
    # Copies, because results of an operator must not share memory, and one that is kept would keep the others alive.
    return [row.clone() for row in out] if len(norms) > 1 else [out]


def loadable(left: torch.Tensor, right: torch.Tensor, operand: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors in the form in which the kernel reads them: converted above :data:`configs.WIDEST_CONVERTED_RANK`, and copied if no
    dimension is contiguous. A copy pays off, because every block of rows reads all of ``right``."""
    if operand in (torch.bfloat16, torch.float16) and right.shape[0] > configs.WIDEST_CONVERTED_RANK:
        left, right = left.to(operand), right.to(operand)
    left, right = (t if _side_by_side(t) else t.contiguous() for t in (left, right))
    return left, right


def _side_by_side(matrix: torch.Tensor) -> bool:
    """Whether one of its dimensions is contiguous in memory."""
    return 1 in matrix.stride()


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
