"""What AOT autograd's partitioner saves for a backward, and what the backward computes again: tags on the nodes of a joint graph of
forward and backward."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils.checkpoint import CheckpointPolicy

from .tensors import size_hint

_TAG = "recompute"
_READ = "dorafx_read_in_backward"
"""On a node whose value the backward reads in any case."""

_ONE_FOR_ALL = "dorafx_saved_in_place_of_its_results"
"""On a node whose value is saved where the backward reads what is computed from it alone."""

_SMALL = 8
"""An operand is small that has at most one of so many elements of the result; one of two if the backward reads it in any case, as the
sines of a rotary embedding."""

_SOURCES = 2
"""How many tensors that are not small the backward may read to compute a result again. Two are a gate and what it scales, or a sum of the
residual stream and the one before; with more, the last of a deep model's sums would be computed from the first."""

_aten, _prims = torch.ops.aten, torch.ops.prims
_CASTS = frozenset({_aten._to_copy.default, _prims.convert_element_type.default})
_MOVES = _CASTS | frozenset(
    {
        operator.getitem,  # of a split
        _aten._unsafe_view.default,
        _aten.alias.default,
        _aten.cat.default,
        _aten.clone.default,
        _aten.expand.default,
        _aten.permute.default,
        _aten.reshape.default,
        _aten.select.int,
        _aten.slice.Tensor,
        _aten.split.Tensor,
        _aten.split_with_sizes.default,
        _aten.squeeze.default,
        _aten.squeeze.dim,
        _aten.squeeze.dims,
        _aten.stack.default,
        _aten.t.default,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.view.default,
    }
)
"""Operators that move or cast elements, none of which a backward would be slow to compute again."""


def save_for_backward(tensor: torch.Tensor) -> None:
    """While a joint graph of forward and backward is traced: make its partitioner save this tensor instead of what it is computed
    from. No effect outside of tracing, nor in a checkpointed region, which has its own policy for every node."""
    meta = _traced(tensor)
    if meta is not None:
        meta.setdefault(_TAG, CheckpointPolicy.MUST_SAVE)
        mark_read(tensor)


def mark_read(tensor: torch.Tensor) -> None:
    """While a joint graph is traced: note that the backward reads this tensor in any case, for :func:`recompute_from_read`. No effect
    where :func:`save_for_backward` has none."""
    meta = _traced(tensor)
    if meta is not None and meta.get(_TAG, CheckpointPolicy.MUST_SAVE) is CheckpointPolicy.MUST_SAVE:
        meta[_READ] = True


def mark_one_for_all(tensor: torch.Tensor) -> None:
    """While a joint graph is traced: note that this tensor, if the backward reads it or something that is computed from it alone, be saved
    and serve for all that is computed from it, for :func:`recompute_from_read`. No effect where :func:`save_for_backward` has none."""
    meta = _traced(tensor)
    if meta is not None and _TAG not in meta:
        meta[_ONE_FOR_ALL] = True


def compute_again(operand: torch.Tensor, *results: torch.Tensor) -> None:
    """While a joint graph is traced: make the partitioner compute these small results again from the operand that they were computed from,
    instead of saving them. Each would be made by a launch of its own in the forward. No effect outside of tracing."""
    first = _node_of(operand)
    stack = [] if first is None else [node for node in map(_node_of, results) if node is not None]
    while stack:
        node = stack.pop()
        if node is not first and node.op == "call_function" and _TAG not in node.meta:
            node.meta[_TAG] = CheckpointPolicy.PREFER_RECOMPUTE
            stack.extend(node.all_input_nodes)


def is_traced() -> bool:
    """Whether a graph is being traced, as by AOT autograd."""
    return get_proxy_mode() is not None


def _traced(tensor: torch.Tensor) -> dict[str, Any] | None:
    """What is noted of the node that computes a tensor, if a graph is being traced."""
    node = _node_of(tensor)
    return None if node is None else node.meta


def _node_of(tensor: torch.Tensor) -> fx.Node | None:
    mode = get_proxy_mode()
    if mode is None:
        return None
    inner = torch._from_functional_tensor(tensor.elem) if hasattr(tensor, "elem") else tensor
    slot = get_proxy_slot(inner, mode.tracer, None)
    return None if slot is None else slot.proxy.node


def recompute_from_read(graph: fx.Graph) -> None:
    """Make the partitioner compute again, from a tensor of :func:`mark_read`, what a backward reads of its pointwise results: queries
    and keys after the rotary embedding, values, the activation of an MLP, every other sum of a residual stream.

    The partitioner alone saves such a result, too, if a product or an attention reads it: to compute it again is not free. But then two
    tensors of this size are saved where one will do. The backward applies the forward's operators to the forward's values.

    Args:
        graph: a joint graph of ATen's operators, of a program that writes to none of its inputs: by the time of the backward they would
            have other values, and the graph does not show it. Tags are added to its nodes, and none is changed.
    """
    if not any(_READ in node.meta for node in graph.nodes):
        return
    graph.eliminate_dead_code()  # as the partitioner will: what a dead node reads is not to be kept for it
    in_backward = _reached_from(n for n in graph.nodes if n.op == "placeholder" and "tangents" in str(n.target))
    read: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if any(user in in_backward or (user in read and user.target in _CASTS) for user in node.users):
            read.add(node)
    forward = [node for node in graph.nodes if node not in in_backward]
    saved = {node for node in forward if _READ in node.meta}
    offered = {node for node in forward if _ONE_FOR_ALL in node.meta and node not in saved}
    alone = {s for node, s in _all_sources(forward, saved | offered, read).items() if node in read and len(s) == 1}
    saved |= {node for node in offered if {node} in alone}
    sources = _all_sources(forward, saved, read)
    stack = [node for node in sources if node in read]
    while stack:
        node = stack.pop()
        if node in sources and node not in saved and _TAG not in node.meta:
            node.meta[_TAG] = CheckpointPolicy.PREFER_RECOMPUTE
            stack.extend(node.all_input_nodes)


def _all_sources(
    forward: Iterable[fx.Node], saved: set[fx.Node], read: set[fx.Node]
) -> dict[fx.Node, frozenset[fx.Node]]:
    """From which large tensors each node can be computed again, if these are saved, for all nodes of the forward that can be."""
    sources: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in forward:
        if node in saved:
            sources[node] = frozenset({node})
        elif _TAG not in node.meta and _is_cheap(node):
            of_node = _sources(node, sources, read)
            if of_node is not None:
                sources[node] = of_node
    return sources


def _sources(
    node: fx.Node, sources: dict[fx.Node, frozenset[fx.Node]], read: set[fx.Node]
) -> frozenset[fx.Node] | None:
    """The large tensors that a node's value is computed from; None if it is not to be computed again."""
    if not any(operand in sources for operand in node.all_input_nodes):
        return None
    found: frozenset[fx.Node] = frozenset()
    for operand in node.all_input_nodes:
        if operand in sources:
            found |= sources[operand]
        elif _elements(operand) * (2 if operand in read else _SMALL) > _elements(node):
            if operand not in read or _elements(operand) > _elements(node):
                return None
            found |= {operand}
    return found if len(found) <= _SOURCES else None


def _reached_from(roots: Iterable[fx.Node]) -> set[fx.Node]:
    """The nodes that depend on any of these, and these."""
    reached, stack = set(), list(roots)
    while stack:
        node = stack.pop()
        if node not in reached:
            reached.add(node)
            stack.extend(node.users)
    return reached


def _is_cheap(node: fx.Node) -> bool:
    """Whether a node computes its elements one by one, and always the same ones, or only moves them."""
    target: Any = node.target
    if node.op != "call_function" or target in _MOVES:
        return node.op == "call_function"
    tags = getattr(target, "tags", ())
    return torch.Tag.pointwise in tags and torch.Tag.nondeterministic_seeded not in tags


def _elements(node: fx.Node) -> Any:
    """The number of elements of what a node gives, at a hint of symbolic sizes; 0 for numbers."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return sum(math.prod(map(size_hint, v.shape)) for v in values if isinstance(v, torch.Tensor))
