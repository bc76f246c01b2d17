"""The memory that a call allocates, and the memory that autograd saves."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dorafx._compat.profiler import memory_events
from dorafx._compat.tensors import storage_id


@dataclass(frozen=True)
class Allocations:
    """Bytes of the largest single allocation of a call, and of the peak of all allocations beyond what was allocated before the
    call. As the allocator (the caching one on CUDA, the CPU's) rounds them up."""

    largest: int
    peak: int


def allocations(step: Callable[[], Any], device: str) -> Allocations:
    """Run ``step`` once under the profiler, which sees every allocation of tensor memory on any device.

    Raises:
        RuntimeError: the profiler saw no memory at all, as when another tool uses it.
    """
    kind = torch.device(device).type
    # Allocations on any device are recorded on the host; profiling the device's kernels would only slow the call down.
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        step()
        if kind == "cuda":
            torch.cuda.synchronize(device)
    events = memory_events(profile, kind)
    if not events:
        raise RuntimeError("the profiler reported no allocations")
    alive = peak = 0
    for size in events:
        alive += size
        peak = max(peak, alive)
    return Allocations(max(0, *events), peak)


def saved_bytes(forward: Callable[[], Any], excluded: Iterable[torch.Tensor]) -> int:
    """Bytes that autograd saves between ``forward`` and its backward: the storages of saved tensors, each counted once and
    completely, as a view keeps its whole storage alive.

    Args:
        forward: returns the tensor from which a backward would start.
        excluded: tensors that exist anyway: parameters and buffers.
    """
    known = {storage_id(t) for t in excluded}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if storage_id(tensor) not in known:
            # Detached: an output that is saved by its own node would form a reference cycle. Held until the end, so that no
            # two storages get the same address.
            saved[storage_id(tensor)] = tensor.detach()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()
    total = storage_bytes(saved.values())
    del result
    return total


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages, each counted once."""
    return sum({storage_id(t): t.untyped_storage().nbytes() for t in tensors}.values())


def peak_bytes(
    step: Callable[[], Any], device: str, standing: Callable[[], list[torch.Tensor]], temporaries: int | None = None
) -> int:
    """Peak bytes of all tensors in one step.

    Args:
        step: run once; its optimizer must have its state already.
        standing: returns the tensors that exist before and after the step. On a CPU ``temporaries`` are added to them; on a CUDA
            device the caching allocator counts, and it is not called.
        temporaries: peak bytes beyond the standing tensors, if known; else a profiler counts them.
    """
    if torch.device(device).type != "cuda":
        if temporaries is None:
            temporaries = allocations(step, device).peak
        return storage_bytes(standing()) + temporaries
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device))
