"""Private API of the profiler."""

from __future__ import annotations

from typing import Any

import torch


def memory_events(profile: Any, device_type: str) -> list[int]:
    """Sizes in bytes of the allocations (positive) and frees (negative) that a finished ``torch.profiler.profile`` with
    ``profile_memory=True`` saw on a kind of device, in the order of time. The public event list leaves out those that
    happened inside an operator."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    kind = getattr(torch._C._autograd.DeviceType, device_type.upper())
    events.sort(key=lambda e: e.start_ns())
    return [int(e.nbytes()) for e in events if e.device_type() == kind]
