"""The norms that one graph takes from the store, checked together: a decoding step takes hundreds of norms, and a Python call for each
would cost the host more than launching the step."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .store import Entry, NormStore
from .streams import Ready, Streams
from .watch import WatchedTogether

_norm_of = operator.attrgetter("norm")


@dataclass(frozen=True, eq=False)
class _Seen:
    """What a call took from the store.

    Attributes:
        numbers: the graph's inputs that are numbers and that the norms depend on.
        streams: for each stream, the positions of the entries whose norm it computed, and when that is ready.
    """

    entries: list[Entry]
    numbers: list[Any]
    watch: WatchedTogether
    optimizer_steps: int
    streams: list[list[tuple[int, Ready]]]


class Taken(NamedTuple):
    """What a call may take from the store: the norms, their entries, and the streams that computed them (see :class:`_Seen`)."""

    norms: list[Any]
    entries: list[Entry]
    computed: list[list[tuple[int, Ready]]]

    def read(self, streams: Streams) -> list[Any]:
        """The norms, for reading them on the streams of a call."""
        for computed in self.computed:
            if not streams.computes(self.norms[computed[0][0]], computed[0][1]):
                for k, ready in computed:
                    streams.read(self.norms[k], ready)
        return self.norms


class Together:
    """What calls of one graph took from the store. A graph may serve several equal layers, so there is a record for each of them.

    Args:
        store: the store in which the norms are kept.
    """

    def __init__(self, store: NormStore) -> None:
        self._store = store
        self._seen: dict[tuple[int, ...], _Seen] = {}

    def taken(self, tensors: Sequence[torch.Tensor], numbers: list[Any]) -> Taken | None:
        """All of the graph's norms, if an earlier call took them from the store and the host has seen no change since. Else None; then
        use :meth:`NormStore.kept` for each norm. The caller counts what it reuses.

        Args:
            tensors: what the norms are computed from, always in the same order.
            numbers: the numbers they are also computed from.
        """
        seen = self._seen.get(_first(tensors))
        if seen is None or seen.optimizer_steps != self._store.optimizer_steps or seen.numbers != numbers:
            return None
        if not seen.watch.holds(tensors):
            return None
        norms: list[Any] = list(map(_norm_of, seen.entries))
        if any(map(operator.is_, norms, itertools.repeat(None))):
            return None
        return Taken(norms, seen.entries, seen.streams)

    def remember(
        self,
        tensors: Sequence[torch.Tensor],
        numbers: list[Any],
        norms: Sequence[tuple[str, Sequence[torch.Tensor]]],
    ) -> None:
        """Note that a call has just taken all norms from the store.

        Args:
            tensors, numbers: as for :meth:`norms`.
            norms: the signature and tensors of each, as for :meth:`NormStore.kept`.
        """
        steps, entries = self._store.optimizer_steps, self._store.entries(norms)
        if entries is None:
            return
        watched = list(zip(entries, (sources for _, sources in norms)))
        states = {id(t): state for entry, sources in watched for t, state in zip(sources, entry.watch.states)}
        watch = WatchedTogether(tensors, [states[id(tensor)] for tensor in tensors])
        # Checked once more, because the watch has recorded the present shapes: another thread may have written meanwhile.
        if any(entry.optimizer_steps != steps or entry.watch.change(sources) for entry, sources in watched):
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
        """Drop records that are no longer usable: their tensors may be gone."""
        for key, seen in list(self._seen.items()):
            if seen.entries[0].norm is None:
                self._seen.pop(key, None)


def _first(tensors: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """Of the tensors of the first norm, at least of some: replicated layers share a weight."""
    return tuple(map(id, tensors[:3]))
