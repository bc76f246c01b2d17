"""The norms that one graph takes from the store, looked at together: a decoding step takes hundreds, and a call of Python for each
would cost the host more than launching the step does."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .store import Entry, NormStore
from .streams import Ready, Streams
from .watch import WatchedTogether

_norm_of = operator.attrgetter("norm")


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a call took from the store.

    Attributes:
        numbers: the graph's own numbers that the norms depend on.
        streams: the entries whose norm a stream computed, with their places, a list for each stream.
    """

    entries: list[Entry]
    numbers: list[Any]
    watch: WatchedTogether
    optimizer_steps: int
    streams: list[list[tuple[int, Ready]]]


class Together:
    """What one graph took from the store. It serves several layers if they are alike, so there is one of each for each layer.

    Args:
        store: that the norms are kept in.
    """

    def __init__(self, store: NormStore) -> None:
        self._store = store
        self._seen: dict[int, _Seen] = {}

    def norms(self, tensors: Sequence[torch.Tensor], numbers: list[Any], streams: Streams) -> list[Any] | None:
        """All of the graph's norms, where an earlier call took them from the store and none can be stale since; else None, and
        :meth:`NormStore.kept` tells of each. The caller counts what it reuses.

        Args:
            tensors: what the norms are computed from, always in one order.
            numbers: what else they are computed from.
            streams: of the call.
        """
        seen = self._seen.get(_first(tensors))
        if seen is None or seen.optimizer_steps != self._store.optimizer_steps or seen.numbers != numbers:
            return None
        if not seen.watch.holds(tensors):
            return None
        norms: list[Any] = list(map(_norm_of, seen.entries))
        if any(map(operator.is_, norms, itertools.repeat(None))):
            return None
        for computed in seen.streams:
            if not streams.computes(norms[computed[0][0]], computed[0][1]):
                for k, ready in computed:
                    streams.read(norms[k], ready)
        return norms

    def remember(
        self,
        tensors: Sequence[torch.Tensor],
        numbers: list[Any],
        norms: Sequence[tuple[str, Sequence[torch.Tensor]]],
    ) -> None:
        """A call has just taken all norms from the store.

        Args:
            tensors, numbers: as for :meth:`norms`.
            norms: signature and tensors of each, as for :meth:`NormStore.kept`.
        """
        steps, entries = self._store.optimizer_steps, self._store.entries(norms)
        if entries is None:
            return
        of_entries = list(zip(entries, (of for _, of in norms)))
        states = {id(tensor): state for entry, of in of_entries for tensor, state in zip(of, entry.watch.states)}
        watch = WatchedTogether(tensors, [states[id(tensor)] for tensor in tensors])
        # Asked once more, since it holds the shapes that there are now: another thread may have written meanwhile.
        if any(entry.optimizer_steps != steps or entry.watch.change(of) for entry, of in of_entries):
            return
        streams: dict[Any, list[tuple[int, Ready]]] = {}
        for k, entry in enumerate(entries):
            if entry.ready is not None:
                streams.setdefault(entry.ready.stream, []).append((k, entry.ready))
        key = _first(tensors)
        if key not in self._seen:
            self._forget()
        self._seen[key] = _Seen(entries, numbers, watch, steps, [*streams.values()])

    def _forget(self) -> None:
        """What serves no more: its tensors may be gone."""
        for key, seen in list(self._seen.items()):
            if seen.entries[0].norm is None:
                self._seen.pop(key, None)


def _first(tensors: Sequence[torch.Tensor]) -> int:
    return id(tensors[0]) if tensors else 0
