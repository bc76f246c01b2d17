"""Memory: what replaces a value lies in memory as the value did, and shares it with nobody with whom the value did not.

Both show: ``view`` asks for strides, ``reshape`` gives a view or a copy by them, a dropout draws its mask in their order, and a
caller may write to what a program returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from dorafx import _compat
from dorafx._compat.distributed import placements
from dorafx.lift import tensor_of

from .nodes import CannotEmit, NodeEmitter

__all__ = ["laid_out_like", "separate_outputs", "strides_of"]


def strides_of(tensor: torch.Tensor) -> tuple[str, ...]:
    """The strides of the axes that have some length, in a form that compares without a guard on symbolic ones."""
    return tuple("" if _is_one(size) else str(stride) for size, stride in zip(tensor.shape, tensor.stride()))


def _is_one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def laid_out_like(emit: NodeEmitter, original: fx.Node, made: fx.Node) -> fx.Node:
    """``made``, or a copy of it, with the strides of the value that it replaces.

    Raises:
        CannotEmit: the value lies in memory as no copy does (broadcast, or with gaps).
    """
    wanted, found = tensor_of(original), tensor_of(made)
    if wanted is None or found is None or placements(wanted) is not None or _is_empty(wanted):
        return made
    if strides_of(wanted) == strides_of(found):
        return made
    order = _outermost_first(wanted.shape, wanted.stride())
    inverse = [order.index(axis) for axis in range(len(order))]
    if order == inverse == list(range(len(order))):
        copy = emit.method("contiguous", made)
    else:
        copy = emit.method("permute", emit.method("contiguous", emit.method("permute", made, order)), inverse)
    if strides_of(emit.tensor(copy)) != strides_of(wanted):
        raise CannotEmit(
            f"the original's result has the strides {tuple(wanted.stride())} for the shape {tuple(wanted.shape)}, which "
            "no result of the rewrite has"
        )
    return copy


def _is_empty(tensor: torch.Tensor) -> bool:
    return any(isinstance(size, int) and size == 0 for size in tensor.shape)


def _outermost_first(sizes: Sequence[Any], strides: Sequence[Any]) -> list[int]:
    """The axes in the order in which they lie in memory; those of one element where they stand."""
    long = [axis for axis, size in enumerate(sizes) if not _is_one(size)]
    ordered = iter(sorted(long, key=lambda axis: -_compat.size_hint(strides[axis])))
    return [next(ordered) if axis in long else axis for axis in range(len(sizes))]


def separate_outputs(original: fx.Graph, graph: fx.Graph, copied: Mapping[fx.Node, fx.Node]) -> None:
    """Give each result of a rewritten graph memory of its own, where it shares some with another result or with an input and
    the original's did not.

    Args:
        original: the graph before the rewrite.
        graph: changed in place.
        copied: original node -> the node that stands for it.
    """
    before, after = _results(original), _results(graph)
    shared_before = _shared(_Memory(original), before)
    memory = _Memory(graph)
    for old, new in copied.items():
        # A copy is a view of its arguments where the original node is; what is new says so itself.
        if old.name == new.name and old.target == new.target:
            for argument in old.all_input_nodes:
                if _storage(old) is not None and _storage(old) == _storage(argument) and argument in copied:
                    memory.join(new, copied[argument])
    shared_after = _shared(memory, after)
    output = _output(graph)
    copies: dict[int, fx.Node] = {}
    for i, node in enumerate(after):
        if shared_after[i] <= shared_before[i] | copies.keys():
            continue
        with graph.inserting_before(output):
            copies[i] = graph.call_method("clone", (node,))
        copies[i].meta = _copied_meta(node)
    if copies:
        position = iter(range(len(after)))
        output.args = fx.node.map_arg(output.args, lambda node: copies.get(next(position), node))


class _Memory:
    """Which nodes of a graph share memory."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self._parents: dict[Any, Any] = {}
        for node in graph.nodes:
            storage = _storage(node)
            if storage is not None:
                self.join(node, storage)

    def join(self, one: Any, other: Any) -> None:
        self._parents[self.of(one)] = self.of(other)

    def of(self, item: Any) -> Any:
        """What stands for the memory of a node."""
        while self._parents.get(item, item) != item:
            item = self._parents[item]
        return item


def _output(graph: fx.Graph) -> fx.Node:
    outputs: list[fx.Node] = graph.find_nodes(op="output")
    return outputs[0]


def _results(graph: fx.Graph) -> list[fx.Node]:
    """The nodes that a graph returns, one for each time that it does."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        found.append(node)
        return node

    fx.node.map_arg(_output(graph).args, note)
    return found


def _storage(node: fx.Node) -> int | None:
    tensor = tensor_of(node)
    return None if tensor is None or placements(tensor) is not None else _compat.storage_id(tensor)


def _shared(memory: _Memory, results: list[fx.Node]) -> list[set[Any]]:
    """For each result the earlier results (by position) and the inputs (by name) that it shares memory with."""
    of_inputs: dict[Any, set[Any]] = {}
    for node in memory.graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            of_inputs.setdefault(memory.of(node), set()).add(node.name)
    places = [memory.of(node) for node in results]
    return [
        of_inputs.get(place, set()) | {j for j in range(i) if places[j] == place or results[j] is results[i]}
        for i, place in enumerate(places)
    ]


def _copied_meta(node: fx.Node) -> dict[str, Any]:
    meta = dict(node.meta)
    for slot in ("example_value", "val"):
        value = meta.get(slot)
        if isinstance(value, torch.Tensor):
            mode = _compat.fake_mode_of(value)
            if mode is not None:
                with mode:
                    meta[slot] = value.clone()
    return meta
