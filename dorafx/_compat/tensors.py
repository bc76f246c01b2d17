"""Private API of tensors and their storages: what one is made of, and whether it is still the same."""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor


def weak_storage(tensor: torch.Tensor, on_death: Callable[[Any], None]) -> weakref.ref[torch.UntypedStorage]:
    """A weak reference to a tensor's storage, which torch keeps as one Python object while the memory lives: calling it gives
    what ``tensor.untyped_storage()`` gives. Nobody looks for references to storages where they refuse those to tensors."""
    return weakref.ref(tensor.untyped_storage(), on_death)


class Geometry:
    """How tensors read their memory: shapes, strides, dtypes, and whether signs are flipped on the way (a lazy negation).

    Dynamo's own check of its inputs compares all of that in one call; what it takes for a difference may be one of the mode
    that it runs in (inference mode, autocast), so that is looked at again, tensor by tensor.
    """

    __slots__ = ("_check", "_exact")

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._exact = list(map(_geometry, tensors))
        self._check = _geometry_check(tensors)

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether nothing of it differs."""
        if self._check is not None and self._check(*tensors):
            return True
        if list(map(_geometry, tensors)) != self._exact:
            return False
        self._check = _geometry_check(tensors)
        return True


def _geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg(), tensor.is_conj()


def _geometry_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """Dynamo's check that tensors are like these; None where this torch has none that takes the same arguments."""
    try:
        from torch._C._dynamo.guards import TensorGuards

        sizes: Any = [list(t.shape) for t in tensors]
        strides: Any = [list(t.stride()) for t in tensors]
        check: Callable[..., bool] = TensorGuards(
            *tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides
        ).check
    except (ImportError, TypeError, ValueError, RuntimeError, SystemError):
        return None
    return check


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a subclass that is made of other tensors, and has no memory of its own."""
    return torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor)


def wrapped(tensor: Any) -> list[torch.Tensor]:
    """What a :func:`is_wrapper` is made of."""
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def flattened(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of nested containers, those of other libraries that are registered as pytrees included, and the structure around
    them, whose ``str()`` is equal for equal structures."""
    from torch.utils._pytree import tree_flatten

    return tree_flatten(tree)


def unflattened(leaves: list[Any], structure: Any) -> Any:
    """Undo :func:`flattened`."""
    from torch.utils._pytree import tree_unflatten

    return tree_unflatten(leaves, structure)


class FakeLayout(NamedTuple):
    """What a strided fake tensor of known sizes is, but for its storage. Equal ones are equal to every operator's shape rule."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(tensor: Any) -> FakeLayout | None:
        """The layout of a tensor; None where that does not say all: of other classes, with symbolic sizes, of another layout, a
        lazily conjugated or negated one, or one whose value is known."""
        if type(tensor) is not FakeTensor or tensor.layout is not torch.strided or tensor.is_complex():
            return None
        stride: Any = tensor.stride()
        offset: Any = tensor.storage_offset()
        if not all(type(size) is int for size in (*tensor.shape, *stride, offset)):
            return None
        if tensor.is_neg() or tensor.constant is not None or tensor.is_inference():
            return None
        return FakeLayout(tensor.shape, stride, offset, tensor.dtype, tensor.device, tensor.requires_grad)

    def made(self, mode: Any, alias: torch.Tensor | None = None) -> torch.Tensor:
        """A fake tensor of this layout: on the storage of ``alias``, where one is given, else on one of its own."""
        fake = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        if alias is not None:
            fake.set_(alias.untyped_storage(), self.offset, self.shape, self.stride)
        fake.requires_grad_(self.requires_grad)
        return FakeTensor(mode, fake, self.device)


version_of: Callable[[torch.Tensor], int] = operator.attrgetter("_version")
"""How often a tensor's memory was written to, through it and its views."""


def storage_id(tensor: torch.Tensor) -> int:
    """A number that tensors of one storage share. Fake tensors have no data pointer, so the storage object's is taken; the
    wrappers of ``torch.func``'s transforms have no storage but that of what they wrap."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata)


def is_known(condition: Any) -> bool:
    """Whether a condition holds; where sizes that only running tells decide about it, no. Other symbolic sizes are guarded."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(condition))


def size_hint(value: Any) -> Any:
    """The number that a symbolic size or scalar had when it was traced, without a guard on it; anything else as it is."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint if value.node.has_hint() else 3
    return value


def fake_mode() -> Any:
    """A mode in which operators compute shapes only; ``from_tensor`` brings a tensor into it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@contextlib.contextmanager
def under(mode: Any) -> Iterator[None]:
    """Run operators on fake tensors in their mode; on tensors as they are where there is None. Sizes that are symbols are for the
    Python dispatcher alone in some versions (2.11: "Cannot call numel() on tensor with symbolic sizes")."""
    if mode is None:
        yield
        return
    from torch._dispatch.python import enable_python_dispatcher

    with mode, enable_python_dispatcher():
        yield


def needs_values(error: Exception) -> bool:
    """Whether an operator cannot be run on fake tensors: what it does depends on a tensor's numbers, or nobody wrote a fake kernel."""
    from torch._subclasses import fake_tensor as fake

    return isinstance(
        error, (fake.DataDependentOutputException, fake.DynamicOutputShapeException, fake.UnsupportedOperatorException)
    )


def fake_mode_of(value: Any) -> Any:
    """The mode of a fake tensor, or of the fake tensors inside a tensor subclass; None for anything else."""
    from torch._subclasses.fake_tensor import maybe_get_fake_mode

    return maybe_get_fake_mode(value)
