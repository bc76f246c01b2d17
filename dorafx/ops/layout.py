"""The memory layout of operators' results: one rule for real kernels and for fake ones.

Results are dense and start at offset 0. Their dimensions are ordered by the operands' strides, as in ATen's pointwise operators: the
first operand decides, and the next one where the first is broadcast. A dimension of size 1 does not count, whatever its stride, and
goes where a contiguous tensor has it; ATen's own kernels and their fake versions disagree about these. So contiguous operands give
a contiguous result, and transposed operands a transposed one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dorafx._compat.tensors import is_known


def strides(shape: Sequence[int], *operands: torch.Tensor | None) -> tuple[int, ...]:
    """The strides of a result of this shape; contiguous if there are no operands (None is skipped). Sizes may be symbolic.

    Args:
        operands: tensors whose shapes broadcast to ``shape``, the most important first.
    """
    operand_strides = [_broadcast_strides(shape, t) for t in operands if t is not None and t.dim() > 1]
    order = _order(shape, operand_strides) if operand_strides else list(range(len(shape)))
    result, stride = [1] * len(shape), 1
    for dim in reversed(order):
        result[dim] = stride
        # As in torch, a dimension of size 0 counts as one of size 1.
        n = shape[dim]
        stride = stride * (max(n, 1) if isinstance(n, int) else torch.sym_max(n, 1))
    return tuple(result)


def empty(
    shape: Sequence[int], *operands: torch.Tensor | None, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A new tensor with the strides of :func:`strides`."""
    return torch.empty_strided(tuple(shape), strides(shape, *operands), dtype=dtype, device=device)


def settled(tensor: torch.Tensor, *operands: torch.Tensor | None) -> torch.Tensor:
    """The tensor itself if its strides are those of :func:`strides`, else a copy with these strides."""
    target = strides(tensor.shape, *operands)
    if all(is_known(a == b) for a, b in zip(tensor.stride(), target)):
        return tensor
    return tensor.new_empty_strided(tuple(tensor.shape), target).copy_(tensor)


def owned(tensor: torch.Tensor, *inputs: torch.Tensor | None) -> torch.Tensor:
    """The tensor itself, or a copy if it is one of the inputs: a cast to the same dtype returns its input."""
    return tensor.clone() if any(tensor is t for t in inputs) else tensor


def present(tensor: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """The tensor, or an empty one for None, which an operator cannot return; ``like``: a tensor of the same device."""
    return like.new_empty(0) if tensor is None else tensor


def _broadcast_strides(shape: Sequence[int], tensor: torch.Tensor) -> list[int]:
    """The tensor's stride along each dimension of ``shape``; 0 where it is broadcast."""
    missing = len(shape) - tensor.dim()
    known = (0 if is_known(n == 1) else stride for n, stride in zip(tensor.shape, tensor.stride()))
    return [*[0] * missing, *known]


def _order(shape: Sequence[int], operand_strides: Sequence[Sequence[int]]) -> list[int]:
    """The order of the dimensions in memory, outermost first."""
    inward: list[int] = []
    for dim in reversed(range(len(shape))):
        if is_known(shape[dim] == 1):
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
        if is_known(shape[dim] == 1):
            inward.insert(inward.index(dim + 1) + 1 if dim + 1 < len(shape) else 0, dim)
    return inward[::-1]


def _compare(shape: Sequence[int], operand_strides: Sequence[Sequence[int]], a: int, b: int) -> int:
    """Positive if dimension ``a`` is outside of ``b`` in memory, negative if it is inside, 0 if no operand decides."""
    for along in operand_strides:
        if is_known(along[a] == 0) or is_known(along[b] == 0):
            continue
        if is_known(along[a] < along[b]):
            return -1
        if is_known(along[a] > along[b]) or is_known(shape[a] > shape[b]):
            return 1
    return 0
