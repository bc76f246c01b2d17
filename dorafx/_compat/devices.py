"""Private API of devices, for measurements."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

_TRIAL = 2_000_000
"""Cycles for measuring the rate of a device's clock: about a millisecond."""


def spin(device: str, seconds: float) -> None:
    """Keep a CUDA device's current stream busy for about ``seconds``, and return at once."""
    torch.cuda._sleep(int(seconds * _cycles_per_second(device)))  # type: ignore[no-untyped-call]


@functools.cache
def _cycles_per_second(device: str) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    sleep: Callable[[int], None] = torch.cuda._sleep
    sleep(_TRIAL)  # the first launch loads the kernel
    first.record()
    sleep(_TRIAL)
    last.record()
    last.synchronize()
    return _TRIAL / max(float(first.elapsed_time(last)) / 1e3, 1e-6)
