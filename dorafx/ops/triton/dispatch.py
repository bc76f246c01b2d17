"""The row norm on CUDA tensors: the Triton kernel where there is one for the dtypes, ATen calls over blocks elsewhere."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from dorafx.ops import norm, quantized

__all__ = ["available", "row_norm", "row_norm_quantized", "row_norms", "takes"]


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
    from .row_norm import launch

    return launch(weight, left, right, scale)


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
    from .row_norm import launch_group

    groups: dict[Any, list[int]] = {}
    for i, tensors in enumerate(operands):
        groups.setdefault(group_key(tensors, scales[i]), []).append(i)
    norms: list[Any] = [None] * len(operands)
    for members in groups.values():
        if takes(*operands[members[0]]):
            found = launch_group([operands[i] for i in members], scales[members[0]])
        else:
            found = [norm.row_norm(*operands[i], scales[i], algorithm) for i in members]
        for i, value in zip(members, found):
            norms[i] = value
    return norms


def row_norm_quantized(
    packed: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    format: str,
    shape: Sequence[int],
    group: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """See :func:`dorafx.ops.quantized.row_norm_quantized`."""
    weight = quantized.Packed(packed, scales, zeros, format, (int(shape[0]), int(shape[1])), group, dtype)
    quantized.check_operands(weight, left, right)
    if available() and takes(left, right):
        from .quantized import launch, serves

        if serves(weight):
            return launch(weight, left, right, scale)
    return quantized.row_norm_quantized(packed, scales, zeros, left, right, scale, format, shape, group, dtype)


def group_key(tensors: Sequence[torch.Tensor], scale: float) -> tuple[Any, ...]:
    """Equal for norms that one launch serves."""
    return scale, tensors[0].device, *((t.dtype, t.shape, t.stride(), t.data_ptr() % 16 == 0) for t in tensors)
