"""Norms by the contents of what they were computed from: a kept norm is right for the same bytes, whoever wrote them and when.

The memory of a weight is read several times faster than the weight is multiplied by anything, so a forward that would compute a norm
compares contents instead of guessing who may have written to a parameter. Nothing else is asked: no version counter, no optimizer, no
gradient mode. What can go wrong is a collision of two 128-bit hashes (XXH3), which nothing in training or serving brings about.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import xxhash

from dorafx._compat.tensors import geometry

from .watch import memory, owns_its_memory

# Memory between the elements of a slice is hashed with them, up to this many times their own.
_GAPS = 4

Content = tuple[Any, ...]
"""Of some tensors: the geometry, and a hash of the bytes of each."""


class Contents:
    """Reads the contents of tensors, each of them once. To be used within one call, in which nothing is written."""

    def __init__(self) -> None:
        self._known: dict[int, Content | None] = {}

    def of(self, tensors: Sequence[torch.Tensor]) -> Content | None:
        """The content of tensors; None if some of them is not on a CPU, or has its data anywhere but in its own memory."""
        parts = []
        for tensor in tensors:
            if id(tensor) not in self._known:
                self._known[id(tensor)] = _content(tensor)
            part = self._known[id(tensor)]
            if part is None:
                return None
            parts.append(part)
        return tuple(parts)


class NormsByContent:
    """The last norm of each place in a program, with the content that it was computed from. Thread-safe. Keeps no parameter alive.

    A place is named by how the norm is computed, and by the identities of the tensors that it is computed from; the norm is right for
    its content alone, whether or not these are still the same tensors.

    Args:
        limit: bytes of norms that are kept; beyond, those that were used longest ago are removed (of a model that is gone, say).
    """

    def __init__(self, limit: int = 2**26) -> None:
        self._limit = limit
        self._norms: OrderedDict[Any, tuple[Content, torch.Tensor]] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, place: Any, content: Content) -> torch.Tensor | None:
        """The norm that is kept for a place, if it was computed from this content."""
        with self._lock:
            kept = self._norms.get(place)
            if kept is None or kept[0] != content:
                return None
            self._norms.move_to_end(place)
            return kept[1]

    def keep(self, place: Any, content: Content, norm: torch.Tensor) -> None:
        """Keep a norm that was computed from this content, in place of the one before."""
        with self._lock:
            self._remove(place)
            self._norms[place] = content, norm
            self._bytes += norm.nbytes
            while self._bytes > self._limit and len(self._norms) > 1:
                self._remove(next(iter(self._norms)))

    def _remove(self, place: Any) -> None:
        kept = self._norms.pop(place, None)
        if kept is not None:
            self._bytes -= kept[1].nbytes

    def clear(self) -> None:
        """Remove all norms."""
        with self._lock:
            self._norms.clear()
            self._bytes = 0

    def __len__(self) -> int:
        return len(self._norms)


def span_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """The address and the number of the bytes that hold a tensor's elements, with those in between; None if its data is anywhere but in
    its own memory, or much of what is in between is not its own."""
    if tensor.layout != torch.strided or not owns_its_memory(type(tensor)):
        return None
    if not tensor.numel():
        return 0, 0
    size = tensor.element_size()
    span = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride()))
    try:
        there = tensor.untyped_storage().nbytes() - tensor.storage_offset() * size
    except (RuntimeError, NotImplementedError):  # a tensor of a transform has no storage
        return None
    # Wrappers for several processes free a parameter's memory by resizing its storage.
    if span > _GAPS * tensor.numel() or span * size > there:
        return None
    return tensor.data_ptr(), span * size


def _content(tensor: torch.Tensor) -> Content | None:
    span = span_of(tensor) if tensor.device.type == "cpu" else None
    return None if span is None else (geometry(tensor), xxhash.xxh3_128_digest(memory(*span)))
