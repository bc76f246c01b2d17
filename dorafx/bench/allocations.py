"""What a call allocates, and what autograd keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from dorafx._compat.profiler import memory_events
from dorafx._compat.tensors import storage_id


@dataclass(frozen=True)
class Allocations:
    """Bytes: of the largest single allocation of a call, and of all that was alive at once at most, beyond what was
    alive before the call. As the caching allocator or the CPU's hands them out, rounded up there."""

    largest: int
    peak: int


def allocations(step: Callable[[], Any], device: str) -> Allocations:
    """Run ``step`` once under the profiler, which sees every allocation of tensor memory on any device.

    Raises:
        RuntimeError: the profiler saw no memory at all, as where another tool holds it.
    """
    kind = torch.device(device).type
    # Allocations on any device are recorded on the host's side; following the device's kernels would only slow it down.
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
    """Bytes that autograd keeps between ``forward`` and its backward: storages of saved tensors, each counted once and
    whole, as a view keeps all of its storage alive.

    Args:
        forward: returns what a backward would start from.
        excluded: tensors that exist anyway: parameters and buffers.
    """
    known = {storage_id(t) for t in excluded}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if storage_id(tensor) not in known:
            # Detached: a tensor that is both an output and saved by its own node would be a cycle. Held until the end, so
            # that no two storages ever have one address.
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
    """Bytes of all tensors at the height of one step.

    Args:
        step: run once; its optimizer has its state already.
        standing: the tensors that are there before and after it. On a CUDA device the caching allocator counts, and they are
            not asked for; on a CPU ``temporaries`` are added to them.
        temporaries: bytes at once beyond what was there, if they are known; else a profiler counts them.
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
