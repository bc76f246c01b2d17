"""What is computed by way of a low-rank product, however many operators stand in between."""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import fx

from dorafx.graphs.operators import canonical_name
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Lifter, MatrixValue, holds_product
from dorafx.lift.algebra import count_matrices

NEAR = 6
_SUMS = frozenset({"add", "sub", "rsub", "addmm", "baddbmm", "addcmul", "lerp"})


class _Behind(NamedTuple):
    """``distance``: operators between a node and the nearest product that it is made of; None where there is none. ``added``: whether
    something was added to a product on the way."""

    distance: int | None = None
    added: bool = False


_known: WeakKeyDictionary[Lifter, dict[fx.Node, _Behind]] = WeakKeyDictionary()


def is_behind(lift: Lifter, node: fx.Node, added: bool, near: int = NEAR) -> bool:
    """Whether a node is made of a product of two matrices: of one nearby; or of any, to which a weight is added, by way of parameters alone.

    Args:
        lift: the terms, as far as there are any.
        node: a node that is lifted.
        added: whether a weight is added to the node itself.
        near: how many operators away a product may be if nothing is known to be added.
    """
    behind = _behind(lift, node)
    if behind.distance is None:
        return False
    return behind.distance <= near or ((added or behind.added) and lift.depends_on_parameters_only(node))


def _behind(lift: Lifter, node: fx.Node) -> _Behind:
    """Each node of a graph is looked at once, whatever asks for it."""
    known = _known.setdefault(lift, {})
    stack = [node]
    while stack:
        at = stack[-1]
        missing = [argument for argument in at.all_input_nodes if argument not in known]
        if at not in known and missing:
            stack.extend(missing)
            continue
        stack.pop()
        if at not in known:
            known[at] = _of_arguments(lift, at, known)
    return known[node]


def _of_arguments(lift: Lifter, node: fx.Node, known: dict[fx.Node, _Behind]) -> _Behind:
    nearest: int | None = None
    added = False
    for argument in node.all_input_nodes:
        distance, before = known[argument]
        value = lift.batches.get(argument) or lift.matrix(argument) or lift.values.get(argument)
        if holds_product(value) and isinstance(value, MatrixValue) and value.layout in ("last", "filter", "batch"):
            distance, before = 0, any(count_matrices(chain) == 1 for (_, chain), _ in value.expr.items)
        if distance is not None:
            nearest = distance + 1 if nearest is None else min(nearest, distance + 1)
            added |= before
    if nearest is not None and canonical_name(node) in _SUMS:
        added |= sum(map(_is_matrix, node.all_input_nodes)) > 1
    return _Behind(nearest, added)


def _is_matrix(node: fx.Node) -> bool:
    """Whether a node has rows and columns, and is no identity."""
    tensor = tensor_of(node)
    return tensor is not None and tensor.dim() >= 2 and canonical_name(node) != "eye"
