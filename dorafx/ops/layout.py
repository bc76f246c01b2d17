"""The layout of what operators return: one rule, from which kernels allocate and which compilers are told.

Results are dense, start at offset 0, and have their dimensions in the order of the operands' strides, as ATen's pointwise
operators have it: the first operand decides, later ones where it does not (it is broadcast along a dimension). A dimension of
size 1 has no say, whatever its stride, and lies where it would in a contiguous tensor; ATen's own kernels and their fake
versions differ there. So the result of contiguous operands is contiguous, and that of transposed ones is transposed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dorafx._compat.tensors import is_known

_known = is_known


def strides(shape: Sequence[int], *operands: torch.Tensor | None) -> tuple[int, ...]:
    """The strides of a result of this shape, contiguous ones where no operand is given; those that are None do not count.
    Sizes may be symbolic.

    Args:
        operands: tensors whose shapes broadcast to ``shape``, the most important first.
    """
    operand_strides = [_broadcast_strides(shape, t) for t in operands if t is not None and t.dim() > 1]
    order = _order(shape, operand_strides) if operand_strides else list(range(len(shape)))
    result, stride = [1] * len(shape), 1
    for dim in reversed(order):
        result[dim] = stride
        # As torch has it, an empty dimension counts as one of size 1.
        n = shape[dim]
        stride = stride * (max(n, 1) if isinstance(n, int) else torch.sym_max(n, 1))
    return tuple(result)


def empty(
    shape: Sequence[int], *operands: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A new tensor in the layout that :func:`strides` gives."""
    return torch.empty_strided(tuple(shape), strides(shape, *operands), dtype=dtype, device=device)


def settled(tensor: torch.Tensor, *operands: torch.Tensor | None) -> torch.Tensor:
    """The tensor, or where it lies otherwise than :func:`strides` gives, a copy."""
    target = strides(tensor.shape, *operands)
    if all(_known(a == b) for a, b in zip(tensor.stride(), target)):
        return tensor
    return tensor.new_empty_strided(tuple(tensor.shape), target).copy_(tensor)


def owned(tensor: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
    """The tensor, or where it is one of the inputs (which a cast to the same dtype returns as it is), a copy."""
    return tensor.clone() if any(tensor is t for t in inputs) else tensor


def _broadcast_strides(shape: Sequence[int], tensor: torch.Tensor) -> list[int]:
    """The tensor's strides along each dimension of ``shape``; 0 where it is broadcast."""
    missing = len(shape) - tensor.dim()
    present = (0 if _known(n == 1) else stride for n, stride in zip(tensor.shape, tensor.stride()))
    return [*[0] * missing, *present]


def _order(shape: Sequence[int], operand_strides: Sequence[Sequence[int]]) -> list[int]:
    """Dimensions, the outermost first."""
    inward: list[int] = []
    for dim in reversed(range(len(shape))):
        if _known(shape[dim] == 1):
            continue
        place = len(inward)
        for i in reversed(range(len(inward))):
            decision = _compare(shape, operand_strides, inward[i], dim)
            if decision > 0:
                place = i
            elif decision < 0:
                break
        inward.insert(place, dim)
    for dim in reversed(range(len(shape))):
        if _known(shape[dim] == 1):
            inward.insert(inward.index(dim + 1) + 1 if dim + 1 < len(shape) else 0, dim)
    return inward[::-1]


def _compare(shape: Sequence[int], operand_strides: Sequence[Sequence[int]], a: int, b: int) -> int:
    """Positive where dimension ``a`` lies outside of ``b``, negative where it lies inside, 0 where nothing decides."""
    for along in operand_strides:
        if _known(along[a] == 0) or _known(along[b] == 0):
            continue
        if _known(along[a] < along[b]):
            return -1
        if _known(along[a] > along[b]) or _known(shape[a] > shape[b]):
            return 1
    return 0
