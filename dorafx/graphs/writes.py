"""Which values of a graph change in place: those that are written, and everything that shares memory with them."""

from __future__ import annotations

import functools
import inspect
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dorafx._compat import operators
from dorafx._compat.operators import aten_name, body_operands_start, takes_operands_for_body
from dorafx._compat.tensors import fake_mode_of, storage_id
from dorafx.graphs.tensors import tensor_of

from .lookup import view_of
from .operators import first_argument

_INPLACE_NAMES = ("iadd", "isub", "imul", "itruediv", "imatmul", "ipow", "ifloordiv", "imod", "iand", "ior", "ixor")
_INPLACE_OPERATORS = frozenset(getattr(operator, name) for name in _INPLACE_NAMES) | {operator.setitem}
_INPLACE_METHODS = frozenset(f"__{name}__" for name in (*_INPLACE_NAMES, "setitem"))

_INPUTS = ("placeholder", "get_attr")

# Function -> position of ``max_norm``.
_RESCALE_THEIR_TABLE = {"embedding": 3, "embedding_bag": 3}
# Packages whose functions show by their names whether they write. Any other function that is a single call in a graph (one that was
# wrapped for a tracer, or allowed in the graph) may write without showing it.
_NAME_THEIR_WRITES = frozenset({"torch", "_operator", "builtins", "math", "einops", "dorafx"})
# Operators of aten whose result may be an operand, or a view of one, although their schemas do not say so. In graphs that were traced
# with fake tensors the storages show it; but ``make_fx`` of real tensors creates a fake mode, and a storage, for each value.
_MAY_RETURN_THEIR_OPERAND = frozenset(
    ("_unsafe_view", "alpha_dropout", "atleast_1d", "atleast_2d", "atleast_3d", "broadcast_tensors", "chain_matmul", "dropout", "einsum",
     "feature_alpha_dropout", "feature_dropout", "linalg_multi_dot", "meshgrid", "type_as")
)  # fmt: skip


def written_arguments(node: fx.Node) -> Iterator[Any]:
    """The arguments that a node writes to; all of its arguments if it is not known which."""
    if "out" in node.kwargs:
        yield node.kwargs["out"]
    if node.op == "call_method":
        if _is_named_after_a_write(str(node.target)):
            yield first_argument(node)
    elif node.op == "call_module":
        yield from _written_by_module(node)
    elif node.op == "call_function":
        yield from _written_by_function(node)


def _is_named_after_a_write(name: str) -> bool:
    return (name.endswith("_") and not name.endswith("__") and name != "requires_grad_") or name in _INPLACE_METHODS


def _written_by_function(node: fx.Node) -> Iterator[Any]:
    target: Any = node.target
    if not _names_its_writes(target):
        if view_of(node) is None:  # a view writes to nothing
            yield node.all_input_nodes
        return
    yield from _argument_values(node, operators.writes(target))
    name = getattr(target, "__name__", "")
    if "batch_norm" in name or "instance_norm" in name:  # running statistics: few schemas say that they are written
        yield from (node.args[1:], tuple(node.kwargs.values()))
    if operators.schemas(target):
        return
    if target in _INPLACE_OPERATORS:
        yield node.args[0]
    elif operators.is_higher_order(target):
        yield from _written_by_bodies(node)
    elif getattr(target, "__module__", "") != "_operator":  # and_, or_ and not_ are named after keywords
        if name in _RESCALE_THEIR_TABLE and _rescales(node):
            yield node.kwargs.get("weight", node.args[1] if len(node.args) > 1 else None)
        elif _is_named_after_a_write(name) or _asks_inplace(node):
            yield first_argument(node)
        out = _position(target, "out")
        if out is not None and len(node.args) > out:
            yield node.args[out]


def _argument_values(node: fx.Node, arguments: Iterable[operators.Argument]) -> Iterator[Any]:
    """The values that a call passes for some of its operator's arguments."""
    for position, name in arguments:
        if position is not None and position < len(node.args):
            yield node.args[position]
        elif name in node.kwargs:
            yield node.kwargs[name]


def _names_its_writes(target: Any) -> bool:
    if type(target).__module__ == "torch._dynamo.utils":  # an operator or a method of NumPy's
        return False
    owner = getattr(target, "__objclass__", target)
    module = getattr(owner, "__module__", None) or type(owner).__module__
    return str(module).partition(".")[0] in _NAME_THEIR_WRITES


def _bodies(node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that a higher-order operator runs."""
    attributes = (attribute_of(argument) for argument in node.all_input_nodes if argument.op == "get_attr")
    return [body for body in attributes if isinstance(body, fx.GraphModule)]


def attribute_of(node: fx.Node) -> Any:
    """The attribute, of the module that owns the graph, that a node's target names; None if there is no such attribute."""
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def _written_by_module(node: fx.Node) -> Iterator[Any]:
    """What a call of a module writes to: its inputs if it works in place or is not one of torch's, and its own tensors if it may
    renormalise a table or keep statistics."""
    module = attribute_of(node)
    torchs = type(module).__module__.startswith("torch.nn.modules.")
    hooked = bool(getattr(module, "_forward_hooks", None) or getattr(module, "_forward_pre_hooks", None))
    if not torchs or hooked or getattr(module, "inplace", False) or list(module.children()):
        yield node.all_input_nodes
    if not torchs or hooked or list(module.buffers()) or getattr(module, "max_norm", None) is not None:
        tensor_ids = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        yield [other for other in node.graph.nodes if other.op == "get_attr" and id(attribute_of(other)) in tensor_ids]


def _written_by_bodies(node: fx.Node) -> Iterator[Any]:
    """What the bodies of a higher-order operator (activation checkpointing, ``nested_compile_region``) write to: all of its operands if
    it is not known which operand is which input."""
    bodies = _bodies(node)
    if not bodies and not operators.leaves_its_operands(node.target):
        yield node.all_input_nodes
    for body in bodies:
        # Only values that the body did not create itself, as far as the tensors on its nodes show that.
        written = [n for n in written_nodes(body.graph) if n.op in _INPUTS or (tensor_of(n) is None and n.users)]
        inputs = [n for n in body.graph.nodes if n.op == "placeholder"]
        operands = node.args[body_operands_start(node.target) :]
        known = takes_operands_for_body(node.target) and len(operands) == len(inputs)
        if known and all(n.op == "placeholder" for n in written):
            yield [operand for operand, placeholder in zip(operands, inputs) if placeholder in written]
        elif written:
            yield node.all_input_nodes


def _rescales(node: fx.Node) -> bool:
    """``F.embedding(i, table, padding_idx, max_norm)`` rescales, in the table, the rows that it looks up to that norm."""
    position = _RESCALE_THEIR_TABLE[node.target.__name__]  # type: ignore[union-attr]
    return node.kwargs.get("max_norm", node.args[position] if len(node.args) > position else None) is not None


@functools.cache
def _position(target: Any, name: str) -> int | None:
    try:
        return list(inspect.signature(target).parameters).index(name)
    except (TypeError, ValueError):
        return None


def _asks_inplace(node: fx.Node) -> bool:
    """Whether a call such as ``F.dropout(x, 0.1, True, True)`` writes to its first argument."""
    if node.kwargs.get("inplace") is True:
        return True
    position = _position(node.target, "inplace")
    return position is not None and len(node.args) > position and node.args[position] is True


def written_nodes(graph: fx.Graph) -> frozenset[fx.Node]:
    """Every node whose memory some node of the graph writes to.

    Shared memory is found by the storages of the traced fake tensors, so views count, and by the operators' schemas, since ``make_fx``
    of real tensors gives each value its own storage. If a written value has no tensor on its node, only that node counts.
    ``tensor.set_(source)`` (since torch 2.15 ``aten.shallow_copy_data_``), which is how Dynamo traces ``tensor.data = source``, also
    counts only for the nodes themselves: it changes what the name refers to, and leaves the memory of both tensors as it is."""
    written: set[fx.Node] = set()
    spreading: list[fx.Node] = []
    for node in graph.nodes:
        renames = names_another_memory(node)
        for argument in written_arguments(node):
            for target in nodes_in(argument):
                written.add(target)
                if not renames:
                    spreading.append(target)
                if renames or storage_of(node) in (None, storage_of(target)):
                    written.add(node)
    if spreading:
        seeds = set(spreading)
        written.update(n for memory in memories(graph) if not seeds.isdisjoint(memory.values) for n in memory.values)
    return frozenset(written)


def names_another_memory(node: fx.Node) -> bool:
    """Whether a call is how Dynamo traces ``tensor.data = source``: from there on, ``tensor`` names the source's memory."""
    target = node.target
    return target is torch.Tensor.set_ or "shallow_copy_data_" in (
        aten_name(target),
        operators.packet_name(target),
    )


@dataclass(frozen=True)
class Memory:
    """Values of a graph that may share memory.

    Attributes:
        values: their nodes in the order of the graph; the first one created the memory, or is an input.
        writers: the nodes that write to some of them, in the order of the graph.
    """

    values: list[fx.Node]
    writers: list[fx.Node]


def memories(graph: fx.Graph) -> list[Memory]:
    """All nodes of a graph, grouped by the memory that they may share (see :func:`written_nodes` for how that is found)."""
    parents: dict[fx.Node, fx.Node] = {}
    of_storage: dict[int, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while (parent := parents[node]) is not node:
            parents[node] = node = parents[parent]
        return node

    for node in graph.nodes:
        parents[node] = node
        others = [of_storage.setdefault(storage, node) for storage in _storages(node)]
        for other in (*others, *_viewed(node)):
            parents[root(node)] = root(other)
    by_root: dict[fx.Node, Memory] = defaultdict(lambda: Memory([], []))
    for node in graph.nodes:
        by_root[root(node)].values.append(node)
        for target in dict.fromkeys(root(n) for argument in written_arguments(node) for n in nodes_in(argument)):
            by_root[target].writers.append(node)
    return list(by_root.values())


def _viewed(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments of which a node's result may be a view: by its operator's schema, or for the operators whose schema and storages do
    not show it."""
    if node.target is operator.getitem:  # takes one of the results of a split
        yield from nodes_in(node.args[0])
    elif node.op == "call_function" and _names_its_writes(node.target):
        for argument in _argument_values(node, operators.views(node.target)):
            yield from nodes_in(argument)
        if aten_name(node.target) in _MAY_RETURN_THEIR_OPERAND:
            mode = fake_mode_of(tensor_of(node))
            yield from (n for n in node.all_input_nodes if fake_mode_of(tensor_of(n)) is not mode)


def nodes_in(argument: Any) -> Iterator[fx.Node]:
    """The nodes in an argument that may be a list of them."""
    if isinstance(argument, fx.Node):
        yield argument
    elif isinstance(argument, (list, tuple)):
        for item in argument:
            yield from nodes_in(item)


def storage_of(node: fx.Node) -> int | None:
    """A number that identifies a node's storage; None if its value is not a tensor."""
    tensor = tensor_of(node)
    return storage_id(tensor) if tensor is not None else None


def _storages(node: fx.Node) -> Iterator[int]:
    """The storages of what a node returns, which may be several tensors."""
    stack: list[Any] = [node.meta.get("example_value", node.meta.get("val"))]
    while stack:
        value = stack.pop()
        if isinstance(value, torch.Tensor):
            yield storage_id(value)
        elif type(value) in (list, tuple):
            stack.extend(value)
