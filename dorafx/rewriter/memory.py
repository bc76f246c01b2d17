"""Memory: a replacement has the strides of the value that it replaces, and shares memory only with what shared that value's.

Both can be seen: ``view`` fails for some strides, ``reshape`` gives a view or a copy depending on them, a dropout draws its mask in
their order, and a caller may write to what a program returns.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dorafx._compat.distributed import placements
from dorafx._compat.tensors import size_hint
from dorafx.graphs.tensors import tensor_of
from dorafx.graphs.writes import storage_of
from dorafx.match import ReasonKind

from .nodes import CannotEmit, NodeEmitter


def _strides_of(tensor: torch.Tensor) -> tuple[str, ...]:
    """The strides of the axes that are longer than one, in a form that compares without a guard on symbolic ones."""
    return tuple("" if _is_one(size) else str(stride) for size, stride in zip(tensor.shape, tensor.stride()))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def laid_out_like(emit: NodeEmitter, original: fx.Node, replacement: fx.Node) -> fx.Node:
    """``replacement``, or a copy of it, with the strides of the value that it replaces.

    Raises:
        CannotEmit: no copy has the value's strides (it is broadcast, or has gaps).
    """
    expected, actual = tensor_of(original), tensor_of(replacement)
    if expected is None or actual is None or placements(expected) is not None:
        return replacement
    if _is_empty(expected) or _strides_of(expected) == _strides_of(actual):
        return _exactly(emit, expected, replacement)
    order = _outermost_first(expected.shape, expected.stride())
    inverse = [order.index(axis) for axis in range(len(order))]
    if order == inverse == list(range(len(order))):
        copy = emit.method("contiguous", replacement)
    else:
        copy = emit.method("permute", emit.method("contiguous", emit.method("permute", replacement, order)), inverse)
    if _strides_of(emit.tensor(copy)) != _strides_of(expected):
        raise CannotEmit(
            f"the original's result has the strides {tuple(expected.stride())} for the shape {tuple(expected.shape)}, which "
            "no result of the rewrite has",
            ReasonKind.STRIDES,
        )
    return _exactly(emit, expected, copy)


def _exactly(emit: NodeEmitter, expected: torch.Tensor, replacement: fx.Node) -> fx.Node:
    """The replacement with equal strides also for axes of one element and for empty tensors: they address nothing, but ``stride()`` shows
    them."""
    known = all(isinstance(n, int) for n in (*expected.shape, *expected.stride()))
    if not known or tuple(emit.tensor(replacement).stride()) == tuple(expected.stride()):
        return replacement
    return emit.method("as_strided", replacement, tuple(expected.shape), tuple(expected.stride()))


def _is_empty(tensor: torch.Tensor) -> bool:
    return any(isinstance(size, int) and size == 0 for size in tensor.shape)


def _outermost_first(sizes: Sequence[Any], strides: Sequence[Any]) -> list[int]:
    """The axes by their strides, the outermost first; axes of one element keep their positions."""
    long = [axis for axis, size in enumerate(sizes) if not _is_one(size)]
    ordered = iter(sorted(long, key=lambda axis: -size_hint(strides[axis])))
    return [next(ordered) if axis in long else axis for axis in range(len(sizes))]


class Ownership:
    """Gives each replacement memory of its own. An emitter makes one node for equal terms, and where the original had two tensors a
    caller may write to one of them.

    Args:
        graph: the graph before the rewrite.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._taken = {_storage(node) for node in graph.nodes} - {None}
        results = graph.find_nodes(op="output")[0].all_input_nodes
        self._results, self._result_storages = frozenset(results), Counter(map(_storage, results))
        del self._result_storages[None]

    def stays_inside(self, node: fx.Node) -> bool:
        """Whether no result of the original graph is this node or shares its memory. A result is given the tensor itself, others get
        copies: Inductor removes copies of one tensor where it can, and must not remove another result's."""
        return node not in self._results and _storage(node) not in self._result_storages

    def of(self, emit: NodeEmitter, original: fx.Node, replacement: fx.Node) -> fx.Node:
        """``replacement``, or a copy of it where its memory is another value's.

        Also a copy where it is a view, the original is none, and two results of the graph share the original's memory. AOT autograd
        recreates such results from their history of views, and gets that of a ``detach()`` of a view wrong (torch 2.13): it raises, or
        returns the transpose of a square matrix.
        """
        if _storage(replacement) is None:
            return replacement  # of a DTensor, or of a graph without values: nothing is known of its memory
        if not is_view(original) and (
            _storage(replacement) in self._taken
            or (is_view(replacement) and self._result_storages[_storage(original)] > 1)
        ):
            replacement = emit.method("clone", replacement)
        self._taken.add(_storage(replacement))
        return replacement


def is_view(node: fx.Node) -> bool:
    """Whether a value's memory is one of its operands'."""
    return _storage(node) is not None and _storage(node) in {_storage(argument) for argument in node.all_input_nodes}


def _storage(node: fx.Node) -> int | None:
    return None if placements(tensor_of(node)) is not None else storage_of(node)
