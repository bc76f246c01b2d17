"""Timing: warm-up calls, then single calls until a time is used up, with CUDA events and a cold cache where needed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dorafx._compat.devices import spin

_FLUSH_BYTES = 256 << 20  # more than any GPU's second-level cache
_ISSUED = 3
"""Calls whose host time determines how long the device spins."""
_LONGEST_SPIN = 0.02


@dataclass(frozen=True)
class Timing:
    """Seconds of single calls on the device and, for a CUDA device, those that the host took to issue them (on a CPU these are the
    same, and ``host`` is empty)."""

    seconds: list[float]
    host: list[float]


@dataclass(frozen=True)
class Clock:
    """How calls are timed.

    Attributes:
        device: ``"cpu"`` or a CUDA device, where a call is timed by two events on its stream.
        seconds: of timed calls for one figure, after the warm-up; at least ``least`` calls are timed, at most ``most``.
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
            before: called before each call of ``step``, not timed.
            cold: time one operator as in a model. On a CUDA device the cache is overwritten before each call, as by other layers'
                weights, and the device spins while the call is issued, as it is busy then in a model, so that the figure contains no
                host time. Without it the figure contains the time that the device waits for the host, as a user experiences it.
            warm_up: untimed calls at the beginning; they compile and choose kernels.
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
        """Seconds until ``step`` returns on the host, starting with an idle device."""
        if before is not None:
            before()
        self.synchronise()
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    def _one(self, step: Callable[[], Any], busy: float) -> tuple[float, float]:
        """Seconds of a call on the device and on the host; the device spins for ``busy`` seconds before it."""
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
