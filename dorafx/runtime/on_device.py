"""Norms by content on a device: contents are compared, and norms computed where they changed, by kernels. The host reads nothing, and does
not wait.

A graph keeps, for the tensors of each layer that it serves and for each stream that it runs on, the norms of the last call, and checksums
of what they were computed from (:mod:`dorafx.ops.triton.checksums`). A call makes new ones of both: nothing that is kept is ever written,
so what an earlier call, its backward or a CUDA graph reads stays as it was.

- In decoding, while the host's watch (:mod:`dorafx.runtime.watch`) holds, all factors are compared, and a part of each weight that is
  another one in every call. Where the watch does not hold, all bytes are compared.
- In long forwards all bytes are compared, of those norms whose products take longer than reading the weight does.
- A CUDA graph captures the comparison and the norms of the last call. Its replays compute norms that have changed since, at each replay.
- A norm that the kernels cannot compute (of a weight that is dequantised elsewhere, of experts) is compared in decoding too. Only for those
  the host reads which of them changed.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from dorafx._compat.tensors import geometry, weak_storage
from dorafx.ops import dispatch
from dorafx.plan.cost import BALANCE

from .content import span_of
from .store import Entry
from .streams import current_stream

_SAMPLED_BYTES = 2**20
"""A tensor is sampled if it has at least this many bytes, and more than half of all that its norm is computed from."""


class Source(NamedTuple):
    """What a norm is computed from.

    Attributes:
        tensors: all tensors, wrapper subclasses taken apart.
        operands: weight, left and right of a dense weight, views of the tensors; None for a norm that the kernels do not compute.
        numbers: the graph's numbers that it is computed from, too.
        scale, factor_dtype: see :func:`dorafx.ops.norm.row_norm`.
    """

    tensors: list[torch.Tensor]
    numbers: list[float]
    operands: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    scale: float
    factor_dtype: torch.dtype | None

    def worth_comparing(self) -> bool:
        """Whether the products of the norm take at least 1.5 times as long as reading its operands. A norm takes up to twice as long as
        its products; so a comparison, which reads, pays off if a third of the calls find nothing changed. Products of fp32 are three of
        tf32, each of half the rate."""
        if self.operands is None:
            return False
        weight, left, right = self.operands
        factors = self.factor_dtype or torch.promote_types(left.dtype, right.dtype)
        products = 6 if factors == torch.float32 else 1
        flops = products * 2 * weight.numel() * right.shape[0]
        return flops > 1.5 * BALANCE["cuda"] * sum(t.nbytes for t in self.operands)


class _Layout:
    """Where the tensors of some norms are, and what compares them. Keeps none of them alive.

    Args:
        sources: what each norm of the graph is computed from; None for those that are not compared.
        places: equal for the same memory that is read in the same way (:func:`_places`).

    Attributes:
        order: the positions of the compared norms. First come those that the kernels compute, with those of one launch side by side.
        kernels: how many the kernels compute.
        contents: equal for tensors whose checksums can be compared.
        phase: which chunks are sampled, on the device.
    """

    def __init__(self, sources: Sequence[Source | None], places: Any, device: torch.device) -> None:
        from dorafx.ops.triton.checksums import Checksums, GuardedNorms, Memory

        self.places = places
        compared = {i: source for i, source in enumerate(sources) if source is not None}
        launches: dict[Any, list[int]] = {}
        for i, source in compared.items():
            if source.operands is not None:
                key = dispatch.group_key(source.operands, source.scale), source.factor_dtype
                launches.setdefault(key, []).append(i)
        self.launches = list(launches.values())
        dense = [i for members in self.launches for i in members]
        self.kernels = len(dense)
        self.order = dense + [i for i in compared if compared[i].operands is None]
        memories = []
        for k, i in enumerate(self.order):
            spans = [span for span in map(span_of, compared[i].tensors) if span is not None]
            whole = max(_SAMPLED_BYTES, 1 + sum(size for _, size in spans) // 2)
            memories += [Memory(address, size, k, size >= whole) for address, size in spans if size]
        self.checksums = Checksums(memories, len(self.order), device)
        self.contents = (
            [(list(map(geometry, compared[i].tensors)), compared[i].numbers) for i in self.order],
            self.checksums.shape,
        )
        self.guarded = GuardedNorms(
            [operands for i in dense if (operands := compared[i].operands) is not None],
            [compared[i].scale for i in dense],
            [compared[i].factor_dtype for i in dense],
            device,
        )
        self.phase = torch.zeros(1, dtype=torch.int64, device=device)


def _key(first: Sequence[torch.Tensor]) -> tuple[tuple[int, ...], Any]:
    """Of a record: equal layers share a graph, and replicated ones a weight. On a stream of its own nothing waits for another one."""
    return tuple(map(id, first)), current_stream(first[0].device)


def _places(sources: Sequence[Source | None]) -> Any:
    return [None if s is None else ([(t.data_ptr(), geometry(t)) for t in s.tensors], s.numbers) for s in sources]


@dataclass(frozen=True, eq=False)
class _Record:
    """What a call leaves to the next one.

    Attributes:
        sums: checksums of the contents.
        flat: the norms that the kernels compute, in one tensor.
        norms: all norms, in the layout's order.
        entries: the store's, whose watches tell whether the host has seen a change since; None if there are none.
        loaded: whether a call that trusted the host has run, so that a capture of the same loads no kernel.
        storages: of the first compared norm's tensors; the end of one is the record's.
    """

    layout: _Layout
    sums: torch.Tensor
    flat: torch.Tensor
    norms: list[torch.Tensor]
    entries: list[Entry] | None
    loaded: bool
    storages: list[weakref.ref[Any]]


class NormsOnDevice:
    """The norms of one graph on a device. Thread-safe.

    Args:
        few_tokens: whether the graph decodes.
    """

    def __init__(self, few_tokens: bool) -> None:
        self._few_tokens = few_tokens
        self._records: dict[Any, _Record] = {}
        self._captured: list[_Record] = []
        self._lock = threading.RLock()

    def norms(
        self,
        first: Sequence[torch.Tensor],
        sources: Callable[[], list[Source | None]],
        compute: Callable[[list[int]], list[torch.Tensor]],
        entries: list[Entry] | None,
        decodes: bool = True,
        captured: bool = False,
    ) -> dict[int, torch.Tensor]:
        """The norms as of the present contents, by position; the caller computes those that are absent.

        Args:
            first: the tensors that the first norm is computed from.
            sources: what each is computed from; None for those that cannot be compared. Called unless the host has seen no change.
            compute: computes the norms at some positions.
            entries: the store's entries of all norms, if their watches hold.
            decodes: whether the call may take norms that the host's watch allows. Else those are compared that are worth it.
            captured: whether a CUDA graph is being captured. Then nothing is kept.
        """
        decodes = decodes and self._few_tokens

        def forget(_: Any) -> None:
            """The memory of a tensor is gone."""
            self._records.pop(key, None)

        with self._lock, torch.inference_mode(False), torch.no_grad():
            device, key = first[0].device, _key(first)
            record = self._records.get(key)
            if captured and record is None:
                # A capture has a stream of its own, and begins when all others have finished.
                record = next((r for (ids, _), r in self._records.items() if ids == key[0]), None)
            trusted = decodes and record is not None and entries is not None and record.entries == entries
            if captured and not (trusted and record is not None and record.loaded):
                return {}
            given: Sequence[Source | None] = ()
            if trusted and record is not None:
                layout = record.layout
            else:
                given = [s if s is not None and (decodes or s.worth_comparing()) else None for s in sources()]
                if not any(given):
                    return {}
                places = _places(given)
                same = record is not None and record.layout.places == places
                layout = record.layout if same and record is not None else _Layout(given, places, device)
                if record is not None and record.layout.contents != layout.contents:
                    record = None
            sums, changed = layout.checksums.compare(None if record is None else record.sums, layout.phase, trusted)
            if record is None:
                norms = compute(layout.order)
                flat = torch.cat(norms[: layout.kernels]) if layout.kernels else sums.new_empty(0)
            else:
                norms, flat = self._where_changed(layout, record, changed, given, None if captured else compute)
            if captured and record is not None:
                self._captured.append(record)  # every replay reads its memory
            else:
                storages = [] if record is None else record.storages
                if record is None:
                    tensors = next(s.tensors for s in given if s is not None)
                    storages = [weak_storage(t, forget) for t in tensors]
                loaded = record is not None and (record.loaded or trusted)
                self._records[key] = _Record(layout, sums, flat, norms, entries, loaded, storages)
            return dict(zip(layout.order, norms))

    def keep(self, first: Sequence[torch.Tensor], entries: list[Entry] | None) -> None:
        """Note the store's entries of the norms of the last call. Their watches must have begun before that call."""
        with self._lock:
            record = self._records.get(_key(first))
            if record is not None:
                self._records[_key(first)] = replace(record, entries=entries)

    def _where_changed(
        self,
        layout: _Layout,
        before: _Record,
        changed: torch.Tensor,
        given: Sequence[Source | None],
        compute: Callable[[list[int]], list[torch.Tensor]] | None,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The norms, computed where a flag says so: all of them, or without ``compute`` those that the kernels compute."""
        if not given or self._few_tokens:
            flat = layout.guarded.norms(changed, before.flat, layout.phase)
            norms = list(torch.split(flat, layout.guarded.sizes))
        else:
            flat, norms, place = before.flat.clone(), [], 0
            for members in layout.launches:
                some = [source for i in members if (source := given[i]) is not None]
                operands = [source.operands for source in some if source.operands is not None]
                into = flat[place : place + len(operands) * operands[0][0].shape[0]]
                flags = changed[len(norms) : len(norms) + len(operands)]
                norms += dispatch.row_norms_where(flags, into, operands, some[0].scale, some[0].factor_dtype)
                place += into.numel()
        rest = layout.order[layout.kernels :]
        if rest and compute is not None:
            flags_of_rest = changed[layout.kernels :].tolist()
            computed = dict(zip(rest, before.norms[layout.kernels :]))
            again = [i for i, flag in zip(rest, flags_of_rest) if flag]
            computed.update(zip(again, compute(again) if again else ()))
            norms += computed.values()
        return norms, flat
