"""Timing: warm-up, then single calls until a time is spent, with what the device needs to be timed fairly."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Clock"]

_FLUSH_BYTES = 256 << 20  # more than any GPU's second-level cache


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

    def samples(
        self, step: Callable[[], Any], before: Callable[[], Any] | None = None, cold: bool = False, warm_up: int = 2
    ) -> list[float]:
        """Seconds of single calls of ``step``.

        Args:
            step: what is timed.
            before: called before each call of ``step``, outside of the time.
            cold: on a CUDA device, overwrite the cache before each call, as in a model, where other layers' weights pass
                through it. It also keeps the device busy while ``step`` is being launched.
            warm_up: calls before the first that counts; they compile and choose kernels.
        """
        for _ in range(warm_up):
            if before is not None:
                before()
            step()
        self.synchronise()
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.device) if cold and self.cuda else None
        found: list[float] = []
        start = time.perf_counter()
        while len(found) < self.least or (len(found) < self.most and time.perf_counter() - start < self.seconds):
            if before is not None:
                before()
            self.synchronise()
            if flush is not None:
                flush.zero_()
            found.append(self._one(step))
        return found

    def _one(self, step: Callable[[], Any]) -> float:
        if not self.cuda:
            start = time.perf_counter()
            step()
            return time.perf_counter() - start
        with torch.cuda.device(self.device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            first.record()
            step()
            last.record()
            last.synchronize()
            return float(first.elapsed_time(last)) / 1e3
