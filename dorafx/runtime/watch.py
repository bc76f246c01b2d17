"""Watching tensors: what one was when something was computed from it, and whether it still is."""

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

from dorafx._compat.distributed import fully_sharded_process
from dorafx._compat.tensors import Geometry, is_wrapper, version_of, weak_storage, wrapped

SAMPLES = 8


class TensorState:
    """What a tensor was when a norm was computed from it. Holds neither the tensor nor its memory.

    Checked before every decoding step and for every layer, when the step has just washed the caches: few objects are
    touched, and samples are compared where they lie.

    A version counter says that nothing was written through *this* tensor and its views, so the tensor has to be the one that
    was seen: another object on the same memory (``nn.Parameter(p.data)``) has a counter of its own, which may well stand where
    the first one's stood, and an address that is free again when the first is gone. A weak reference would tell them apart, but
    ``torch.utils.swap_tensors``, which is how torch moves and casts the parameters of quantised models, refuses a tensor that has
    one. So what is held is the dictionary of the tensor's attributes. It belongs to one tensor and goes where its content goes:
    while it is held no other tensor can have it, and after a swap the object that a program still calls by the same name has the
    other tensor's. It does not hold the tensor, unless an attribute does: where one is anything that may refer to others
    (bitsandbytes' ``quant_state``), there is a weak reference after all.
    """

    __slots__ = ("attributes", "pointer", "reference", "samples", "storage", "storage_size", "version")

    def __init__(self, tensor: torch.Tensor, on_death: Callable[[Any], None], samples: int = SAMPLES) -> None:
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
        self.samples = [(view, _of(bytes(view), tensor.element_size())) for view in _views(tensor, samples)]

    def change(self, tensor: torch.Tensor) -> str:
        """What differs now, but for the geometry; empty if nothing does."""
        if tensor.__dict__ is not self.attributes and (self.reference is None or self.reference() is not tensor):
            return "another parameter"
        if version_of(tensor) != self.version:
            return "a parameter was written"
        storage = tensor.untyped_storage()
        if self.storage() is not storage or tensor.data_ptr() != self.pointer or storage.nbytes() != self.storage_size:
            return "a parameter's data was replaced"
        # From here on the memory is known to be the tensor's still.
        for view, sample in self.samples:
            if view != sample:
                return "a parameter's data was overwritten"
        return ""


class Watch:
    """What several tensors were when something was computed from them."""

    __slots__ = ("geometry", "states")

    def __init__(
        self, tensors: Sequence[torch.Tensor], on_death: Callable[[Any], None], samples: int = SAMPLES
    ) -> None:
        """
        Args:
            tensors: that :func:`watchable` allows.
            on_death: called when the memory of one is gone.
            samples: how many elements of each are compared, at least.
        """
        self.states = [TensorState(t, on_death, samples) for t in tensors]
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
    """That tensors still are what their states say, of hundreds at a time.

    Asks what :meth:`Watch.change` asks, a question of all tensors at once: it runs no Python a tensor, which is most of what a
    decoding step costs the host. So it cannot say which of them changed, and how.

    Whoever holds one has to know when the memory of one of the tensors is gone: storages are told apart by their address here.

    Args:
        tensors: each once.
        states: of each.
    """

    __slots__ = (
        "_alike",
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
        self._views = [view for state in states for view, _ in state.samples]
        self._samples = [sample for state in states for _, sample in state.samples]

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether nothing differs.

        Args:
            tensors: in the order in which they were given.
        """
        if list(map(version_of, tensors)) != self._versions:
            return False
        alike: Iterable[torch.Tensor] = tensors
        if self._referenced:
            if not all(reference() is tensors[k] for k, reference in self._referenced):
                return False
            alike = map(tensors.__getitem__, self._alike)
        # A state holds the dictionary, this holds the states: whose tensor is gone is told by counting who holds a dictionary.
        if not all(map(operator.is_, map(_attributes_of, alike), map(_attributes_seen, self._states))):
            return False
        if list(map(torch.Tensor.data_ptr, tensors)) != self._pointers:
            return False
        if list(map(id, map(torch.Tensor.untyped_storage, tensors))) != self._storages:
            return False
        # From here on the memory is known to be the tensors' still.
        return self._views == self._samples and self._geometry.holds(tensors)


class _Alone:
    """Holds a dictionary that nobody else does, as a state does when its tensor is gone."""

    __slots__ = ("attributes",)

    def __init__(self) -> None:
        self.attributes: dict[str, Any] = {}


_alone = _Alone()
_OTHERS = sys.getrefcount(_alone.attributes) - 1
"""References to a dictionary that are counted beside those of its holders."""


def without_tensor(watches: Iterable[tuple[Any, Watch]]) -> list[Any]:
    """The keys of the watches of which a tensor is gone, though another may have its memory still."""
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


_INTEGERS: dict[int, Literal["b", "h", "i", "q"]] = {1: "b", 2: "h", 4: "i", 8: "q"}


def _views(tensor: torch.Tensor, samples: int) -> list[memoryview[int]]:
    """Elements spread over a CPU tensor, as integers in its memory (NaN equals itself then). The views do not own it."""
    if tensor.device.type != "cpu" or not tensor.numel() or tensor.element_size() not in _INTEGERS:
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
    """Between two of at least ``samples`` elements, if there are as many. Not a multiple of the rows' length: all samples
    would come from one column, and with a power of two from one set of the cache."""
    distance = max(1, numel // samples)
    whole = distance // inner
    if whole:  # five eighths of a row further each time: every eighth of the columns is met
        return (whole - 1) * inner + (5 * inner // 8 | 1)
    return distance


def _inner_length(tensor: torch.Tensor) -> int:
    """Elements along the dimension that is contiguous in memory."""
    return max((n for n, stride in zip(tensor.shape, tensor.stride()) if stride == 1), default=1)


def _is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements lie side by side in memory, each once, in whatever order of dimensions."""
    expected = 1
    for stride, length in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n > 1):
        if stride != expected:
            return False
        expected *= length
    return True


def _memory(address: int, count: int, size: int) -> memoryview[int]:
    return _of((ctypes.c_byte * (count * size)).from_address(address), size)


def _of(buffer: Any, size: int) -> memoryview[int]:
    return memoryview(buffer).cast("B").cast(_INTEGERS[size])


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def parts(tensors: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors among some values, with the plain ones that it is made of in the place of each wrapper (a torchao weight)."""
    plain: list[torch.Tensor] = []
    for tensor in tensors:
        if type(tensor) in _PLAIN:
            plain.append(tensor)
        elif isinstance(tensor, torch.Tensor):
            plain.extend(parts(wrapped(tensor)) if is_wrapper(tensor) else (tensor,))
    return plain


def watchable(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether changes of these show: tensors made under inference mode count no versions, and the memory of a subclass may
    be anywhere. Under FSDP2 nothing of a parameter shows what was gathered into it, and which tensors are its parameters
    only its own lists tell; there none is watched. So processes agree, too, on whether a norm is computed: those of weights
    that they share need all of them."""
    if fully_sharded_process():
        return False
    return not any(t.is_inference() or not _owns_its_memory(type(t)) for t in tensors)


def _owns_its_memory(kind: type) -> bool:
    """Whether a tensor of this class is its own storage: bitsandbytes' parameters only carry attributes besides."""
    if kind.__module__.startswith("bitsandbytes."):
        return kind.__name__ in ("Params4bit", "Int8Params")
    return kind in _PLAIN
