"""In-place arithmetic on a value that nobody else can see is out-of-place arithmetic: ``y = linear(x, W); y /= n; y *= m``.

The lifter treats whatever is written as unknown. This pass first takes out the writes that have a plain equivalent, so
that sequential compositions lift like any other.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dorafx import _compat

from .effects import written_arguments
from .targets import canonical_name

__all__ = ["private_writes", "without_private_writes"]

_OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    operator.iadd: torch.add,
    operator.isub: torch.sub,
    operator.imul: torch.mul,
    operator.itruediv: torch.div,
    "add_": torch.add,
    "sub_": torch.sub,
    "mul_": torch.mul,
    "div_": torch.div,
    **{
        getattr(getattr(torch.ops.aten, f"{name}_"), overload): getattr(torch, name)
        for name in ("add", "sub", "mul", "div")
        for overload in ("Tensor", "Scalar")
    },
}
# Operators whose result is a fresh tensor, so that a write to it is seen by nobody else.
_FRESH = frozenset({"linear", "matmul", "addmm", "add", "sub", "rsub", "mul", "div", "neg", "dequantize"})


def _tensor(node: Any) -> torch.Tensor | None:
    value = node.meta.get("example_value", node.meta.get("val")) if isinstance(node, fx.Node) else None
    return value if isinstance(value, torch.Tensor) else None


def _is_fresh(node: fx.Node) -> bool:
    if node.target in ("clone", torch.clone) or (
        _compat.is_overload(node.target) and _compat.aten_name(node.target) == "clone"
    ):
        return True
    return canonical_name(node) in _FRESH


def private_writes(graph: fx.Graph) -> set[int]:
    """The storages that are written only by arithmetic with an out-of-place twin, that an operator of this graph made,
    and that no view shares before the last write."""
    writes: dict[int, bool] = {}
    last: dict[int, int] = {}
    for i, node in enumerate(graph.nodes):
        for argument in written_arguments(node):
            tensor = _tensor(argument)
            if tensor is None:
                continue
            storage = _compat.storage_id(tensor)
            known = node.target in _OUT_OF_PLACE and len(node.args) == 2 and not node.kwargs
            writes[storage] = writes.get(storage, True) and known
            last[storage] = i
    private = {storage for storage, known in writes.items() if known}
    if not private:
        return private
    for i, node in enumerate(graph.nodes):
        tensor = _tensor(node)
        if tensor is None or _compat.storage_id(tensor) not in private:
            continue
        if node.target in _OUT_OF_PLACE or (_is_fresh(node) and not _shares(node)):
            continue
        if i > last[_compat.storage_id(tensor)]:
            continue  # a view of what will not be written again
        private.discard(_compat.storage_id(tensor))
    return private


def _shares(node: fx.Node) -> bool:
    """Whether a result lies in the storage of one of its inputs (a cast that changes nothing returns its input)."""
    tensor = _tensor(node)
    assert tensor is not None
    mine = _compat.storage_id(tensor)
    return any((t := _tensor(a)) is not None and _compat.storage_id(t) == mine for a in node.all_input_nodes)


def without_private_writes(graph: fx.Graph, private: set[int]) -> None:
    """Replace the writes to these storages by their out-of-place twins, in a graph of one's own."""
    version: dict[int, fx.Node] = {}
    superseded: dict[fx.Node, int] = {}

    def current(node: fx.Node) -> fx.Node:
        return version[superseded[node]] if node in superseded else node

    for node in list(graph.nodes):
        if version:
            node.args = fx.node.map_arg(node.args, current)
            node.kwargs = fx.node.map_arg(node.kwargs, current)
        tensor = _tensor(node)
        if tensor is None or _compat.storage_id(tensor) not in private:
            continue
        if node.target in _OUT_OF_PLACE:
            with graph.inserting_before(node):
                twin = graph.call_function(_OUT_OF_PLACE[node.target], node.args)
                twin.meta = dict(node.meta)
                # In place, the result keeps its dtype whatever is added to it.
                cast = graph.call_method("to", (twin, tensor.dtype))
                cast.meta = dict(node.meta)
            node.replace_all_uses_with(cast)
            graph.erase_node(node)
            node = cast
        elif not _is_fresh(node) or _shares(node):
            continue  # a view after the last write
        version[_compat.storage_id(tensor)] = node
        superseded[node] = _compat.storage_id(tensor)
