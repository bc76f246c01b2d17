"""The norm store: norms kept between forwards, each with what it was computed from, so that none is ever stale.

A norm is reused only where all of this still holds of every tensor that it was computed from:

- it is the same tensor (not merely the same object: ``torch.utils.swap_tensors`` gives that another content), on the same
  storage (``p.data = …``, ``.to(…)`` and merging replace the storage);
- it reads it in the same way, with the same offset, shape, strides, dtype and sign (``p.data = p.data.t()``);
- its version counter did not move (in-place operators, ``load_state_dict`` and most optimizers move it);
- no ``torch.optim`` optimizer stepped since (``fused=True`` writes without moving the counter);
- sampled elements are what they were, bit for bit (``p.data.copy_(…)`` writes without moving the counter). Samples
  are read where that costs nothing to speak of: on a CPU; on a GPU it would make the host wait;
- no graph that takes it recorded gradients since, whether that graph computes the norm itself, or none: whoever trains writes the
  parameters next, and not every optimizer can be seen doing it;
- it serves what it was kept for: a norm of a forward that recorded gradients serves the recomputation of that forward in the
  backward (activation checkpointing) and nothing else.

A stream that reads what another one computes waits for it (:mod:`dorafx.runtime.streams`).

A kept norm is never handed out: a graph copies what could reach an output (:mod:`dorafx.rewriter.escapes`).

The squared row norms of weights that nobody trains are kept by the same rules, but for the optimizers and the recorded gradients:
only a step of an optimizer that has the weight counts. They serve forwards that compute their norms, so they are kept where samples
are read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from dorafx.log import NormCounters, rewrite_log

from .streams import Ready, Streams
from .watch import SAMPLES, Watch, parts, watchable, without_tensor

_RECORDED = "a forward recorded gradients"
# Squares serve forwards that otherwise read all of the weight: there is time to look at more of it.
_SQUARE_SAMPLES = 4096
# So many entries are not looked through for dead ones.
_FEW_ENTRIES = 64


@dataclass(frozen=True)
class Observed:
    """What the tensors of a norm were before it was computed; a write that comes later makes it stale."""

    key: tuple[Any, ...]
    watch: Watch
    optimizer_steps: int
    recorded: bool


@dataclass(eq=False)
class Entry:
    """A norm and what it was computed from. ``norm`` is None where the memory of a tensor is gone, and once the entry serves no more. While the memory alone is gone
    the entry stays: what is left tells why the norm is computed again. Nothing else of it changes."""

    norm: torch.Tensor | None
    watch: Watch
    optimizer_steps: int
    recorded: bool = False
    ready: Ready | None = None


class NormStore:
    """Norms by what they are computed from.

    Thread-safe: of an entry nothing changes but that its norm goes. Holds no parameter alive: a norm goes when the memory of the first
    of its tensors does. What is left of an entry goes, and so does the norm of a tensor that is gone while another has its memory,
    when as many entries again were added.

    Args:
        counters: counts what happens.

    Attributes:
        optimizer_steps: how many any optimizer made. A norm from before the last one is stale.
    """

    def __init__(self, counters: NormCounters) -> None:
        self.counters = counters
        self._entries: dict[Any, Entry] = {}
        self._squares: dict[Any, Entry] = {}
        # By the id of a tensor: the norms that read it and serve any forward. Those that are gone may be among them.
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
        """The norm of these tensors, if there is one that cannot be stale. The caller counts what it reuses.

        Args:
            signature: how it is computed.
            tensors: what it is computed from.
            recomputing: whether it is wanted by a forward that records gradients within a backward.
            streams: of the call that reads it, which wait for the norm where another stream computes it.
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
            if recomputing and not entry.recorded:  # the region's forward, which is reentrant, recorded nothing itself
                self._put(key, replace(entry, recorded=True))
            if entry.ready is not None and streams is not None:
                streams.read(norm, entry.ready)
            return norm
        self.counters.count_invalidated(reason or "a parameter's data was replaced")
        self._end(key)
        return None

    def entries(self, norms: Iterable[tuple[str, Sequence[torch.Tensor]]]) -> list[Entry] | None:
        """What is kept of several norms that serve any forward; None if one is not there.

        Args:
            norms: signature and tensors of each, as for :meth:`kept`.
        """
        known = [self._entries.get((signature, *map(id, tensors))) for signature, tensors in norms]
        entries = [entry for entry in known if entry is not None and not entry.recorded]
        return entries if len(entries) == len(known) else None

    def observe(self, signature: str, tensors: Sequence[torch.Tensor], recorded: bool = False) -> Observed | None:
        """Call it before computing a norm that is to be kept. None if one of the tensors cannot be watched.

        Args:
            signature, tensors: as for :meth:`kept`.
            recorded: whether the forward records gradients, so that the norm may serve its recomputation only.
        """
        self._watch_optimizers()
        if not watchable(tensors):
            return None
        key = (signature, *map(id, tensors))
        return Observed(key, _watch(self._entries, key, tensors), self.optimizer_steps, recorded)

    def keep(self, observed: Observed | None, norm: torch.Tensor, streams: Streams | None = None) -> None:
        """Keep a norm that was computed since; nothing happens if the tensors cannot be watched.

        Args:
            streams: of the call that computed it, and all others that it keeps.
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
        """Forget an entry, and its norm, whoever else knows the entry; whether there was one."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            entry.norm = None
        return entry is not None

    def _purge(self) -> None:
        """Forget what is left of tensors that are gone, whenever there are twice as many entries as were left last time."""
        if len(self._entries) + len(self._squares) < self._purge_at:
            return
        for entries in (self._entries, self._squares):
            known = list(entries.items())
            dead = [key for key, entry in known if entry.norm is None]
            for key in (*dead, *without_tensor([(key, entry.watch) for key, entry in known])):
                entry = entries.pop(key, None)
                if entry is not None:
                    entry.norm = None
        readers: dict[int, set[Any]] = {}
        for key, entry in list(self._entries.items()):
            for tensor in () if entry.recorded else key[1:]:
                readers.setdefault(tensor, set()).add(key)
        self._readers = readers
        self._purge_at = max(_FEW_ENTRIES, 2 * (len(self._entries) + len(self._squares)))

    def squares(
        self,
        weight: torch.Tensor,
        transposed: bool,
        dtype: torch.dtype,
        compute: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor | None:
        """The squared row norms of a weight, kept; None where it is trained or cannot be watched to the last write.

        Args:
            weight: the parameter ``[d_out, d_in]``, or its transpose.
            transposed: whether its columns are the rows of the norm.
            dtype: of the squares.
            compute: makes the ``[d_out]`` squares.
        """
        key = (transposed, id(weight), dtype)
        if weight.requires_grad or weight.device.type != "cpu" or not watchable([weight]):
            self._squares.pop(key, None)
            return None
        entry = self._squares.get(key)
        if entry is not None and entry.norm is not None and not entry.watch.change([weight]):
            return entry.norm
        self._watch_optimizers()
        watch = _watch(self._squares, key, [weight], _SQUARE_SAMPLES)
        entry = Entry(compute(weight), watch, 0)
        with self._lock:
            self._purge()
            self._squares[key] = entry
        return entry.norm

    def recorded(self, values: Sequence[Any]) -> None:
        """Forget the norms that read one of a graph's inputs, but those that were kept for a recomputation: a forward of that graph
        records gradients, so that an optimizer will write to them."""
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
        """Forget the norm of these tensors, if it is kept: a forward records gradients."""
        key = (signature, *map(id, tensors))
        entry = self._entries.get(key)
        if self._end(key) and entry is not None and not entry.recorded:
            self.counters.count_invalidated(_RECORDED)

    def invalidate(self, tensors: Sequence[torch.Tensor]) -> int:
        """Forget every norm that was computed from one of these tensors, or their parts; returns how many."""
        ids = set(map(id, parts(tensors)))
        stale = [key for key in list(self._entries) if ids.intersection(key[1:])]
        kept = [entry for entry in map(self._entries.get, stale) if entry is not None]
        # Without a norm are those of tensors that died, whose id another may have.
        forgotten = sum(entry.norm is not None for entry in kept)
        for key in stale:
            self._end(key)
        for square in [key for key in list(self._squares) if key[1] in ids]:
            self._squares.pop(square, None)
        if forgotten:
            self.counters.count_invalidated("the user invalidated it", forgotten)
        return forgotten

    def clear(self) -> None:
        """Forget all norms."""
        with self._lock:
            for key in list(self._entries):
                self._end(key)
            self._squares.clear()
            self._readers.clear()

    def __len__(self) -> int:
        """How many norms are kept."""
        return sum(entry.norm is not None for entry in list(self._entries.values()))

    def _watch_optimizers(self) -> None:
        if self._watching:
            return
        self._watching = True
        from torch.optim.optimizer import register_optimizer_step_post_hook

        def stepped(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            self.optimizer_steps += 1
            if self._squares:
                written = {id(p) for group in optimizer.param_groups for p in group["params"]}
                for key in [key for key in list(self._squares) if key[1] in written]:
                    self._squares.pop(key, None)

        register_optimizer_step_post_hook(stepped)


def _watch(
    entries: dict[Any, Entry], key: tuple[Any, ...], tensors: Sequence[torch.Tensor], samples: int = SAMPLES
) -> Watch:
    """What the tensors are; the norm of their entry goes when the memory of one does."""

    def forget(_: Any) -> None:
        entry = entries.get(key)
        if entry is not None:
            entry.norm = None

    return Watch(tensors, forget, samples)


_PROCESS_STORE = NormStore(rewrite_log().norms)


def norm_store() -> NormStore:
    """The store of this process: graphs of one model share it, so that a prefill refreshes what decoding reuses."""
    return _PROCESS_STORE
