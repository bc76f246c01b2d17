"""Watching tensors: whether a tensor is unchanged since something was computed from it."""

from __future__ import annotations

import ctypes
import gc
import operator
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
import xxhash

from dorafx._compat.distributed import fully_sharded_process
from dorafx._compat.tensors import Geometry, is_wrapper, version_of, weak_storage, wrapped

SAMPLES = 8
"""The least number of elements of a tensor that are compared."""
_WHOLE_BYTES = 2**16
_WHOLE_SHARE = 128
"""A tensor is compared whole if it has at most ``_WHOLE_BYTES``, or this part of the bytes of all that a norm is computed from: then it
is a factor of low rank, and reading it costs a hundredth of the decoding step that reads all of them."""


class TensorState:
    """The state of a tensor when a norm was computed from it. Keeps neither the tensor nor its memory alive.

    It is checked for every layer before every decoding step, when the previous step has just evicted the CPU's caches. So the check
    touches few objects, and compares in place: a hash of small tensors (64-bit XXH3), samples of large ones.

    A version counter says that nothing was written through *this* tensor and its views, so it must be the same tensor: another
    object on the same memory (``nn.Parameter(p.data)``) has a counter of its own, which may have the same value, and it may get the
    address of the first one when that is gone. A weak reference would tell the two apart, but ``torch.utils.swap_tensors``, with
    which torch moves and casts the parameters of quantised models, refuses tensors that have one.

    So this holds the dictionary of the tensor's attributes, which belongs to one tensor and moves with its content. While it is
    held, no other tensor can have it; and after a swap, the object under the same name has the other tensor's dictionary. It does
    not keep the tensor alive, unless an attribute refers to the tensor. Therefore a weak reference is used after all if an attribute
    is anything that can refer to other objects (bitsandbytes' ``quant_state``).
    """

    __slots__ = (
        "attributes",
        "bytes",
        "digest",
        "pointer",
        "reference",
        "samples",
        "storage",
        "storage_size",
        "version",
    )

    def __init__(self, tensor: torch.Tensor, on_death: Callable[[Any], None], whole: bool = False) -> None:
        self.attributes: dict[str, Any] | None = None
        self.reference: weakref.ref[torch.Tensor] | None = None
        if any(map(gc.is_tracked, tensor.__dict__.values())):
            self.reference = weakref.ref(tensor, on_death)
        else:
            self.attributes = tensor.__dict__
        self.version = version_of(tensor)
        self.pointer = tensor.data_ptr()
        self.storage = weak_storage(tensor, on_death)
        self.storage_size = tensor.untyped_storage().nbytes()
        whole = whole and is_read(tensor) and _is_dense(tensor)
        self.bytes = memory(tensor.data_ptr(), tensor.nbytes) if whole else b""
        self.digest = xxhash.xxh3_64_intdigest(self.bytes)
        views = [] if self.bytes else _views(tensor, SAMPLES)
        self.samples = [(view, _of(bytes(view), tensor.element_size())) for view in views]

    def change(self, tensor: torch.Tensor) -> str:
        """What has changed, apart from the geometry; empty if nothing has."""
        if tensor.__dict__ is not self.attributes and (self.reference is None or self.reference() is not tensor):
            return "another parameter"
        if version_of(tensor) != self.version:
            return "a parameter was written"
        storage = tensor.untyped_storage()
        if self.storage() is not storage or tensor.data_ptr() != self.pointer or storage.nbytes() != self.storage_size:
            return "a parameter's data was replaced"
        # Only now is it safe to read the samples: the memory is known to be still the tensor's.
        if self.bytes and xxhash.xxh3_64_intdigest(self.bytes) != self.digest:
            return "a parameter's data was overwritten"
        for view, sample in self.samples:
            if view != sample:
                return "a parameter's data was overwritten"
        return ""


class Watch:
    """The states of several tensors when something was computed from them."""

    __slots__ = ("geometry", "states")

    def __init__(self, tensors: Sequence[torch.Tensor], on_death: Callable[[Any], None]) -> None:
        """
        Args:
            tensors: tensors that are :func:`watchable`.
            on_death: called when the memory of one of them is gone.
        """
        most = max(_WHOLE_BYTES, sum(t.nbytes for t in tensors) // _WHOLE_SHARE)
        self.states = [TensorState(t, on_death, t.nbytes <= most) for t in tensors]
        self.geometry = Geometry(tensors)

    def change(self, tensors: Sequence[torch.Tensor]) -> str:
        """Why what was computed is stale; empty if it is not."""
        for state, tensor in zip(self.states, tensors):
            reason = state.change(tensor)
            if reason:
                return reason
        # `p.data = p.data.t()` has the same memory and the same version.
        return "" if self.geometry.holds(tensors) else "a parameter's shape, strides or dtype changed"


_attributes_of = operator.attrgetter("__dict__")
_attributes_seen = operator.attrgetter("attributes")


class WatchedTogether:
    """Checks hundreds of tensors against their states at once.

    It makes the checks of :meth:`Watch.change`, each one for all tensors together. So no Python code runs for each tensor, which is
    most of what a decoding step costs the host; but it cannot say which of them changed, and how.

    The owner must notice itself when the memory of one of the tensors is gone: storages are compared by their address here.

    Args:
        tensors: the tensors, each of them once.
        states: the state of each.
    """

    __slots__ = (
        "_alike",
        "_bytes",
        "_digests",
        "_geometry",
        "_pointers",
        "_referenced",
        "_samples",
        "_states",
        "_storages",
        "_versions",
        "_views",
    )

    def __init__(self, tensors: Sequence[torch.Tensor], states: Sequence[TensorState]) -> None:
        self._geometry = Geometry(tensors)
        self._states = states
        self._alike = [k for k, state in enumerate(states) if state.reference is None]
        self._referenced = [(k, state.reference) for k, state in enumerate(states) if state.reference is not None]
        if self._referenced:
            self._states = [states[k] for k in self._alike]
        self._versions = [state.version for state in states]
        self._pointers = [state.pointer for state in states]
        self._storages = [id(state.storage()) for state in states]
        whole = [state for state in states if state.bytes]
        self._bytes = [state.bytes for state in whole]
        self._digests = [state.digest for state in whole]
        self._views = [view for state in states for view, _ in state.samples]
        self._samples = [sample for state in states for _, sample in state.samples]

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether nothing has changed.

        Args:
            tensors: the tensors in the same order as before.
        """
        if list(map(version_of, tensors)) != self._versions:
            return False
        alike: Iterable[torch.Tensor] = tensors
        if self._referenced:
            if not all(reference() is tensors[k] for k, reference in self._referenced):
                return False
            alike = map(tensors.__getitem__, self._alike)
        # Compared by way of the states, without holding the dictionaries here: :func:`without_tensor` counts who holds them.
        if not all(map(operator.is_, map(_attributes_of, alike), map(_attributes_seen, self._states))):
            return False
        if list(map(torch.Tensor.data_ptr, tensors)) != self._pointers:
            return False
        if list(map(id, map(torch.Tensor.untyped_storage, tensors))) != self._storages:
            return False
        # Only now is it safe to read the samples: the memory is known to be still the tensors'.
        if list(map(xxhash.xxh3_64_intdigest, self._bytes)) != self._digests or self._views != self._samples:
            return False
        return self._geometry.holds(tensors)


class _Alone:
    """Holds a dictionary that nothing else holds, like a state whose tensor is gone."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}


_alone = _Alone()
_OTHERS = sys.getrefcount(_alone.attributes) - 1
"""References to a dictionary that ``getrefcount`` counts in addition to those of its holders."""


def without_tensor(watches: Iterable[tuple[Any, Watch]]) -> list[Any]:
    """The keys of the watches of which a tensor is gone, even if another tensor still has its memory."""
    known = list(watches)
    holders = Counter(id(state.attributes) for _, watch in known for state in watch.states)
    return [
        key
        for key, watch in known
        if any(
            state.attributes is not None
            and sys.getrefcount(state.attributes) <= holders[id(state.attributes)] + _OTHERS
            for state in watch.states
        )
    ]


def is_read(tensor: torch.Tensor) -> bool:
    """Whether the host reads elements of a tensor. On a device it would have to wait for them."""
    return tensor.device.type == "cpu"


_INTEGERS: dict[int, Literal["b", "h", "i", "q"]] = {1: "b", 2: "h", 4: "i", 8: "q"}


def _views(tensor: torch.Tensor, samples: int) -> list[memoryview[int]]:
    """Elements spread over a CPU tensor, viewed as integers (so that NaN equals itself). The views do not own the memory."""
    if not is_read(tensor) or not tensor.numel() or tensor.element_size() not in _INTEGERS:
        return []
    numel, size, start = tensor.numel(), tensor.element_size(), tensor.data_ptr()
    if _is_dense(tensor):
        distance = _distance(numel, _inner_length(tensor), samples)
        return [_memory(start, numel, size)[::distance]]
    views = []
    for k in range(min(samples, numel)):
        position, offset = k * numel // min(samples, numel), 0
        for length, stride in zip(reversed(tensor.shape), reversed(tensor.stride())):
            position, index = divmod(position, length)
            offset += index * stride
        views.append(_memory(start + offset * size, 1, size))
    return views


def _distance(numel: int, inner: int, samples: int) -> int:
    """The distance between samples, for at least ``samples`` of them if there are as many elements. It is no multiple of the rows'
    length: then all samples would be in one column, and for a power of two in one set of the cache."""
    distance = max(1, numel // samples)
    whole = distance // inner
    if whole:  # five eighths of a row further each time, so that every eighth of the columns is sampled
        return (whole - 1) * inner + (5 * inner // 8 | 1)
    return distance


def _inner_length(tensor: torch.Tensor) -> int:
    """Elements along the dimension that is contiguous in memory."""
    return max((n for n, stride in zip(tensor.shape, tensor.stride()) if stride == 1), default=1)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill their memory without gaps or overlaps, in any order of dimensions."""
    expected = 1
    for stride, length in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n > 1):
        if stride != expected:
            return False
        expected *= length
    return True


def _memory(address: int, count: int, size: int) -> memoryview[int]:
    return _of(memory(address, count * size), size)


def memory(address: int, size: int) -> ctypes.Array[ctypes.c_byte]:
    """``size`` bytes of a CPU's memory, which this does not own."""
    return (ctypes.c_byte * size).from_address(address)


def _of(buffer: Any, size: int) -> memoryview[int]:
    return memoryview(buffer).cast("B").cast(_INTEGERS[size])


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def parts(tensors: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among some values; each wrapper subclass (a torchao weight) is replaced by its inner plain tensors."""
    plain: list[torch.Tensor] = []
    for tensor in tensors:
        if type(tensor) in _PLAIN:
            plain.append(tensor)
        elif isinstance(tensor, torch.Tensor):
            plain.extend(parts(wrapped(tensor)) if is_wrapper(tensor) else (tensor,))
    return plain


def watchable(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether changes of these tensors can be noticed. Tensors created in inference mode have no version counter, and the memory of
    a subclass may be anywhere. Under FSDP2 no tensor is watched: a parameter does not show what was gathered into it, and only
    FSDP2's own lists tell which tensors are its parameters. This also makes the processes agree on whether a norm is computed, which
    matters because norms of shared weights need all of them."""
    if fully_sharded_process():
        return False
    return not any(t.is_inference() or not owns_its_memory(type(t)) for t in tensors)


def owns_its_memory(kind: type) -> bool:
    """Whether tensors of this class have their data in their own storage. bitsandbytes' parameters do: they only have attributes in
    addition."""
    if kind.__module__.startswith("bitsandbytes."):
        return kind.__name__ in ("Params4bit", "Int8Params")
    return kind in _PLAIN
