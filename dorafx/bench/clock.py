"""Timing: warm-up, then single calls until a time is spent, with what the device needs to be timed fairly."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dorafx._compat.devices import spin

_FLUSH_BYTES = 256 << 20  # more than any GPU's second-level cache
_ISSUED = 3
"""Calls whose host time decides how long the device spins."""
_LONGEST_SPIN = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds of single calls: as the device had them, and, of a CUDA device, in which the host issued them (on a CPU there is
    no other time, and ``host`` is empty)."""

    seconds: list[float]
    host: list[float]


@dataclass(frozen=True)
class Clock:
    """How calls are timed.

    Attributes:
        device: ``"cpu"`` or a CUDA device; there a call's time is what passes between two events on its stream.
        seconds: time to spend on one figure after the warm-up; at least ``least`` calls are timed, at most ``most``.
    """

    device: str
    seconds: float = 0.5
    least: int = 3
    most: int = 100

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def synchronise(self) -> None:
        if self.cuda:
            torch.cuda.synchronize(self.device)

    def figures(
        self,
        name: str,
        step: Callable[[], Any],
        before: Callable[[], Any] | None = None,
        cold: bool = False,
        warm_up: int = 2,
    ) -> dict[str, tuple[str, list[float]]]:
        """:meth:`timing` as figures of a suite: ``name``, and on a CUDA device also the host's time, ``"name, host"``."""
        timing = self.timing(step, before, cold, warm_up)
        return {name: ("s", timing.seconds), **({f"{name}, host": ("s", timing.host)} if timing.host else {})}

    def samples(
        self, step: Callable[[], Any], before: Callable[[], Any] | None = None, cold: bool = False, warm_up: int = 2
    ) -> list[float]:
        """:meth:`timing` without the host's time."""
        return self.timing(step, before, cold, warm_up).seconds

    def timing(
        self, step: Callable[[], Any], before: Callable[[], Any] | None = None, cold: bool = False, warm_up: int = 2
    ) -> Timing:
        """Seconds of single calls of ``step``.

        Args:
            step: what is timed.
            before: called before each call of ``step``, outside of the time.
            cold: one operator of a model: on a CUDA device, overwrite the cache before each call, as other layers' weights pass
                through it, and let the device spin while the call is issued, as in a model it is busy then: no time of the host
                is in the figure. Without it a device that waits for the host is timed waiting, as its user has it.
            warm_up: calls before the first that counts; they compile and choose kernels.
        """
        for _ in range(warm_up):
            if before is not None:
                before()
            step()
        self.synchronise()
        operator = cold and self.cuda
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.device) if operator else None
        issued = [self._issued(step, before) for _ in range(_ISSUED)] if operator else []
        busy = min(2 * max(issued) + 2e-5, _LONGEST_SPIN) if issued else 0.0
        samples: list[float] = []
        start = time.perf_counter()
        while len(samples) < self.least or (len(samples) < self.most and time.perf_counter() - start < self.seconds):
            if before is not None:
                before()
            self.synchronise()
            if flush is not None:
                flush.zero_()
            seconds, host = self._one(step, busy)
            samples.append(seconds)
            if not operator and self.cuda:
                issued.append(host)
        return Timing(samples, issued)

    def _issued(self, step: Callable[[], Any], before: Callable[[], Any] | None) -> float:
        """Seconds until ``step`` returns, of a device that had nothing to do."""
        if before is not None:
            before()
        self.synchronise()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def _one(self, step: Callable[[], Any], busy: float) -> tuple[float, float]:
        """Seconds of a call on the device and on the host; before it the device spins for ``busy`` seconds."""
        if not self.cuda:
            start = time.perf_counter()
            step()
            seconds = time.perf_counter() - start
            return seconds, seconds
        with torch.cuda.device(self.device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            if busy:
                spin(self.device, busy)
            first.record()
            start = time.perf_counter()
            step()
            host = time.perf_counter() - start
            last.record()
            last.synchronize()
            return float(first.elapsed_time(last)) / 1e3, host
