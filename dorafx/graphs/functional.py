"""Replaces in-place arithmetic on values that nobody else can see by out-of-place arithmetic: ``y = linear(x, W); y /= n; y *= m``.

The lifter treats every written value as unknown. This pass runs before it and removes the writes that have an out-of-place
equivalent, so that sequential compositions lift like any other.

First it decides, for the memory of each written value, whether the graph can do without the writes. For this it looks at which
operator created the memory, which nodes stand for the whole of it (its creator, and the result of each write), which nodes are other
views of it, and whether a view is read after a later write. Then every read of such a node is replaced by a read of the version that
is current at that place in the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dorafx._compat import operators
from dorafx._compat.operators import aten_name, is_overload
from dorafx._compat.tensors import fake_mode_of, is_wrapper, under
from dorafx.graphs.tensors import tensor_of

from .grad_mode import GradMode
from .operators import canonical_name
from .writes import Memory, memories, nodes_in, written_arguments

_ARITHMETIC = (
    "abs",
    "absolute",
    "add",
    "addcdiv",
    "addcmul",
    "addmm",
    "baddbmm",
    "clamp",
    "clamp_max",
    "clamp_min",
    "clip",
    "div",
    "divide",
    "lerp",
    "mul",
    "multiply",
    "neg",
    "negative",
    "pow",
    "reciprocal",
    "rsqrt",
    "sqrt",
    "square",
    "sub",
    "subtract",
    "true_divide",
)
# These change a tensor's metadata and write no elements. Tracers decompose the product of a matrix and a vector with a ``squeeze_``.
_METADATA = ("detach", "squeeze", "swapaxes", "swapdims", "t", "transpose", "unsqueeze")


def _twins(names: tuple[str, ...]) -> dict[Any, Callable[..., Any]]:
    """In-place operator -> its out-of-place twin, which takes the same arguments."""
    twins: dict[Any, Callable[..., Any]] = {}
    for name in names:
        twins[f"{name}_"] = twin = getattr(torch, name)
        writing, plain = getattr(torch.ops.aten, f"{name}_", None), getattr(torch.ops.aten, name)
        if hasattr(torch, f"{name}_"):
            twins[getattr(torch, f"{name}_")] = twin
        for overload in writing.overloads() if writing is not None else ():
            if hasattr(plain, overload):
                twins[getattr(writing, overload)] = getattr(plain, overload)
    return twins


_METADATA_TWINS = _twins(_METADATA)
_CHANGES_GRADIENTS = _twins(("detach",))
_OUT_OF_PLACE: dict[Any, Callable[..., Any]] = {
    **_twins(_ARITHMETIC),
    **_METADATA_TWINS,
    operator.iadd: torch.add,
    operator.isub: torch.sub,
    operator.imul: torch.mul,
    operator.itruediv: torch.div,
    operator.ipow: torch.pow,
}
# Autocast casts the operands of these, but not those of their in-place twins.
_AUTOCAST = {*_twins(("addcdiv", "addcmul", "addmm", "baddbmm", "pow", "reciprocal", "rsqrt")), operator.ipow}
# These change whether a tensor requires a gradient. A tracer leaves the same tensor on all its nodes, so earlier nodes look changed too.
_CHANGE_GRADIENTS = frozenset({"detach_", "requires_grad_", "set_", "shallow_copy_data_"})
# Operators whose result is a new tensor, unless it is in the storage of one of its operands.
_FRESH = frozenset(
    [
        "linear",
        "matmul",
        "mv",
        "bmm",
        "outer",
        "einsum",
        "addmm",
        "baddbmm",
        "multi_dot",
        "conv",
        "convolution",
        "embedding",
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "addcmul",
        "addcdiv",
        "lerp",
        "neg",
        "abs",
        "cast",
        "dequantize",
        "norm",
        "linalg_norm",
        "vector_norm",
        "normalize",
        "weight_norm",
        "sum",
        "mean",
        "sqrt",
        "rsqrt",
        "reciprocal",
        "square",
        "pow",
        "clamp",
        "clamp_min",
        "maximum",
    ]
)
# Operators whose result may be a view of their first operand.
_VIEWS = frozenset(
    ("cast", "detach", "expand", "getitem", "identity", "permute", "select", "slice", "t", "transpose", "view")
)


class _Refused(Exception):
    """The writes to a memory differ from what their twins compute, or it is not known whether they do."""

    def __init__(self, private: _Private) -> None:
        self.private = private


@dataclass(eq=False)
class _Private:
    """Memory to which a graph does not need to write.

    Attributes:
        owner: the node that created it.
        writes: the nodes that write to it; each stands for a new version.
        names: the nodes that stand for the whole of it, in any version: the owner, the writes, and views that took over.
        slot: the key of ``meta`` under which the tracer left its values.
        uncast: the fake values of twins whose dtype differs from the memory's.
        version: the node of the latest version, while the graph is followed.
    """

    owner: fx.Node
    writes: frozenset[fx.Node]
    names: set[fx.Node]
    slot: str
    uncast: dict[fx.Node, torch.Tensor] = field(default_factory=dict)
    version: Any = field(default=None)

    def changes(self, kind: Container[Any]) -> bool:
        """Whether some write is of a kind."""
        return any(write.target in kind for write in self.writes)


def has_writes(graph: fx.Graph) -> bool:
    """Whether some node writes to another's value, or changes whether it requires a gradient."""
    return any(_name(node) in _CHANGE_GRADIENTS or any(True for _ in written_arguments(node)) for node in graph.nodes)


def without_private_writes(graph: fx.Graph) -> bool:
    """Replace writes by their out-of-place twins where nothing can tell the difference, and correct the fake tensors of nodes for which
    a later node changed whether the tensor requires a gradient.

    Args:
        graph: changed in place. Each node whose value was written gets the fake tensor of its version, with its own storage.

    Returns:
        Whether the graph was changed.
    """
    all_memories = memories(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    private = [p for memory in all_memories if memory.writers and (p := _private(memory, order)) is not None]
    changed = _forget_gradients(all_memories, private, order)
    values: dict[fx.Node, Any] = {}
    while private:
        try:
            values = _evaluated(graph, all_memories, private)
            break
        except _Refused as refused:
            private.remove(refused.private)
            changed |= _forget_gradients(all_memories, private, order)
    if private:
        _replace_writes(graph, private, values)
    return bool(private) or changed


# -- which memory is private ------------------------------------------------------------------------------------------


def _private(memory: Memory, order: dict[fx.Node, int]) -> _Private | None:
    """The memory as a private one; None if something can tell whether it is written."""
    owner = memory.values[0]
    tensor = tensor_of(owner)
    if tensor is None or not _is_fresh(owner) or "out" in owner.kwargs:
        return None
    values, writes = set(memory.values), frozenset(memory.writers)
    if not writes <= values or any(not _is_known(write, tensor.device) for write in writes):
        return None
    last = order[memory.writers[-1]]
    if any(
        _hides_a_view(reader, last, order) for node in memory.values for reader in node.users if reader not in values
    ):
        return None
    names, everybody = {owner}, {owner}
    positions = [order[write] for write in memory.writers]
    for i, node in enumerate(memory.values[1:], 1):
        if node in writes:
            others = [n for n in node.all_input_nodes if n in values and n not in names]
            if node.args[0] not in names or others:
                return None
            names.add(node)
        elif _name(node) in _CHANGE_GRADIENTS or node.op not in ("call_function", "call_method"):
            return None
        elif _takes_over(node, names, memory.values[:i], order):
            names = {node}
        elif any(order[node] < position <= order[reader] for reader in node.users for position in positions):
            return None  # a view that is read after the memory was written again
        everybody |= names
    slot = "example_value" if "example_value" in owner.meta else "val"
    return _Private(owner, writes, everybody, slot)


def _takes_over(view: fx.Node, names: set[fx.Node], earlier: list[fx.Node], order: dict[fx.Node, int]) -> bool:
    """Whether a view of a whole value replaces it: nothing else that shares its memory is read later. (Autograd notices a write to
    ``x.detach()``, but not one to ``x.data``: there a backward pass reads a tensor that it saved before as it is after the write.)"""
    if canonical_name(view) not in _VIEWS or view.all_input_nodes[:1] != [view.args[0]] or view.args[0] not in names:
        return False
    return all(order[reader] <= order[view] for node in earlier for reader in node.users)


def _is_fresh(node: fx.Node) -> bool:
    if node.target in ("clone", torch.clone) or (is_overload(node.target) and aten_name(node.target) == "clone"):
        return True
    return canonical_name(node) in _FRESH


def _is_known(write: fx.Node, device: torch.device) -> bool:
    """Whether a node writes only to its first argument, and what it writes is what its twin returns."""
    if write.target not in _OUT_OF_PLACE or not write.args or "out" in write.kwargs:
        return False
    targets = {n for argument in written_arguments(write) for n in nodes_in(argument)}
    if targets != {write.args[0]}:
        return False
    return write.target not in _AUTOCAST or not _autocasts(write.graph, device)


def _autocasts(graph: fx.Graph, device: torch.device) -> bool:
    entered = any(getattr(node.target, "__name__", "") == "_enter_autocast" for node in graph.nodes)
    return entered or torch.is_autocast_enabled(device.type)


def _hides_a_view(reader: fx.Node, last: int, order: dict[fx.Node, int]) -> bool:
    """Whether a node's result may share a value's memory unnoticed, while there are still writes to come."""
    if reader.op == "output" or order[reader] > last:
        return False
    unknown = reader.meta.get("example_value", reader.meta.get("val")) is None and bool(reader.users)
    return unknown or operators.is_higher_order(reader.target)


def _name(node: fx.Node) -> str:
    """The name of the method or function that a node calls."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    return (aten_name(node.target) if is_overload(node.target) else None) or str(getattr(node.target, "__name__", ""))


# -- the values of the versions ---------------------------------------------------------------------------------------


def _forget_gradients(all_memories: list[Memory], private: list[_Private], order: dict[fx.Node, int]) -> bool:
    """For memories that are not private: if a node changes whether a tensor requires a gradient, let the earlier nodes that carry the
    same tensor require one, as they may have before. Returns whether there was such a node."""
    owners = {p.owner for p in private}
    pairs = [
        (changing, node)
        for memory in all_memories
        if memory.values[0] not in owners
        for changing in memory.values
        if _name(changing) in _CHANGE_GRADIENTS
        for node in memory.values
        if order[node] < order[changing] and tensor_of(node) is tensor_of(changing)
    ]
    changed = False
    for changing, node in pairs:
        tensor = tensor_of(changing)
        if tensor is None or tensor.requires_grad or not (tensor.is_floating_point() or tensor.is_complex()):
            continue
        with under(fake_mode_of(tensor)):
            node.meta["example_value" if "example_value" in node.meta else "val"] = tensor.detach().requires_grad_()
        changed = True
    return changed


def _evaluated(graph: fx.Graph, all_memories: list[Memory], private: list[_Private]) -> dict[fx.Node, Any]:
    """Fake values of all nodes of private memories, computed without the writes.

    Raises:
        _Refused: a twin's result differs from what the write leaves.
    """
    named = {name: p for p in private for name in p.names}
    owned = {p.owner: p for p in private}
    of_node = {node: p for memory in all_memories if (p := owned.get(memory.values[0])) for node in memory.values}
    values: dict[fx.Node, Any] = {}
    mode = GradMode(graph)

    def value(node: fx.Node) -> Any:
        if node in named:
            return values[named[node].version]
        return values[node] if node in values else node.meta.get("example_value", node.meta.get("val"))

    for node in graph.nodes:
        mode.follow(node, canonical_name(node))
        p = of_node.get(node)
        if p is None:
            continue
        try:
            values[node] = _value(node, p, value, mode.records)
        except _Refused:
            raise
        except Exception as error:  # the operator cannot be run on the fake values of the nodes
            raise _Refused(p) from error
        if node in p.names:
            p.version = node
    return values


def _value(node: fx.Node, p: _Private, value: Callable[[fx.Node], Any], records: bool) -> Any:
    """A node's fake value; for a write, that of its twin."""
    traced = tensor_of(p.owner)
    fake_mode = fake_mode_of(traced)
    if fake_mode is None or traced is None or is_wrapper(traced):
        raise _Refused(p)
    with under(fake_mode), torch.set_grad_enabled(records):
        if node is p.owner and not p.changes(_METADATA_TWINS):
            fresh = torch.empty_strided(traced.shape, traced.stride(), dtype=traced.dtype, device=traced.device)
            differentiable = records and any(_requires_grad(value(operand)) for operand in node.all_input_nodes)
            return fresh.requires_grad_(traced.requires_grad and differentiable)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: _of_mode(value(n), fake_mode))
        result = _twins_value(node, p, args, kwargs, records) if node in p.writes else _called(node, args, kwargs)
    if node is p.owner and result.dtype != traced.dtype:
        raise _Refused(p)  # it is in an autocast region
    if _requires_grad(result) and not _requires_grad(tensor_of(node)) and not p.changes(_CHANGES_GRADIENTS):
        return result.detach()  # gradients are not recorded when the graph starts
    return result


def _twins_value(write: fx.Node, p: _Private, args: Any, kwargs: Any, records: bool) -> torch.Tensor:
    before: torch.Tensor = args[0]
    result: torch.Tensor = _OUT_OF_PLACE[write.target](*args, **kwargs)
    # While no gradients are recorded, a written tensor keeps its gradient history, and a twin's result has none.
    same = records or not (before.requires_grad or p.slot == "val") or write.target in _CHANGES_GRADIENTS
    if write.target not in _METADATA_TWINS:
        if result.dtype != before.dtype:
            p.uncast[write] = result
            result = result.to(before.dtype)
        same = same and _geometry(result) == _geometry(before)
    if not same:
        raise _Refused(p)
    return result


def _requires_grad(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


def _called(node: fx.Node, args: Any, kwargs: Any) -> Any:
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    target: Any = node.target
    return target(*args, **kwargs)


def _geometry(tensor: torch.Tensor) -> tuple[str, ...]:
    """Sizes and strides, compared without a guard on symbolic ones."""
    return tuple(map(str, (*tensor.shape, *tensor.stride())))


def _of_mode(value: Any, mode: Any) -> Any:
    """A fake value as one of another mode: ``make_fx`` of real tensors creates a mode for each value."""
    if not isinstance(value, torch.Tensor) or fake_mode_of(value) is mode:
        return value
    with mode:
        twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return twin.requires_grad_(value.requires_grad)


# -- the rewriting ----------------------------------------------------------------------------------------------------


def _replace_writes(graph: fx.Graph, private: list[_Private], values: dict[fx.Node, Any]) -> None:
    """Replace each write by its twin, and each read of a name by the version that is current there."""
    named = {name: p for p in private for name in p.names}

    def current(node: fx.Node) -> fx.Node:
        version: fx.Node = named[node].version if node in named else node
        return version

    for node in list(graph.nodes):
        if any(argument in named for argument in node.all_input_nodes):
            node.args = fx.node.map_arg(node.args, current)
            node.kwargs = fx.node.map_arg(node.kwargs, current)
        p = named.get(node)
        if node in values and tensor_of(node) is not None:
            node.meta["example_value" if "example_value" in node.meta else "val"] = values[node]
        if p is None:
            continue
        p.version = node
        if node in p.writes:
            p.version = _twin(graph, node, p)
    for node in reversed([write for p in private for write in p.writes]):
        assert not node.users
        graph.erase_node(node)


def _twin(graph: fx.Graph, write: fx.Node, p: _Private) -> fx.Node:
    """Insert the twin of a write before it; returns the node of the new version."""
    target = _OUT_OF_PLACE[write.target]
    with graph.inserting_before(write):
        twin = graph.call_function(target, write.args, write.kwargs)
        twin.meta = dict(write.meta)
        if write not in p.uncast:
            return twin
        # In place, the result keeps its dtype whatever is added to it.
        dtype = write.meta[p.slot].dtype
        twin.meta[p.slot] = p.uncast[write]
        if is_overload(target):
            cast = graph.call_function(torch.ops.aten._to_copy.default, (twin,), {"dtype": dtype})
        else:
            cast = graph.call_method("to", (twin, dtype))
        cast.meta = dict(write.meta)
    return cast
