"""Which values of a graph change under our feet: in-place writes and everything that shares storage with them."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from dorafx import _compat

__all__ = ["written_nodes"]

_INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in ("iadd", "isub", "imul", "itruediv", "imatmul", "ipow", "ifloordiv", "imod", "iand", "ior", "ixor")
) | {operator.setitem}

# Function -> position of ``max_norm``.
_RESCALE_THEIR_TABLE = {"embedding": 3, "embedding_bag": 3}


def written_arguments(node: fx.Node) -> Iterator[Any]:
    """The arguments of a node that it writes to."""
    if "out" in node.kwargs:
        yield node.kwargs["out"]
    if not node.args:
        return
    if node.op == "call_method":
        name = str(node.target)
        if (name.endswith("_") and not name.endswith("__") and name != "requires_grad_") or name == "__setitem__":
            yield node.args[0]
    elif node.op == "call_function":
        yield from _written_by_bodies(node)
        schema = _compat.operator_schema(node.target)
        if schema is not None:
            for argument, value in zip(schema.arguments, node.args):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    yield value
        elif node.target in _INPLACE_OPERATORS:
            yield node.args[0]
        elif getattr(node.target, "__module__", "") != "_operator":  # and_, or_ and not_ are named after keywords
            name = getattr(node.target, "__name__", "")
            if name in _RESCALE_THEIR_TABLE and _rescales(node):
                yield node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
            elif (name.endswith("_") and not name.endswith("__")) or _asks_inplace(node):
                yield node.args[0]


def _written_by_bodies(node: fx.Node) -> Iterator[Any]:
    """What a higher-order operator (activation checkpointing, ``nested_compile_region``) has its body write to."""
    module = node.graph.owning_module
    for argument in node.args if module is not None else ():
        if not isinstance(argument, fx.Node) or argument.op != "get_attr":
            continue
        body = getattr(module, str(argument.target), None)
        if not isinstance(body, fx.GraphModule):
            continue
        inside = written_nodes(body.graph)
        given = [n in inside for n in body.graph.nodes if n.op == "placeholder"]
        operands = node.args[_compat.body_operands_start(node.target) :]
        known = _compat.takes_operands_for_body(node.target) and len(operands) == len(given)
        # Where it is not known which operand is which input, it may be any.
        yield from (
            (operand for operand, is_written in zip(operands, given) if is_written)
            if known
            else (operands if any(given) else ())
        )


def _rescales(node: fx.Node) -> bool:
    """``F.embedding(i, table, padding_idx, max_norm)`` brings the rows that it looks up to that norm, in the table."""
    position = _RESCALE_THEIR_TABLE[node.target.__name__]  # type: ignore[union-attr]
    return node.kwargs.get("max_norm", node.args[position] if len(node.args) > position else None) is not None


@functools.cache
def _inplace_position(target: Any) -> int | None:
    try:
        return list(inspect.signature(target).parameters).index("inplace")
    except (TypeError, ValueError):
        return None


def _asks_inplace(node: fx.Node) -> bool:
    """``F.dropout(x, 0.1, True, True)`` and its like write to their first argument."""
    if node.kwargs.get("inplace") is True:
        return True
    position = _inplace_position(node.target)
    return position is not None and len(node.args) > position and node.args[position] is True


def written_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Every node whose storage some node of the graph writes to, found by the storages of the traced fake tensors
    (so views count). Where a written value has no tensor on it, only the node itself; nor has ``tensor.set_(source)`` (which is
    how Dynamo writes ``tensor.data = source``) written to anything but what the name stands for: the memory of both stays as it is."""
    storages: set[int] = set()
    written: set[fx.Node] = set()
    for node in graph.nodes:
        for argument in written_arguments(node):
            for target in _nodes_in(argument):
                written.add(target)
                written.add(node)
                tensor = _tensor(target)
                if tensor is not None and node.target is not torch.Tensor.set_:
                    storages.add(_compat.storage_id(tensor))
    if storages:
        for node in graph.nodes:
            tensor = _tensor(node)
            if tensor is not None and _compat.storage_id(tensor) in storages:
                written.add(node)
    return frozenset(written)


def _nodes_in(argument: Any) -> Iterator[fx.Node]:
    if isinstance(argument, fx.Node):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from _nodes_in(item)


def _tensor(node: fx.Node) -> torch.Tensor | None:
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None
