"""The row norms that dorafx's is compared with, written from their formulas. Each takes ``weight [d_out, d_in]``,
``left [d_out, r]``, ``right [r, d_in]`` and the scaling, and returns ``[d_out]``."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Norm = Callable[[Tensor, Tensor, Tensor, float], Tensor]

_CHUNK_BYTES = 256 << 20
_ROWS = 1024  # their fp64 copies take a small part of the device's memory

PRODUCT = "product"
"""The name of :func:`product` among the implementations of a norm, though it is only a part of one."""


def identity(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """As stock PEFT: the dense product by applying both factors to an identity matrix."""
    eye = torch.eye(right.shape[1], dtype=right.dtype, device=right.device)
    delta = F.linear(F.linear(eye, right), left).T
    n: Tensor = torch.linalg.norm(weight + scale * delta, dim=1)
    return n.to(weight.dtype)


def dense(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """The norm with the dense product, written directly."""
    n: Tensor = torch.linalg.norm(weight + scale * (left @ right), dim=1)
    return n.to(weight.dtype)


def chunked(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``||W||^2 + 2s <B, W A^T> + s^2 <B (A A^T), B>`` by rows, in fp32, over chunks of ``d_in`` of which an fp32 copy stays
    under 256 MiB (arXiv:2603.22276, the factored norm)."""
    d_out, d_in = weight.shape
    compute = torch.promote_types(weight.dtype, torch.float32)
    size = max(64, _CHUNK_BYTES // (d_out * compute.itemsize) // 64 * 64)
    b = left.to(compute)
    base = torch.zeros(d_out, dtype=compute, device=weight.device)
    cross = torch.zeros_like(base)
    gram = torch.zeros(right.shape[0], right.shape[0], dtype=compute, device=weight.device)
    for start in range(0, d_in, size):
        w, a = weight[:, start : start + size].to(compute), right[:, start : start + size].to(compute)
        base += (w * w).sum(1)
        cross += ((w @ a.T) * b).sum(1)
        gram += a @ a.T
    squares = base + 2 * scale * cross + scale * scale * ((b @ gram) * b).sum(1)
    return squares.clamp_min(0).sqrt().to(weight.dtype)


def product(weight: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """``W·Aᵀ [d_out, r]`` alone: the only product of the factored norm that reads the weight, so no such norm can be faster.
    Accumulated, and on a CUDA device also written, in fp32."""
    if weight.is_cuda and weight.dtype == right.dtype and weight.dtype.itemsize == 2:
        return torch.mm(weight, right.T, out_dtype=torch.float32)
    return torch.mm(weight.to(right.dtype), right.T)


def largest_error(norm: Tensor, weight: Tensor, left: Tensor, right: Tensor, scale: float) -> float:
    """Of all rows, the largest relative difference of a norm from that in fp64."""
    worst = 0.0
    for start in range(0, weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        exact = torch.linalg.norm(weight[rows].double() + scale * (left[rows].double() @ right.double()), dim=1)
        worst = max(worst, float(((norm[rows].double() - exact).abs() / exact).max()))
    return worst


NORMS: dict[str, Norm] = {"peft": identity, "dense": dense, "chunked": chunked}
