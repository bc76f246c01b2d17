# mypy: disable-error-code="untyped-decorator, no-untyped-def"
"""Tiles of a quantised weight, dequantised in registers: the dense weight is never in memory."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nf4(code):
    # Selects by one bit after another. A table would need a load for each value, and room in the L1 cache.
    low0 = tl.where((code & 1) != 0, -0.6961928009986877, -1.0)
    low1 = tl.where((code & 1) != 0, -0.39491748809814453, -0.5250730514526367)
    low2 = tl.where((code & 1) != 0, -0.18477343022823334, -0.28444138169288635)
    low3 = tl.where((code & 1) != 0, 0.0, -0.09105003625154495)
    high0 = tl.where((code & 1) != 0, 0.16093020141124725, 0.07958029955625534)
    high1 = tl.where((code & 1) != 0, 0.33791524171829224, 0.24611230194568634)
    high2 = tl.where((code & 1) != 0, 0.5626170039176941, 0.44070982933044434)
    high3 = tl.where((code & 1) != 0, 1.0, 0.7229568362236023)
    low = tl.where((code & 4) != 0, tl.where((code & 2) != 0, low3, low2), tl.where((code & 2) != 0, low1, low0))
    high = tl.where((code & 4) != 0, tl.where((code & 2) != 0, high3, high2), tl.where((code & 2) != 0, high1, high0))
    return tl.where((code & 8) != 0, high, low)


@triton.jit
def _fp4(code):
    low = tl.where(
        (code & 2) != 0,
        tl.where((code & 1) != 0, 1.0, 0.6666666865348816),
        tl.where((code & 1) != 0, 0.0052083334885537624, 0.0),
    )
    high = tl.where(
        (code & 2) != 0,
        tl.where((code & 1) != 0, 0.25, 0.1666666716337204),
        tl.where((code & 1) != 0, 0.5, 0.3333333432674408),
    )
    size = tl.where((code & 4) != 0, high, low)
    return tl.where((code & 8) != 0, -size, size)


@triton.jit
def dequantized(
    codes, scales, zeros, row_mask, rows, start, last, groups, group, stride,
    COLUMNS: tl.constexpr, FORMAT: tl.constexpr, ZEROS: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """The tile of ``COLUMNS`` columns from ``start`` on, in fp32, rounded to ``VALUE`` as the format's library rounds it.

    A byte of 4-bit codes has an even column in its upper half and the next, odd one in its lower half. d_in of such a weight is even,
    so both are in one row and in one group.
    """
    WIDTH: tl.constexpr = 2 if FORMAT == "nf4" or FORMAT == "fp4" else 1
    columns = tl.arange(0, COLUMNS // WIDTH) * WIDTH
    mask = row_mask & (columns[None, :] < last - start)
    loaded = tl.load(codes + rows[:, None] * stride + tl.arange(0, COLUMNS // WIDTH)[None, :], mask=mask, other=0)
    if FORMAT == "bnb8":
        factor = tl.load(scales + rows[:, None], mask=row_mask, other=0.0)  # one for a row
    else:
        of_group = rows[:, None] * groups + (start + columns[None, :]) // group
        factor = tl.load(scales + of_group, mask=mask, other=0.0)
    if WIDTH == 2:
        pair = loaded.to(tl.int32)
        even = _nf4(pair >> 4) if FORMAT == "nf4" else _fp4(pair >> 4)
        odd = _nf4(pair & 15) if FORMAT == "nf4" else _fp4(pair & 15)
        value = tl.interleave((even * factor).to(VALUE), (odd * factor).to(VALUE))
    elif FORMAT == "bnb8":
        value = (loaded.to(tl.float32) * factor.to(tl.float32) * 7.874015718698502e-3).to(VALUE)
    else:
        # Differences of 8-bit integers are exact in every dtype of weights, so only the product is rounded.
        value = loaded.to(tl.float32)
        if ZEROS:
            value -= tl.load(zeros + of_group, mask=mask, other=0).to(tl.float32)
        value = (value * factor.to(tl.float32)).to(VALUE)
    return value.to(tl.float32)
