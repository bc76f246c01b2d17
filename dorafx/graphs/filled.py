"""Zeros that are filled by rows, ``D = torch.zeros_like(W); D[:d] = P``: the concatenation of what is written and the zeros that are left.

The lifter treats whatever is written as unknown. Here the writes are taken out where nobody can tell: a tensor of zeros of the graph's
own, filled by blocks of rows that do not meet, and read by nobody before the last of them is there. So is a tensor without values
(``torch.empty``), all of whose rows are assigned: libraries unpack codes of several to a number like that.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Container
from typing import Any, NamedTuple

import torch
from torch import fx

from dorafx._compat.tensors import fake_mode_of, is_wrapper, under

from .lookup import name_in_torch
from .operators import ZEROS, canonical_name
from .tensors import tensor_of
from .writes import written_nodes

_EMPTY = frozenset(("empty", "empty_like", "new_empty"))
_MODES = frozenset(("set_grad_enabled", "enter_inference_mode", "exit_inference_mode"))


class _Write(NamedTuple):
    """Rows ``start`` to ``stop`` get the values of ``source``; by ``nodes``, of which the last one writes."""

    start: int
    stop: int
    source: fx.Node
    nodes: tuple[fx.Node, ...]


def without_filled_zeros(graph: fx.Graph) -> bool:
    """Put concatenations in the place of zeros that are filled by rows.

    Args:
        graph: changed in place.

    Returns:
        Whether it was changed.
    """
    filled = [node for node in graph.nodes if _is_filled(node)]
    changed = False
    for zeros in filled:
        order = {node: i for i, node in enumerate(graph.nodes)}
        writes = _writes(zeros, order, written_nodes(graph))
        if writes:
            _concatenate(graph, zeros, writes, max((write.nodes[-1] for write in writes), key=order.__getitem__))
            changed = True
    return changed


def _is_filled(node: fx.Node) -> bool:
    return (canonical_name(node) in ZEROS or _is_empty(node)) and any(map(_assignment, node.users))


def _is_empty(node: fx.Node) -> bool:
    """Whether a node makes a tensor without values."""
    name = name_in_torch(node.target) if node.op == "call_function" else node.op == "call_method" and node.target
    return name in _EMPTY


def _assignment(user: fx.Node) -> tuple[Any, Any, tuple[fx.Node, ...]] | None:
    """For a reader of zeros that writes to some of them, once: the index, what is written, and the nodes that do it. These are
    ``D[i] = P``, ``D[i] += P``, ``D[i].copy_(P)`` and ``D[i].add_(P)``; what is added to zeros is written."""
    if user.target is operator.setitem:
        source: Any
        zeros, index, source = user.args
        if isinstance(source, fx.Node) and source.target is operator.iadd and _reads(source.args[0], zeros, index):
            view: Any = source.args[0]
            alone = _only(view, source) and _only(source, user)
            return (index, source.args[1], (view, source, user)) if alone else None
        return None if user.users else (index, source, (user,))
    if user.target is operator.getitem and len(user.users) == 1:
        (write,) = user.users
        named = write.op == "call_method" and write.target in ("add_", "copy_") and not write.kwargs
        if named and len(write.args) == 2 and write.args[0] is user and not write.users:
            return user.args[1], write.args[1], (user, write)
    return None


def _reads(node: Any, zeros: Any, index: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is operator.getitem and node.args == (zeros, index)


def _only(node: fx.Node, user: fx.Node) -> bool:
    return list(node.users) == [user]


def _writes(zeros: fx.Node, order: dict[fx.Node, int], written: Container[fx.Node]) -> list[_Write]:
    """The writes in the order of their rows; none where they are no blocks of rows that do not meet, where somebody else reads the
    tensor before all of them are done, or where a concatenation behind the last would see other values or another gradient mode."""
    tensor = tensor_of(zeros)
    known = tensor is not None and tensor.dim() > 1 and all(isinstance(size, int) for size in tensor.shape)
    if (
        tensor is None
        or not known
        or not tensor.is_contiguous()
        or is_wrapper(tensor)
        or not {"dtype", "device"}.issuperset(zeros.kwargs)
    ):
        return []
    if _refused_by_autocast(tensor, zeros.graph):
        return []
    writes: list[_Write] = []
    nodes: set[fx.Node] = set()
    empty = _is_empty(zeros)
    for index, source, by in filter(None, map(_assignment, zeros.users)):
        rows = _rows(index, tensor.shape[0])
        value = tensor_of(source)
        if rows is None or not isinstance(source, fx.Node) or source in written or value is None:
            return []
        if empty and _adds(by):
            return []
        if tuple(map(str, value.shape)) != tuple(map(str, (rows[1] - rows[0], *tensor.shape[1:]))):
            return []
        # A write casts, which an operator of its own does in the concatenation's place.
        if value.device != tensor.device or is_wrapper(value) or value.requires_grad > (value.dtype == tensor.dtype):
            return []
        if value.dim() > 3 and not value.is_contiguous():  # a concatenation of channels_last parts is channels_last
            return []
        writes.append(_Write(*rows, source, by))
        nodes.update(by)
    writes.sort()
    if any(first.stop > second.start for first, second in itertools.pairwise(writes)):
        return []
    if empty and sum(write.stop - write.start for write in writes) != tensor.shape[0]:
        return []
    last = max(order[node] for node in nodes)
    if any(order[user] < last for user in zeros.users if user not in nodes):
        return []
    between = (node for node in zeros.graph.nodes if order[zeros] < order[node] < last)
    return [] if any(canonical_name(node) in _MODES for node in between) else writes


def _refused_by_autocast(tensor: torch.Tensor, graph: fx.Graph) -> bool:
    """Whether a concatenation of such parts may be called under autocast to the other half-precision dtype, which it refuses."""
    if tensor.dtype not in (torch.float16, torch.bfloat16):
        return False
    if any(getattr(node.target, "__name__", "") == "_enter_autocast" for node in graph.nodes):
        return True
    kind = tensor.device.type
    return torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind) != tensor.dtype


def _adds(nodes: tuple[fx.Node, ...]) -> bool:
    return any(node.target in (operator.iadd, "add_") for node in nodes)


def _rows(index: Any, size: int) -> tuple[int, int] | None:
    """The rows that an index takes, all columns of them."""
    first, *others = index if isinstance(index, tuple) else (index,)
    if not isinstance(first, slice) or any(i is not Ellipsis and i != slice(None) for i in others):
        return None
    if first.step not in (None, 1) or not all(end is None or isinstance(end, int) for end in (first.start, first.stop)):
        return None
    start, stop, _ = first.indices(size)
    return (start, stop) if start < stop else None


def _concatenate(graph: fx.Graph, zeros: fx.Node, writes: list[_Write], last: fx.Node) -> None:
    tensor, slot = tensor_of(zeros), "example_value" if "example_value" in zeros.meta else "val"
    assert tensor is not None
    writers = {node for write in writes for node in write.nodes}
    readers = [user for user in zeros.users if user not in writers]

    def meta(shape: Any, requires_grad: bool) -> dict[str, Any]:
        with under(fake_mode_of(tensor)):
            value = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
            return {**last.meta, slot: value.requires_grad_(requires_grad)}

    def cast(source: fx.Node) -> fx.Node:
        value = tensor_of(source)
        assert value is not None
        if value.dtype == tensor.dtype:
            return source
        node = graph.call_method("to", (source, tensor.dtype))
        node.meta = meta(value.shape, False)
        return node

    parts: list[fx.Node] = []
    with graph.inserting_after(last):
        whole = graph.call_function(torch.cat, (parts, 0))
    whole.meta = meta(tensor.shape, tensor.requires_grad)
    with graph.inserting_before(whole):
        row = 0
        for start, stop, source, _ in [*writes, _Write(tensor.shape[0], tensor.shape[0], zeros, (zeros,))]:
            if row < start:
                shape = [start - row, *tensor.shape[1:]]
                part = graph.call_function(torch.zeros, (shape,), {"dtype": tensor.dtype, "device": tensor.device})
                part.meta = meta(shape, False)
                parts.append(part)
            if source is not zeros:
                parts.append(cast(source))
            row = stop
    whole.args = (parts, 0)
    for reader in readers:
        reader.replace_input_with(zeros, whole)
    for node in sorted(writers, reverse=True):
        graph.erase_node(node)
    graph.erase_node(zeros)
