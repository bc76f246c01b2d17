"""Private API of tensors and their storages: identity, layout, wrapper subclasses and fake tensors."""

from __future__ import annotations

import contextlib
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor


def weak_storage(tensor: torch.Tensor, on_death: Callable[[Any], None]) -> weakref.ref[torch.UntypedStorage]:
    """A weak reference to a tensor's storage, which is one Python object as long as the memory lives; calling it returns
    ``tensor.untyped_storage()``. Code that refuses tensors with weak references (``swap_tensors``) does not check storages."""
    return weakref.ref(tensor.untyped_storage(), on_death)


class Geometry:
    """How tensors read their memory: shapes, strides, dtypes, lazy negation and conjugation.

    Dynamo's check of its inputs compares all of this in one call, but may also fail because the mode differs (inference mode,
    autocast); after a failure the tensors are compared one by one.
    """

    __slots__ = ("_check", "_exact")

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._exact = list(map(geometry, tensors))
        self._check = _geometry_check(tensors)

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the geometry of the tensors is unchanged."""
        if self._check is not None and self._check(*tensors):
            return True
        if list(map(geometry, tensors)) != self._exact:
            return False
        self._check = _geometry_check(tensors)
        return True


def geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    """How a tensor reads its memory, but for where it begins: equal for tensors that make the same values of the same bytes."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.is_neg(), tensor.is_conj()


def _geometry_check(tensors: Sequence[torch.Tensor]) -> Callable[..., bool] | None:
    """Dynamo's check that tensors are like these; None if this torch has none with these arguments."""
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
    """Whether a tensor is a wrapper subclass: it consists of other tensors, and has no memory of its own."""
    return torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor)


def wrapped(tensor: Any) -> list[torch.Tensor]:
    """The inner tensors of a wrapper subclass (see :func:`is_wrapper`)."""
    return [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]


def flattened(tree: Any) -> tuple[list[Any], Any]:
    """The leaves of nested containers (all that are registered as pytrees), and their structure, whose ``str()`` is equal for equal
    structures."""
    from torch.utils._pytree import tree_flatten

    return tree_flatten(tree)


def unflattened(leaves: list[Any], structure: Any) -> Any:
    """Undo :func:`flattened`."""
    from torch.utils._pytree import tree_unflatten

    return tree_unflatten(leaves, structure)


class FakeLayout(NamedTuple):
    """A strided fake tensor of known sizes, without its storage. No operator's shape rule distinguishes tensors of equal layouts."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(tensor: Any) -> FakeLayout | None:
        """The layout of a tensor; None if it is not described completely by it: another class, symbolic sizes, not strided, complex,
        lazily negated, with a known value, or made in inference mode."""
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
        """A fake tensor of this layout, on the storage of ``alias`` if given, else on a new one."""
        fake = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        if alias is not None:
            fake.set_(alias.untyped_storage(), self.offset, self.shape, self.stride)
        fake.requires_grad_(self.requires_grad)
        return FakeTensor(mode, fake, self.device)


version_of: Callable[[torch.Tensor], int] = operator.attrgetter("_version")
"""A tensor's version: how often its memory was written, through it and its views."""


def storage_id(tensor: torch.Tensor) -> int:
    """A number that is equal for tensors of one storage: the address of the storage object, as fake tensors have no data pointer. The
    wrappers of ``torch.func``'s transforms have the storage of the tensor that they wrap."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return int(tensor.untyped_storage()._cdata)


def is_known(condition: Any) -> bool:
    """Whether a condition holds; False if it depends on sizes that are known only at run time. Other symbolic sizes are guarded."""
    if isinstance(condition, bool):
        return condition
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(condition))


def size_hint(value: Any) -> Any:
    """The traced value of a symbolic size or scalar, without a guard on it; anything else unchanged."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint if value.node.has_hint() else 3
    return value


def fake_mode() -> Any:
    """A mode in which operators compute shapes only; ``from_tensor`` brings a tensor into it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode()


@contextlib.contextmanager
def under(mode: Any) -> Iterator[None]:
    """Run operators in a fake mode; without any if it is None. The Python dispatcher is enabled because some versions support symbolic
    sizes only there (2.11: "Cannot call numel() on tensor with symbolic sizes")."""
    if mode is None:
        yield
        return
    from torch._dispatch.python import enable_python_dispatcher

    with mode, enable_python_dispatcher():
        yield


def needs_values(error: Exception) -> bool:
    """Whether an operator cannot be run on fake tensors: its result depends on a tensor's values, or it has no fake kernel."""
    from torch._subclasses import fake_tensor as fake

    return isinstance(
        error, (fake.DataDependentOutputException, fake.DynamicOutputShapeException, fake.UnsupportedOperatorException)
    )


def fake_mode_of(value: Any) -> Any:
    """The mode of a fake tensor, or of the fake tensors inside a tensor subclass; None for anything else."""
    from torch._subclasses.fake_tensor import maybe_get_fake_mode

    return maybe_get_fake_mode(value)
