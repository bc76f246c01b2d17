"""Accounting: what the original graph makes for the sake of its norms, in nodes, bytes and FLOPs."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from dorafx._compat.tensors import storage_id
from dorafx.graphs.operators import canonical_name
from dorafx.graphs.shapes import sizes_of
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Lifter
from dorafx.match import Match, NormFactors


def norm_closure(norm: NormFactors) -> list[fx.Node]:
    """The nodes that exist for the sake of the norm: its ancestors down to parameters."""
    seen: dict[fx.Node, None] = {}
    stack = list(norm.info.sites)
    while stack:
        node = stack.pop()
        if node in seen or node.op not in ("call_function", "call_method"):
            continue
        seen[node] = None
        stack.extend(node.all_input_nodes)
    return list(seen)


def merging(lift: Lifter, match: Match) -> list[fx.Node]:
    """The nodes that turn the sum into the merged weight."""
    sizes = sorted((str(match.norm.d_out), str(match.norm.d_in)))
    nodes: dict[fx.Node, None] = {}
    # The product itself and what follows it up to the match (a view, a bias, a cast) are few.
    stack = [(match.node, 4)]
    while stack:
        node, beyond = stack.pop()
        for argument in node.all_input_nodes:
            tensor = tensor_of(argument)
            if argument in nodes or tensor is None or argument.op not in ("call_function", "call_method"):
                continue
            if _is_as_weight(lift, match, tensor, sizes):
                nodes[argument] = None
                stack.append((argument, 0))
            elif beyond:
                stack.append((argument, beyond - 1))
    return list(nodes)


def _is_as_weight(lift: Lifter, match: Match, tensor: torch.Tensor, sizes: list[str]) -> bool:
    """Whether a value is as large as the norm's weight, as a matrix, a batch of them, or filters."""
    if match.norm.batch is not None:
        return tensor.dim() == 3 and sorted(map(str, tensor.shape[-2:])) == sizes
    if tensor.dim() == 2:
        return sorted(map(str, tensor.shape)) == sizes
    weight = lift.atom_of(match.norm.dense_atom)
    filters = tensor_of(weight.node) if weight.kind == "filter" else None
    return filters is not None and sizes_of(tensor.shape) == sizes_of(filters.shape)


def gemm_flops(lift: Lifter) -> dict[fx.Node, int]:
    """FLOPs of every matrix product of the graph whose sizes are numbers."""
    flops: dict[fx.Node, int] = {}
    for gemms in lift.gemms.values():
        for gemm in gemms:
            out, lhs = tensor_of(gemm.node), tensor_of(gemm.lhs)
            if gemm.convolution is None and out is not None and lhs is not None and isinstance(out.numel(), int):
                flops[gemm.node] = flops.get(gemm.node, 0) + 2 * out.numel() * int(lhs.shape[-1])
    return flops


def still_formed(packed: bool, closure: list[fx.Node]) -> set[int]:
    """Storages of dequantised weights that exist after the rewrite, too: the norm needs them, or a product does.

    Args:
        packed: whether the norm dequantises its weight block by block.
        closure: the nodes that exist for the sake of the norm.
    """
    inside = set(closure)
    formed = {storage_id(t) for n in closure if canonical_name(n) == "dequantize" and (t := tensor_of(n)) is not None}
    if not packed:
        return formed
    read = {storage_id(t) for n in closure if not inside.issuperset(n.users) and (t := tensor_of(n)) is not None}
    return formed & read


def dense_bytes(norm: NormFactors, nodes: list[fx.Node], kept: Iterable[int] = ()) -> int:
    """Bytes of the intermediates of ``d_out · d_in`` elements or more that the original made for its norm; views and
    casts that change nothing share storage with their input and count once, parameters not at all."""
    seen = {
        storage_id(t)
        for n in nodes
        for a in n.all_input_nodes
        if a.op == "placeholder" and (t := tensor_of(a)) is not None
    }
    seen.update(kept)
    total, smallest = 0, norm.d_out * norm.d_in * (norm.batch or 1)
    for node in nodes:
        tensor = tensor_of(node)
        if tensor is None or not isinstance(tensor.numel(), int) or tensor.numel() < smallest:
            continue
        storage = storage_id(tensor)
        if storage not in seen:
            seen.add(storage)
            total += tensor.numel() * tensor.element_size()
    return total
