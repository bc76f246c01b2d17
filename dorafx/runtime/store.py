"""The norm store: norms kept between forwards, each with what it was computed from, so that none is ever stale.

A norm is reused only where all of this still holds of every tensor that it was computed from:

- it is the same tensor object, on the same storage (``p.data = …``, ``.to(…)`` and merging replace the storage);
- its version counter did not move (in-place operators, ``load_state_dict`` and most optimizers move it);
- no ``torch.optim`` optimizer stepped since (``fused=True`` writes without moving the counter);
- sampled elements are what they were, bit for bit (``p.data.copy_(…)`` writes without moving the counter). Samples
  are read where that costs nothing to speak of: on a CPU; on a GPU it would make the host wait.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dorafx import _compat
from dorafx.log import NormCounters, rewrite_log

__all__ = ["NormStore", "norm_store"]

_SAMPLES = 8


class _TensorState:
    """What a tensor was when a norm was computed from it. Holds neither the tensor nor its memory.

    Checked before every decoding step and for every layer, when the step has just washed the caches: each access counts.
    """

    __slots__ = ("cells", "pointer", "reference", "sample", "size", "storage", "storage_id", "version")

    def __init__(self, tensor: torch.Tensor, on_death: Callable[[Any], None]) -> None:
        self.reference = weakref.ref(tensor, on_death)
        self.version = tensor._version
        self.pointer = tensor.data_ptr()
        self.storage = _compat.weak_storage(tensor)
        self.storage_id = _compat.weak_storage_id(self.storage)
        self.size = tensor.untyped_storage().nbytes()
        self.cells = _cells(tensor)
        self.sample = [cell.value for cell in self.cells]

    def change(self, tensor: torch.Tensor) -> str:
        """What differs now; empty if nothing does."""
        if self.reference() is not tensor:
            return "another parameter"
        if tensor._version != self.version:
            return "a parameter was written"
        if tensor.data_ptr() != self.pointer or _compat.storage_id_and_size(tensor) != (self.storage_id, self.size):
            return "a parameter's data was replaced"
        # From here on the memory is known to be the tensor's still.
        if [cell.value for cell in self.cells] != self.sample:
            return "a parameter's data was overwritten"
        return ""


def _cells(tensor: torch.Tensor) -> list[Any]:
    """Elements spread over a CPU tensor, as integers in its memory (NaN equals itself then)."""
    if tensor.device.type != "cpu" or not tensor.numel():
        return []
    count = min(_SAMPLES, tensor.numel())
    size = tensor.element_size()
    cell = {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int32, 8: ctypes.c_int64}[size]
    start = tensor.data_ptr()
    found = []
    for k in range(count):
        position, offset = k * tensor.numel() // count, 0
        for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride())):
            position, index = divmod(position, length)
            offset += index * stride
        found.append(cell.from_address(start + offset * size))
    return found


@dataclass(frozen=True)
class _Entry:
    norm: torch.Tensor
    states: tuple[_TensorState, ...]
    optimizer_steps: int


class NormStore:
    """Norms by what they are computed from.

    Thread-safe: entries are replaced whole, never changed. Holds no parameter alive: an entry goes when the first of its
    tensors does.

    Args:
        counters: counts what happens.
    """

    def __init__(self, counters: NormCounters) -> None:
        self.counters = counters
        self._entries: dict[Any, _Entry] = {}
        self._steps = 0
        self._watching = False

    def kept(self, signature: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The norm of these tensors, if there is one that cannot be stale."""
        key = (signature, *map(id, tensors))
        entry = self._entries.get(key)
        if entry is None:
            return None
        reason = "the optimizer stepped" if entry.optimizer_steps != self._steps else ""
        for state, tensor in zip(entry.states, tensors):
            if reason:
                break
            reason = state.change(tensor)
        if not reason:
            self.counters.count(reused=1)
            return entry.norm
        self.counters.count_invalidated(reason)
        self._entries.pop(key, None)
        return None

    def keep(self, signature: str, tensors: Sequence[torch.Tensor], norm: torch.Tensor) -> None:
        """Keep a norm that was just computed, unless one of the tensors cannot be watched: made under inference mode, or
        of a subclass, whose memory may be anywhere."""
        self._watch_optimizers()
        if any(t.is_inference() or type(t) not in (torch.Tensor, torch.nn.Parameter) for t in tensors):
            return
        key = (signature, *map(id, tensors))
        entries = self._entries

        def forget(_: Any) -> None:
            entries.pop(key, None)

        states = tuple(_TensorState(t, forget) for t in tensors)
        entries[key] = _Entry(norm, states, self._steps)

    def drop(self, signature: str, tensors: Sequence[torch.Tensor], reason: str) -> None:
        """Forget the norm of these tensors, if it is kept."""
        if self._entries and self._entries.pop((signature, *map(id, tensors)), None) is not None:
            self.counters.count_invalidated(reason)

    def invalidate(self, tensors: Sequence[torch.Tensor]) -> int:
        """Forget every norm that was computed from one of these tensors; returns how many."""
        wanted = set(map(id, tensors))
        stale = [key for key in list(self._entries) if wanted.intersection(key[1:])]
        for key in stale:
            self._entries.pop(key, None)
        if stale:
            self.counters.count_invalidated("the user invalidated it", len(stale))
        return len(stale)

    def clear(self) -> None:
        """Forget all norms."""
        self._entries.clear()

    def __len__(self) -> int:
        return len(self._entries)

    def _watch_optimizers(self) -> None:
        if self._watching:
            return
        self._watching = True
        from torch.optim.optimizer import register_optimizer_step_post_hook

        def stepped(*_: Any) -> None:
            self._steps += 1

        register_optimizer_step_post_hook(stepped)


_PROCESS_STORE = NormStore(rewrite_log().norms)


def norm_store() -> NormStore:
    """The store of this process: graphs of one model share it, so that a prefill refreshes what decoding reuses."""
    return _PROCESS_STORE
