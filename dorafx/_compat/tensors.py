"""Private API of tensors and their storages: what one is made of, and whether it is still the same."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "FakeLayout",
    "flattened",
    "is_wrapper",
    "storage_address",
    "unflattened",
    "weak_storage",
    "weak_storage_id",
    "wrapped",
]


def storage_address(storage: torch.UntypedStorage) -> int:
    """:func:`dorafx._compat.storage_id`, of a storage that one has already."""
    return int(storage._cdata)


def weak_storage(tensor: torch.Tensor) -> Any:
    """A weak reference to a tensor's storage: no other storage has the same address while it is kept."""
    from torch.multiprocessing.reductions import StorageWeakRef

    return StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]


def weak_storage_id(reference: Any) -> int:
    """What :func:`dorafx._compat.storage_id` gives for tensors of the storage that a :func:`weak_storage` stands for."""
    return int(reference.cdata)


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
        made = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        if alias is not None:
            made.set_(alias.untyped_storage(), self.offset, self.shape, self.stride)
        made.requires_grad_(self.requires_grad)
        return FakeTensor(mode, made, self.device)
