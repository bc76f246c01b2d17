"""The norm store: norms kept between forwards, each with the state of what it was computed from, so that none is ever stale.

A norm is reused only if all of this is still true for every tensor that it was computed from:

- It is the same tensor (not just the same object, which ``torch.utils.swap_tensors`` gives another content), on the same storage
  (``p.data = …``, ``.to(…)`` and merging replace the storage).
- It reads the storage in the same way: with the same offset, shape, strides, dtype and sign (``p.data = p.data.t()``).
- Its version counter is the same (in-place operators, ``load_state_dict`` and most optimizers increment it).
- No ``torch.optim`` optimizer has made a step since (``fused=True`` writes without incrementing the counter).
- Small factors are the same by a hash, and sampled elements of larger tensors, bit for bit (``p.data.copy_(…)`` writes without
  incrementing the counter). The host reads them where that costs next to nothing: on a CPU.
- No graph that has the tensor as an input has recorded gradients since, whether or not that graph computes the norm: a program that
  trains writes the parameters next, and not every optimizer can be noticed.
- The norm is used for what it was kept for: a norm of a forward that recorded gradients serves only the recomputation of that
  forward in the backward (activation checkpointing).

A stream that reads what another one computes waits for it (:mod:`dorafx.runtime.streams`).

The tensor of a kept norm is never returned to a program: a graph copies what could reach an output (:mod:`dorafx.rewriter.escapes`).

These rules serve decoding, which has no time to read a weight. Where a norm would be computed, on a CPU, contents decide
(:mod:`dorafx.runtime.content`), as they do for the squared row norms of frozen weights, which the factored algorithm starts from. On a
device kernels compare contents in every call (:mod:`dorafx.runtime.on_device`), and these rules only say how many of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dorafx.log import NormCounters, rewrite_log

from .content import NormsByContent
from .streams import Ready, Streams
from .watch import Watch, parts, watchable, without_tensor

_RECORDED = "a forward recorded gradients"
# With fewer entries than this, dead ones are not searched for.
_FEW_ENTRIES = 64


@dataclass(frozen=True)
class Observed:
    """The state of a norm's tensors before it was computed; any later write makes the norm stale."""

    key: tuple[Any, ...]
    watch: Watch
    optimizer_steps: int
    recorded: bool


@dataclass(eq=False)
class Entry:
    """A norm and the state of what it was computed from.

    ``norm`` becomes None when the memory of a tensor is gone, or when the entry is dropped; nothing else of an entry changes. An entry
    whose memory is gone stays in the store, to tell why the norm is computed again."""

    norm: torch.Tensor | None
    watch: Watch
    optimizer_steps: int
    recorded: bool = False
    ready: Ready | None = None


class NormStore:
    """Norms by what they are computed from.

    Thread-safe: an entry never changes, except that its norm is removed. Keeps no parameter alive: a norm is removed as soon as the
    memory of one of its tensors is gone. The rest of such an entry, and the norm of a tensor that is gone although another tensor has
    its memory, are removed when the number of entries has doubled.

    Args:
        counters: counts what happens.

    Attributes:
        optimizer_steps: how many steps any optimizers have made. A norm from before the last one is stale.
        by_content: norms, and squared norms of frozen weights, by what they were computed from.
    """

    def __init__(self, counters: NormCounters) -> None:
        self.counters = counters
        self.by_content = NormsByContent()
        self._entries: dict[Any, Entry] = {}
        # By the id of a tensor: the keys of the norms that read it and serve any forward, perhaps also of norms that are gone.
        self._readers: dict[int, set[Any]] = {}
        self._lock = threading.RLock()
        self._purge_at = _FEW_ENTRIES
        self.optimizer_steps = 0
        self._watching = False

    def kept(
        self,
        signature: str,
        tensors: Sequence[torch.Tensor],
        recomputing: bool = False,
        streams: Streams | None = None,
    ) -> torch.Tensor | None:
        """The norm of these tensors, if one is kept that cannot be stale. The caller counts what it reuses.

        Args:
            signature: how it is computed.
            tensors: what it is computed from.
            recomputing: whether it is for a forward that records gradients within a backward.
            streams: the streams of the call that reads it; they wait for the norm if another stream computes it.
        """
        key = (signature, *map(id, tensors))
        entry = self._entries.get(key)
        if entry is None:
            return None
        if entry.recorded and not recomputing:
            reason = _RECORDED
        else:
            reason = (
                "the optimizer stepped"
                if entry.optimizer_steps != self.optimizer_steps
                else entry.watch.change(tensors)
            )
        norm = entry.norm
        if not reason and norm is not None:
            if recomputing and not entry.recorded:  # reentrant checkpointing: the region's forward recorded nothing
                self._put(key, replace(entry, recorded=True))
            if entry.ready is not None and streams is not None:
                streams.read(norm, entry.ready)
            return norm
        self.counters.count_invalidated(reason or "a parameter's data was replaced")
        self._end(key)
        return None

    def entries(self, norms: Iterable[tuple[str, Sequence[torch.Tensor]]]) -> list[Entry] | None:
        """The entries of several norms that serve any forward; None if one is missing.

        Args:
            norms: the signature and tensors of each, as for :meth:`kept`.
        """
        known = [self._entries.get((signature, *map(id, tensors))) for signature, tensors in norms]
        entries = [entry for entry in known if entry is not None and not entry.recorded]
        return entries if len(entries) == len(known) else None

    def observe(self, signature: str, tensors: Sequence[torch.Tensor], recorded: bool = False) -> Observed | None:
        """Call this before computing a norm that is to be kept. None if one of the tensors cannot be watched.

        Args:
            signature, tensors: as for :meth:`kept`.
            recorded: whether the forward records gradients; the norm then serves only its recomputation.
        """
        self._watch_optimizers()
        if not watchable(tensors):
            return None
        key = (signature, *map(id, tensors))

        def forget(_: Any) -> None:
            """The memory of one of the tensors is gone."""
            entry = self._entries.get(key)
            if entry is not None:
                entry.norm = None

        return Observed(key, Watch(tensors, forget), self.optimizer_steps, recorded)

    def keep(self, observed: Observed | None, norm: torch.Tensor, streams: Streams | None = None) -> None:
        """Keep a norm that was computed after :meth:`observe`; does nothing if its tensors cannot be watched.

        Args:
            streams: the streams of the call that computed this norm and all others that it keeps.
        """
        if observed is None:
            return
        ready = None if streams is None else streams.ready(norm)
        with self._lock:
            self._purge()
            if not observed.recorded:
                for tensor in observed.key[1:]:
                    self._readers.setdefault(tensor, set()).add(observed.key)
            entry = Entry(norm, observed.watch, observed.optimizer_steps, observed.recorded, ready)
            self._put(observed.key, entry)

    def _put(self, key: Any, entry: Entry) -> None:
        before, self._entries[key] = self._entries.get(key), entry
        if before is not None:
            before.norm = None

    def _end(self, key: Any) -> bool:
        """Remove an entry and its norm, also for others that hold the entry; returns whether there was one."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            entry.norm = None
        return entry is not None

    def _purge(self) -> None:
        """Remove the entries of tensors that are gone, whenever there are twice as many entries as after the last time."""
        if len(self._entries) < self._purge_at:
            return
        known = list(self._entries.items())
        dead = [key for key, entry in known if entry.norm is None]
        for key in (*dead, *without_tensor([(key, entry.watch) for key, entry in known])):
            self._end(key)
        readers: dict[int, set[Any]] = {}
        for key, entry in list(self._entries.items()):
            for tensor in () if entry.recorded else key[1:]:
                readers.setdefault(tensor, set()).add(key)
        self._readers = readers
        self._purge_at = max(_FEW_ENTRIES, 2 * len(self._entries))

    def recorded(self, values: Sequence[Any]) -> None:
        """Remove the norms that read one of a graph's inputs, except those kept for a recomputation. To be called when a forward of the
        graph records gradients: an optimizer will write to the inputs."""
        if not self._readers:
            return
        tensors = [id(tensor) for tensor in parts(values)]
        if self._readers.keys().isdisjoint(tensors):
            return
        dropped = 0
        with self._lock:
            for tensor in tensors:
                for key in self._readers.pop(tensor, ()):
                    entry = self._entries.get(key)
                    if entry is not None and not entry.recorded:
                        dropped += self._end(key)
        if dropped:
            self.counters.count_invalidated(_RECORDED, dropped)

    def drop(self, signature: str, tensors: Sequence[torch.Tensor]) -> None:
        """Remove the norm of these tensors, if one is kept, because a forward records gradients."""
        key = (signature, *map(id, tensors))
        entry = self._entries.get(key)
        if self._end(key) and entry is not None and not entry.recorded:
            self.counters.count_invalidated(_RECORDED)

    def invalidate(self, tensors: Sequence[torch.Tensor]) -> int:
        """Remove every norm that was computed from one of these tensors, or from their inner tensors; returns how many."""
        ids = set(map(id, parts(tensors)))
        stale = [key for key in list(self._entries) if ids.intersection(key[1:])]
        kept = [entry for entry in map(self._entries.get, stale) if entry is not None]
        # Entries without a norm do not count: their tensors are gone, and another tensor may have the same id.
        forgotten = sum(entry.norm is not None for entry in kept)
        for key in stale:
            self._end(key)
        self.by_content.clear()  # also those that have the same content: the user does not trust them
        if forgotten:
            self.counters.count_invalidated("the user invalidated it", forgotten)
        return forgotten

    def clear(self) -> None:
        """Remove all norms."""
        with self._lock:
            for key in list(self._entries):
                self._end(key)
            self._readers.clear()
            self._purge_at = _FEW_ENTRIES
        self.by_content.clear()

    def __len__(self) -> int:
        """The number of kept norms."""
        return sum(entry.norm is not None for entry in list(self._entries.values()))

    def _watch_optimizers(self) -> None:
        if self._watching:
            return
        self._watching = True
        from torch.optim.optimizer import register_optimizer_step_post_hook

        def stepped(*_: Any) -> None:
            self.optimizer_steps += 1

        register_optimizer_step_post_hook(stepped)


_PROCESS_STORE = NormStore(rewrite_log().norms)


def norm_store() -> NormStore:
    """The store of this process. The graphs of a model share it, so a prefill refreshes what decoding reuses."""
    return _PROCESS_STORE
