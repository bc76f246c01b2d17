"""Quantised weights of random codes, and their dequantisation as what is compared with dorafx begins with it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from dorafx.ops.quantized import Packed, dequantize

GROUPS = {"nf4": 64, "bnb8": 0, "affine": 32}
"""Elements of a row that share a scale; 0 for all."""
WEIGHTS = ("dense", *GROUPS)


def random_packed(kind: str, d_out: int, d_in: int, dtype: torch.dtype, device: str) -> Packed:
    """A weight of random codes and scales, of a format of :mod:`dorafx.ops.quantized`.

    Args:
        kind: ``"nf4"`` (bitsandbytes' 4 bits), ``"bnb8"`` (its 8 bits) or ``"affine"`` (torchao's integers, with zero points).
        dtype: what it is dequantised to; bitsandbytes' 8 bits are, to fp32, in any case.
    """
    group = GROUPS[kind] or d_in
    groups = d_out * d_in // group
    if kind == "nf4":
        codes = torch.randint(0, 256, (d_out * d_in // 2, 1), dtype=torch.uint8, device=device)
        return Packed(codes, torch.rand(groups, device=device) + 0.5, None, kind, (d_out, d_in), group, dtype)
    codes = torch.randint(-8, 8, (d_out, d_in), dtype=torch.int8, device=device)
    if kind == "bnb8":
        scales = torch.rand(d_out, device=device) + 0.5
        return Packed(codes, scales, None, kind, (d_out, d_in), group, torch.float32)
    scales = (torch.rand(d_out, d_in // group, device=device) + 0.5).to(dtype)
    zeros = torch.randint(-8, 8, (d_out, d_in // group), dtype=torch.int8, device=device)
    return Packed(codes, scales, zeros, kind, (d_out, d_in), group, dtype)


def packed_bytes(kind: str, d_out: int, d_in: int, itemsize: int) -> float:
    """Bytes of codes, scales and zero points."""
    numel = float(d_out * d_in)
    if kind == "nf4":
        return numel / 2 + 4 * numel / GROUPS[kind]
    return numel + 4 * d_out if kind == "bnb8" else numel + (itemsize + 1) * numel / GROUPS[kind]


def dense_of(weight: Packed) -> Callable[[], torch.Tensor]:
    """What forms the whole weight as its library does: of 4 bits by bitsandbytes' kernel, of the others by aten calls."""
    if weight.format == "nf4":
        import bitsandbytes  # type: ignore[import-not-found,import-untyped,unused-ignore]  # noqa: F401  (registers its operators)

        arguments = (weight.scales, weight.group, weight.format, weight.shape, weight.dtype)
        return lambda: torch.ops.bitsandbytes.dequantize_4bit(weight.packed, *arguments)
    return lambda: dequantize(weight)
