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

from .effects import nodes_in, written_arguments
from .grad_mode import GradMode
from .targets import canonical_name
from .values import tensor_of

__all__ = ["private_writes", "without_private_writes"]

_NAMES = (
    "add",
    "addcdiv",
    "addcmul",
    "addmm",
    "clamp",
    "clamp_min",
    "detach",
    "div",
    "lerp",
    "mul",
    "neg",
    "pow",
    "reciprocal",
    "rsqrt",
    "sqrt",
    "square",
    "squeeze",  # with which a tracer takes apart the product of a matrix and a vector
    "sub",
    "unsqueeze",
)


def _twins() -> dict[Any, Callable[..., Any]]:
    """Writing operator -> its twin that writes nothing, of the same arguments."""
    found: dict[Any, Callable[..., Any]] = {
        operator.iadd: torch.add,
        operator.isub: torch.sub,
        operator.imul: torch.mul,
        operator.itruediv: torch.div,
    }
    for name in _NAMES:
        found[f"{name}_"] = twin = getattr(torch, name)
        writing, plain = getattr(torch.ops.aten, f"{name}_", None), getattr(torch.ops.aten, name)
        if hasattr(torch, f"{name}_"):
            found[getattr(torch, f"{name}_")] = twin
        for overload in writing.overloads() if writing is not None else ():
            if hasattr(plain, overload):
                found[getattr(writing, overload)] = getattr(plain, overload)
    return found


_OUT_OF_PLACE = _twins()
_PRODUCTS = (torch.addmm, torch.ops.aten.addmm.default)
# Operators whose result is a fresh tensor, so that a write to it is seen by nobody else.
_FRESH = frozenset(
    [
        "linear",
        "matmul",
        "addmm",
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "neg",
        "dequantize",
        "norm",
        "linalg_norm",
        "vector_norm",
        "sum",
        "mean",
        "sqrt",
        "rsqrt",
        "square",
        "pow",
        "clamp",
        "clamp_min",
        "maximum",
    ]
)


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
    mode = GradMode()
    for i, node in enumerate(graph.nodes):
        mode.follow(node, canonical_name(node))
        for argument in (a for given in written_arguments(node) for a in nodes_in(given)):
            tensor = tensor_of(argument)
            if tensor is None:
                continue
            storage = _compat.storage_id(tensor)
            known = node.target in _OUT_OF_PLACE and bool(node.args) and "out" not in node.kwargs
            # Written where no gradients are recorded, it keeps those that it has; what a twin returns there has none.
            known = known and (mode.records or not tensor.requires_grad)
            # Autocast rounds the operands of the twin of a product, and leaves those of one that writes as they are.
            known = known and not (_OUT_OF_PLACE[node.target] in _PRODUCTS and _autocasts(graph, tensor.device))
            writes[storage] = writes.get(storage, True) and known
            last[storage] = i
    private = {storage for storage, known in writes.items() if known}
    if not private:
        return private
    for i, node in enumerate(graph.nodes):
        tensor = tensor_of(node)
        if tensor is None or _compat.storage_id(tensor) not in private:
            continue
        if node.target in _OUT_OF_PLACE or _owns(node):
            continue
        if i > last[_compat.storage_id(tensor)]:
            continue  # a view of what will not be written again
        private.discard(_compat.storage_id(tensor))
    return private


def _owns(node: fx.Node) -> bool:
    """Whether nobody else sees a result's memory when it is made: it is fresh, or the only use of what is."""
    if canonical_name(node) == "detach":
        return all(len(source.users) == 1 for source in node.all_input_nodes)
    return _is_fresh(node) and not _shares(node)


def _autocasts(graph: fx.Graph, device: torch.device) -> bool:
    entered = any(getattr(node.target, "__name__", "") == "_enter_autocast" for node in graph.nodes)
    return entered or torch.is_autocast_enabled(device.type)


def _shares(node: fx.Node) -> bool:
    """Whether a result lies in the storage of one of its inputs (a cast that changes nothing returns its input)."""
    tensor = tensor_of(node)
    assert tensor is not None
    mine = _compat.storage_id(tensor)
    return any((t := tensor_of(a)) is not None and _compat.storage_id(t) == mine for a in node.all_input_nodes)


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
        tensor = tensor_of(node)
        if tensor is None or _compat.storage_id(tensor) not in private:
            continue
        if node.target in _OUT_OF_PLACE:
            with graph.inserting_before(node):
                twin = graph.call_function(_OUT_OF_PLACE[node.target], node.args, node.kwargs)
                twin.meta = dict(node.meta)
                # In place, the result keeps its dtype whatever is added to it.
                cast = graph.call_method("to", (twin, tensor.dtype))
                cast.meta = dict(node.meta)
            node.replace_all_uses_with(cast)
            graph.erase_node(node)
            node = cast
        elif not _owns(node):
            continue  # a view after the last write
        version[_compat.storage_id(tensor)] = node
        superseded[node] = _compat.storage_id(tensor)
