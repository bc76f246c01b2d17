"""The row norm on CUDA tensors: the Triton kernel where there is one for the dtypes, ATen calls over blocks elsewhere."""

from __future__ import annotations

import functools
import importlib.util

import torch

from dorafx.ops import norm

__all__ = ["available", "row_norm", "takes"]


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
