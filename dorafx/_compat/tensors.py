"""Private API of tensors and their storages: what one is made of, and whether it is still the same."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["is_wrapper", "storage_address", "weak_storage", "weak_storage_id", "wrapped"]


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
