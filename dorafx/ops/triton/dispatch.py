"""The row norm on CUDA tensors: the Triton kernel where there is one for the dtypes, ATen calls over blocks elsewhere."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from dorafx.ops import norm

__all__ = ["available", "being_captured", "row_norm", "row_norms", "takes"]


def being_captured() -> bool:
    """Whether a CUDA graph is recording what this thread launches."""
    return bool(torch.cuda.is_initialized()) and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


@functools.cache
def available() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the kernel serves these operands: it accumulates in fp32, and a launch needs at least one element."""
    return available() and all(t.dtype != torch.float64 and t.numel() > 0 for t in tensors)


def row_norm(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, algorithm: str = "auto"
) -> torch.Tensor:
    """See :func:`dorafx.ops.norm.row_norm`."""
    norm.check_operands(weight, left, right)
    if algorithm not in ("auto", "tiled") or not takes(weight, left, right):
        return norm.row_norm(weight, left, right, scale, algorithm)
    return _launched([(weight, left, right)], scale)[0]


def row_norms(
    weights: Sequence[torch.Tensor],
    lefts: Sequence[torch.Tensor],
    rights: Sequence[torch.Tensor],
    scales: Sequence[float],
    algorithm: str,
    squares: Sequence[torch.Tensor | None],
) -> list[torch.Tensor]:
    """See :func:`dorafx.ops.norm.row_norms`; what has one shape, dtypes and strides takes one launch."""
    norm.check_lists(weights, lefts, rights, scales, squares)
    operands = list(zip(weights, lefts, rights))
    for group in operands:
        norm.check_operands(*group)
    if algorithm not in ("auto", "tiled") or not available():
        return norm.row_norms(weights, lefts, rights, scales, algorithm, squares)
    groups: dict[Any, list[int]] = {}
    for i, tensors in enumerate(operands):
        groups.setdefault(group_key(tensors, scales[i]), []).append(i)
    norms: list[Any] = [None] * len(operands)
    for members in groups.values():
        if takes(*operands[members[0]]):
            found = _launched([operands[i] for i in members], scales[members[0]])
        else:
            found = [norm.row_norm(*operands[i], scales[i], algorithm) for i in members]
        for i, value in zip(members, found):
            norms[i] = value
    return norms


def _launched(group: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], scale: float) -> list[torch.Tensor]:
    """The norms of one :func:`group_key`, in one launch; one after the other where memory runs out, and while a CUDA graph
    is captured: a launch for several reads their addresses from a table that the host copies, and a replay would copy it
    from memory that is gone."""
    from .row_norm import launch_group

    def compute(shrink: int) -> list[torch.Tensor]:
        if shrink == 1 and not being_captured():
            return launch_group(group, scale)
        # Where d_in is not divided, there are no partial sums either.
        return [launch_group([operands], scale, None if shrink == 1 else 1)[0] for operands in group]

    return norm.with_less_memory(compute)


def group_key(tensors: Sequence[torch.Tensor], scale: float) -> tuple[Any, ...]:
    """Equal for norms that one launch serves."""
    return scale, tensors[0].device, *((t.dtype, t.shape, t.stride(), t.data_ptr() % 16 == 0) for t in tensors)
