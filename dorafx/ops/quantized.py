"""The row norm of a quantised weight: one block of rows is dequantised at a time, so neither the dense weight nor the dense delta
ever exists.

A weight is ``packed`` (codes), ``scales`` and perhaps ``zeros``, in one of these formats:

- ``"nf4"``, ``"fp4"``: bitsandbytes' 4-bit types. Two codes a byte, the first in the high half, in the order of the flattened
  weight; ``scales[k]`` (fp32) is the largest magnitude of the k-th ``group`` of elements. ``value = table[code] · scale`` in
  fp32 (QLoRA, arXiv:2305.14314, section 3, for NF4).
- ``"nf4-cpu"``, ``"fp4-cpu"``: the same as bitsandbytes lays it out for inference on CPUs with AVX512-BF16. By 32 rows the
  codes are ordered ``[d_in / 2, 32, 2]``; of 64 of these, the first 32 are the low halves of as many bytes. ``scales`` are
  ``[d_in / group, d_out]`` in bf16.
- ``"bnb8"``: bitsandbytes' 8-bit type. ``packed [d_out, d_in]`` int8, ``scales [d_out]``; ``value = code · scale / 127`` in fp32.
- ``"affine"``: torchao's integers. ``packed [d_out, d_in]`` int8, ``scales`` and ``zeros`` ``[d_out, d_in / group]``;
  ``value = (code - zero) · scale`` in ``dtype``.
- ``"hqq8"``, ``"hqq4"``, ``"hqq2"``, ``"hqq1"``: HQQ. The weight is regarded as ``[n / group, group]`` (``zeros`` and ``scales``
  ``[n / group, 1]``) or as ``[group, n / group]`` (``[1, n / group]``); the codes are packed as ``8 / bits`` slices of the
  flattened weight, the first in the highest bits; ``value = (code - zero) · scale`` in ``dtype``.

What the library rounds is rounded here: dequantised blocks are bit for bit the library's.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dorafx._compat.autograd import below_autocast

from . import layout, norm

# bitsandbytes' tables by code, in fp32. NF4: quantiles of a normal distribution, as the paper's appendix E prints them. FP4:
# a sign, two exponent bits and one of mantissa, divided by the largest value, 12.
TABLES: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
        -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": tuple(
        sign * value / 12.0 for sign in (1.0, -1.0) for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}  # fmt: skip
_HQQ_BITS = {"hqq8": 8, "hqq4": 4, "hqq2": 2, "hqq1": 1}
_CPU_TABLES = {"nf4-cpu": "nf4", "fp4-cpu": "fp4"}
FORMATS = (*TABLES, *_CPU_TABLES, "bnb8", "affine", *_HQQ_BITS)
# A block of this many fp32 values stays in the cache, together with its codes and intermediate results.
_BLOCK_ELEMENTS = 1 << 18
_BNB8 = 7.874015718698502e-3


@dataclass(frozen=True)
class Packed:
    """A quantised weight ``[d_out, d_in]``; see this module for the formats.

    Attributes:
        dtype: what it is dequantised to: fp16, bf16 or fp32.
        pairs: for 4-bit types: both values of each byte, ``[256, 2]``; None uses the table that is cached for the process.
    """

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    format: str
    shape: tuple[int, int]
    group: int
    dtype: torch.dtype
    pairs: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        packed: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None,
        format: str,
        shape: Sequence[int],
        group: int,
        dtype: torch.dtype,
    ) -> Packed:
        """The weight of an operator's flat arguments, whose shape is a list."""
        return cls(packed, scales, zeros, format, (int(shape[0]), int(shape[1])), group, dtype)

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]

    def check(self) -> None:
        """Check that the fields fit together.

        Raises:
            ValueError: an unknown format, sizes that do not match the shape, or several devices.
            TypeError: a dtype that the format does not have.
        """
        if self.format not in FORMATS:
            raise ValueError(f"unknown format {self.format!r} of a quantised weight; allowed are {', '.join(FORMATS)}")
        if len(self.shape) != 2 or min(self.shape) < 0 or self.group < 1:
            raise ValueError(
                f"a quantised weight has a shape [d_out, d_in] and groups of at least 1; got {self.shape}, {self.group}"
            )
        if self.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise TypeError(f"a weight is dequantised to fp16, bf16 or fp32, not to {self.dtype}")
        _check_sizes(self)
        if self.format in _HQQ_BITS and self.zeros is None:
            raise ValueError(f"a {self.format} weight has zeros; got none")
        if any(t is not None and t.device != self.packed.device for t in (self.scales, self.zeros)):
            raise ValueError("the codes, scales and zeros of a quantised weight lie on one device")


def flat_arguments(function: Callable[[Packed], torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function of a weight as a kernel of ``dorafx::dequantize``, whose schema has the weight's fields one by one."""

    def flat(*weight: Any, **more: Any) -> torch.Tensor:
        return function(Packed.of(*weight, **more))

    return flat


_Norm = Callable[[Packed, torch.Tensor, torch.Tensor, float, torch.dtype | None], torch.Tensor]


def flat_norm_arguments(function: _Norm) -> Callable[..., torch.Tensor]:
    """A row norm of a weight as a kernel of ``dorafx::row_norm_quantized``, whose schema has the weight's fields one by one."""

    def flat(
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
        factor_dtype: torch.dtype | None = None,
    ) -> torch.Tensor:
        weight = Packed.of(packed, scales, zeros, format, shape, group, dtype)
        return function(weight, left, right, scale, factor_dtype)

    return flat


def _check_sizes(w: Packed) -> None:
    (d_out, d_in), n = w.shape, w.numel
    if w.format in TABLES:
        sizes = {
            "bytes of codes": (-(-n // 2), w.packed.numel() * w.packed.element_size()),
            "scales": (-(-n // w.group), w.scales.numel()),
        }
    elif w.format in _CPU_TABLES:
        if d_out % 32 or d_in % w.group:
            raise ValueError(
                f"a {w.format} weight has rows by 32 and whole groups in each; got {w.shape}, groups of {w.group}"
            )
        sizes = {"bytes of codes": (n // 2, w.packed.numel()), "scales": (n // w.group, w.scales.numel())}
    elif w.format == "bnb8":
        sizes = {"codes": (n, w.packed.numel()), "scales": (d_out, w.scales.numel())}
    else:
        if (d_in if w.format == "affine" else n) % w.group:
            raise ValueError(f"groups of {w.group} do not divide a {w.format} weight {w.shape}")
        per = 8 // _HQQ_BITS.get(w.format, 8)
        sizes = {"bytes of codes": (n, w.packed.numel() * per), "scales": (n // w.group, w.scales.numel())}
        if w.zeros is not None:
            sizes["zeros"] = (n // w.group, w.zeros.numel())
    for what, (expected, actual) in sizes.items():
        if expected != actual:
            raise ValueError(
                f"a {w.format} weight {tuple(w.shape)} in groups of {w.group} has {expected} {what}; got {actual}"
            )


def _both_values(table: torch.Tensor) -> torch.Tensor:
    byte = torch.arange(256, device=table.device)
    return torch.stack([table[byte >> 4], table[byte & 15]], 1)


@functools.cache
def _kept_pairs(kind: str, device: torch.device) -> torch.Tensor:
    return _both_values(torch.tensor(TABLES[kind], dtype=torch.float32)).to(device)


def _pairs(weight: Packed) -> torch.Tensor:
    """Both values of each byte: ``[256, 2]``."""
    kind = _CPU_TABLES.get(weight.format, weight.format)
    return _kept_pairs(kind, weight.packed.device) if weight.pairs is None else weight.pairs


def _four_bit(w: Packed, first: int, last: int) -> torch.Tensor:
    d_in = w.shape[1]
    start, end = first * d_in, last * d_in
    data = w.packed.reshape(-1).contiguous().view(torch.uint8)[start // 2 : -(-end // 2)]
    values = _pairs(w).index_select(0, data.int()).reshape(-1)[start % 2 :][: end - start]
    scales = w.scales.reshape(-1)
    if start % w.group == 0 and (end - start) % w.group == 0:
        values.view(-1, w.group).mul_(scales[start // w.group : end // w.group, None])
    else:
        covering = scales[start // w.group : -(-end // w.group)].repeat_interleave(w.group)
        values.mul_(covering[start % w.group :][: end - start])
    return values.view(last - first, d_in).to(w.dtype)


def _four_bit_cpu(w: Packed, first: int, last: int) -> torch.Tensor:
    d_in = w.shape[1]
    start, end = first // 32, -(-last // 32)
    data = w.packed.reshape(-1)[start * 16 * d_in : end * 16 * d_in].view(-1, 32)
    codes = torch.cat([data & 15, data >> 4], 1).view(end - start, d_in // 2, 32, 2).transpose(1, 2)
    codes = codes.reshape(32 * (end - start), d_in)[first - 32 * start : last - 32 * start].int()
    values = _pairs(w)[:16, 1].index_select(0, codes.view(-1))
    groups = d_in // w.group
    scales = w.scales.reshape(groups, w.shape[0])[:, first:last].t().to(torch.float32)
    values = values.view(last - first, groups, w.group).mul_(scales[:, :, None])
    return values.view(last - first, d_in).to(w.dtype)


def _bnb8(w: Packed, first: int, last: int) -> torch.Tensor:
    scales = w.scales.reshape(-1, 1)[first:last]
    return ((w.packed.reshape(w.shape)[first:last] * scales) * _BNB8).to(w.dtype)


def _affine(w: Packed, first: int, last: int) -> torch.Tensor:
    groups = w.shape[1] // w.group
    values = w.packed.reshape(w.shape)[first:last].to(w.dtype).reshape(last - first, groups, w.group)
    if w.zeros is not None:
        values = values - w.zeros.reshape(w.shape[0], groups, 1)[first:last].to(w.dtype)
    values = values * w.scales.reshape(w.shape[0], groups, 1)[first:last]
    return values.reshape(last - first, w.shape[1]).to(w.dtype)


def _hqq(w: Packed, first: int, last: int) -> torch.Tensor:
    d_in, bits = w.shape[1], _HQQ_BITS[w.format]
    start, end = first * d_in, last * d_in
    data = w.packed.reshape(-1)
    codes = torch.empty(end - start, dtype=w.dtype, device=data.device)
    length = data.numel()
    for part in range(8 // bits):
        low, high = max(start, part * length), min(end, (part + 1) * length)
        if low < high:
            piece = data[low - part * length : high - part * length]
            codes[low - start : high - start] = (piece >> (8 - bits * (part + 1))) & ((1 << bits) - 1)
    assert w.zeros is not None
    zeros, scales, length = w.zeros.reshape(-1), w.scales.reshape(-1), w.numel // w.group
    if w.scales.shape[0] == 1 and length > 1:  # a group is a column of [group, n / group]
        index = torch.arange(start, end, device=data.device, dtype=torch.int32) % length
    else:
        index = torch.arange(start, end, device=data.device, dtype=torch.int32) // w.group
    values = codes.sub_(zeros.index_select(0, index)).mul_(scales.index_select(0, index))
    return values.view(last - first, d_in)


_DEQUANTIZE: dict[str, Callable[[Packed, int, int], torch.Tensor]] = {
    **dict.fromkeys(TABLES, _four_bit),
    **dict.fromkeys(_CPU_TABLES, _four_bit_cpu),
    "bnb8": _bnb8,
    "affine": _affine,
    **dict.fromkeys(_HQQ_BITS, _hqq),
}


def dequantize_rows(weight: Packed, first: int, last: int) -> torch.Tensor:
    """Rows ``first`` to ``last`` of a weight, ``[last - first, d_in]`` in its dtype; bit for bit what its library computes."""
    return _DEQUANTIZE[weight.format](weight, first, last)


def dequantize(weight: Packed) -> torch.Tensor:
    """The whole weight, ``[d_out, d_in]`` in its dtype, contiguous.

    Raises:
        ValueError, TypeError: see :meth:`Packed.check`.
    """
    weight.check()
    return layout.settled(dequantize_rows(weight, 0, weight.shape[0]))


def _block(weight: Packed, rank: int, wide: torch.dtype, casts_right: bool, shrink: int) -> tuple[int, int]:
    """How many rows a block has, and how many columns of the right factor are cast at a time, so that no buffer reaches an eighth
    of the dense weight's size, including the buffers of codes and of values in the wide dtype. ``shrink`` divides all of these."""
    d_out, d_in = weight.shape
    limit = weight.numel * weight.dtype.itemsize // (9 * wide.itemsize * shrink)
    rows = max(1, min(d_out, min(limit, max(_BLOCK_ELEMENTS // shrink, d_in)) // max(d_in, rank, 1)))
    return rows, max(1, min(d_in, limit // rank)) if casts_right and rank else d_in


def check_operands(weight: Packed, left: torch.Tensor, right: torch.Tensor) -> None:
    """Raises:
    ValueError, TypeError: see :meth:`Packed.check` and :func:`dorafx.ops.norm.check_operands`.
    """
    weight.check()
    # An expanded tensor of one element stands for the dense weight, which is never formed.
    stand_in = torch.empty((), dtype=weight.dtype, device=weight.packed.device).expand(weight.shape)
    norm.check_operands(stand_in, left, right)


def row_norm_quantized(
    weight: Packed,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    factor_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``n[i] = ‖W[i] + scale·(left·right)[i]‖₂`` of a quantised weight.

    Args:
        left: ``[d_out, r]``; right: ``[r, d_in]``; any floating dtypes.
        scale: the scaling ``s``.
        factor_dtype: as :func:`dorafx.ops.norm.row_norm` has it.

    Returns:
        ``[d_out]`` in fp32, in fp64 where a factor is fp64.

    Raises:
        ValueError, TypeError: operands that do not fit together.
        RuntimeError: out of memory, with the smallest blocks too (see :func:`dorafx.ops.norm.with_less_memory`).
    """
    check_operands(weight, left, right)
    norm.check_factor_dtype(factor_dtype)
    # The operator is opaque, so it also runs where the user's program is autocast, which would multiply in bf16.
    with below_autocast():
        return norm.with_less_memory(lambda shrink: _tiled(weight, left, right, scale, shrink))


def _tiled(weight: Packed, left: torch.Tensor, right: torch.Tensor, scale: float, shrink: int) -> torch.Tensor:
    (d_out, d_in), rank = weight.shape, right.shape[0]
    wide = norm.compute_dtype(left, right)
    norms = torch.zeros(d_out, dtype=wide, device=weight.packed.device)
    if not weight.numel:
        return norms
    rows, columns = _block(weight, rank, wide, right.dtype != wide, shrink)
    for first in range(0, d_out, rows):
        last = min(first + rows, d_out)
        block = dequantize_rows(weight, first, last).to(wide)
        side = left[first:last].to(wide)
        for start in range(0, d_in if rank else 0, columns):
            chunk = slice(start, start + columns)
            block[:, chunk].addmm_(side, right[:, chunk].to(wide), alpha=scale)
        torch.linalg.vector_norm(block, dim=1, out=norms[first:last])
    return norms


def _to_trace(weight: Packed) -> Packed:
    """The weight with a table made of aten calls, for tracers: they would take the table cached for the process as a constant."""
    weight.check()
    kind = _CPU_TABLES.get(weight.format, weight.format)
    if kind not in TABLES:
        return weight
    values = [torch.full((), value, dtype=torch.float32, device=weight.packed.device) for value in TABLES[kind]]
    return replace(weight, pairs=_both_values(torch.stack(values)))


@flat_arguments
def dequantize_unrolled(weight: Packed) -> torch.Tensor:
    """:func:`dequantize`, for graphs that may hold nothing but aten calls; takes the operator's arguments."""
    weight = _to_trace(weight)
    return layout.settled(dequantize_rows(weight, 0, weight.shape[0]))


@flat_norm_arguments
def row_norm_quantized_unrolled(
    weight: Packed,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    factor_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """:func:`row_norm_quantized` as a fixed sequence of aten calls (see :func:`dorafx.ops.norm.row_norm_unrolled`); takes the
    operator's arguments."""
    weight = _to_trace(weight)
    d_out = weight.shape[0]
    rows = max(1, -(-d_out // (10 if weight.dtype == torch.float32 else 20)))
    wide = norm.compute_dtype(left, right)
    wide_left, wide_right = left.to(wide) * scale, right.to(wide)
    norms = []
    for first in range(0, d_out, rows):
        last = min(first + rows, d_out)
        block = dequantize_rows(weight, first, last).to(wide)
        norms.append(torch.linalg.vector_norm(torch.addmm(block, wide_left[first:last], wide_right), dim=1))
    return torch.cat(norms) if norms else left.new_zeros(0, dtype=wide)
