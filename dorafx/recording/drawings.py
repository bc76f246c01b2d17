"""The region that a record speaks of, before and after, as a drawing for the log."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from dorafx.graphs.inputs import is_leaf
from dorafx.graphs.provenance import input_path, operator_name, source_of
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Expr, Lifter, leaves_of
from dorafx.log import MAX_NODES, Drawing, DrawnNode

_STEPS = 4  # from a norm to the operator in which it gets lost
_NAMES = 40  # that a node may list as what it replaces
_CHARACTERS = 200


@dataclass(frozen=True)
class Subject:
    """The nodes of the original graph that a record speaks of.

    Attributes:
        ends: where its region ends.
        terms: what the region computes; if empty, the region reaches down to the graph's inputs.
        norm_sites: the nodes that compute its norm.
        cause: the node that the record's reason is about.
    """

    ends: tuple[fx.Node, ...]
    terms: tuple[Expr, ...] = ()
    norm_sites: tuple[fx.Node, ...] = ()
    cause: fx.Node | None = None


def draw(subject: Subject, lift: Lifter, copied: dict[fx.Node, fx.Node], replaced: set[fx.Node]) -> Drawing:
    """The drawing of a record's region: from the values that its term consists of (activations, parameters) to its end.

    Args:
        lift: the terms of the original graph.
        subject: the nodes that the record speaks of.
        copied: original node -> the node that stands for it in the new graph, for those that were not removed. Empty if
            nothing was rewritten.
        replaced: the original nodes whose node in ``copied`` is a replacement, not a copy.
    """

    def is_kept(node: fx.Node) -> bool:
        return not copied or (node in copied and node not in replaced)

    leaves = leaves_of(lift, subject.terms) | {node for node in _activations(lift) if is_kept(node)}
    before = _ancestors(subject.ends, leaves, _path_to(subject.cause, subject.ends))
    kept = {node for node in before if is_kept(node)}

    def fate_before(node: fx.Node) -> str:
        return "cause" if node is subject.cause else "kept" if node in kept else "removed"

    before_side = _side(before, fate_before, lambda node: ())
    ends = [copied[end] for end in subject.ends if end in copied]
    if not ends or len(kept) == len(before):
        return Drawing(before_side)
    originals = {copied[node]: node for node in copied if node not in replaced}
    after = _ancestors(ends, {copied[leaf] for leaf in leaves if leaf in copied})
    inside = set(before)
    removed = [node for node in before if node not in kept]
    # What computed the norm, and what composed the output with it.
    norms = set(_ancestors([n for n in subject.norm_sites if n in inside], leaves))
    new_norms = [n for n in after if n.target is torch.ops.dorafx.row_norm.default]
    of_norm = set(_ancestors(new_norms, ()))
    parts = {
        True: tuple(n.name[:_CHARACTERS] for n in removed if n in norms)[:_NAMES],
        False: tuple(n.name[:_CHARACTERS] for n in removed if n not in norms)[:_NAMES],
    }
    return Drawing(
        before_side,
        _side(
            after,
            lambda node: "kept" if node in originals else "new",
            lambda node: () if node in originals else parts[node in of_norm] or parts[node not in of_norm],
        ),
    )


def _activations(lift: Lifter) -> set[fx.Node]:
    """The operands that the graph's products multiply by a weight, unless they are such products themselves. What comes before them (a
    norm layer in front of a linear) is part of the term, but not drawn."""
    activations = set()
    for gemm in (gemm for gemms in lift.gemms.values() for gemm in gemms):
        value = lift.matrix(gemm.lhs) if isinstance(gemm.lhs, fx.Node) else None
        if value is None or lift.weights.is_parameter_term(value.expr):
            continue
        if not value.expr.holds_product:
            activations.add(gemm.lhs)
    return activations


def _ancestors(ends: Iterable[fx.Node], leaves: Iterable[fx.Node], also: Iterable[fx.Node] = ()) -> list[fx.Node]:
    """What ``ends`` and ``also`` are computed from, down to ``leaves`` and the graph's inputs, in topological order. At most
    ``MAX_NODES``, those nearest to the ends.

    The other inputs of ``also`` are included, but not followed further."""
    stop = set(leaves) - set(ends)
    bounds = set(also)
    ancestors: dict[fx.Node, None] = {}
    frontier = [*ends, *also]
    while frontier and len(ancestors) < MAX_NODES:
        following: dict[fx.Node, None] = {}
        for node in frontier:
            if node in ancestors or len(ancestors) == MAX_NODES:
                continue
            ancestors[node] = None
            if node not in stop:
                following.update(dict.fromkeys(node.all_input_nodes))
                if node in bounds:
                    stop.update(a for a in node.all_input_nodes if a not in bounds and a not in ends)
        frontier = list(following)
    return sorted(ancestors)


def _path_to(cause: fx.Node | None, ends: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes from the ends to a cause that comes at most a few steps after them; else none."""
    if cause is None:
        return []
    paths = [[end] for end in ends]
    for _ in range(_STEPS):
        paths = [[*path, user] for path in paths for user in path[-1].users][:256]
        for path in paths:
            if path[-1] is cause:
                return path[1:]
    return []


def _side(
    nodes: list[fx.Node], fate: Callable[[fx.Node], str], replaces: Callable[[fx.Node], tuple[str, ...]]
) -> tuple[DrawnNode, ...]:
    index = {node: i for i, node in enumerate(nodes)}
    return tuple(
        DrawnNode(
            name=node.name[:_CHARACTERS],
            operator="input" if is_leaf(node) else operator_name(node)[:_CHARACTERS],
            label=input_path(node)[-_CHARACTERS:],
            shape=_shape(node),
            dtype=dtype_name(tensor_of(node)),
            source=source_of(node)[-_CHARACTERS:],
            fate=fate(node),
            inputs=tuple(dict.fromkeys(index[a] for a in node.all_input_nodes if a in index)),
            replaces=replaces(node),
        )
        for node in nodes
    )


def _shape(node: fx.Node) -> str:
    tensor = tensor_of(node)
    return f"[{', '.join(map(str, tensor.shape))}]"[:_CHARACTERS] if tensor is not None else ""


def dtype_name(tensor: torch.Tensor | None) -> str:
    """A tensor's dtype without the module's name; empty for None."""
    return str(tensor.dtype).removeprefix("torch.") if tensor is not None else ""
