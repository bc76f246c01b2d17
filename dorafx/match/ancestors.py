"""What is computed by way of a low-rank product, however many operators stand in between."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple
from weakref import WeakKeyDictionary

from torch import fx

from dorafx.graphs.operators import canonical_name
from dorafx.graphs.tensors import tensor_of
from dorafx.graphs.writes import memories
from dorafx.lift import Lifter, MatrixValue, holds_product
from dorafx.lift.algebra import count_matrices

NEAR = 6
_SUMS = frozenset({"add", "sub", "rsub", "addmm", "baddbmm", "addcmul", "lerp"})


class _Behind(NamedTuple):
    """``distance``: operators between a node and the nearest product that it is made of; None where there is none. ``added``: whether
    something was added to a product on the way."""

    distance: int | None = None
    added: bool = False


_Operands = Callable[[fx.Node], list[fx.Node]]
_known: WeakKeyDictionary[Lifter, tuple[dict[fx.Node, _Behind], _Operands]] = WeakKeyDictionary()


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
    return behind.distance <= near or ((added or behind.added) and lift.weights.depends_on_parameters_only(node))


def _behind(lift: Lifter, node: fx.Node) -> _Behind:
    """Each node of a graph is looked at once, whatever asks for it."""
    if lift not in _known:
        _known[lift] = {}, _operands_with_writes(lift)
    known, operands = _known[lift]
    stack, entered = [node], set()
    while stack:
        at = stack[-1]
        missing = [argument for argument in operands(at) if argument not in known and argument not in entered]
        if at not in known and missing:
            entered.add(at)
            stack.extend(missing)
            continue
        stack.pop()
        if at not in known:
            known[at] = _of_arguments(lift, at, operands(at), known)
    return known[node]


def _operands_with_writes(lift: Lifter) -> _Operands:
    """What a node is made of: its operands, and what is written into its memory."""
    written: dict[fx.Node, list[fx.Node]] = {}
    for memory in memories(lift.graph) if lift.written else ():
        if memory.writers:
            own = set(memory.values)
            sources = [a for writer in memory.writers for a in writer.all_input_nodes if a not in own]
            written.update(dict.fromkeys(memory.values, sources))
    return lambda node: [*node.all_input_nodes, *written.get(node, ())]


def _of_arguments(lift: Lifter, node: fx.Node, operands: list[fx.Node], known: dict[fx.Node, _Behind]) -> _Behind:
    nearest: int | None = None
    added = False
    for argument in operands:
        distance, before = known.get(argument, _Behind())  # none of its own while a write leads back to it
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
