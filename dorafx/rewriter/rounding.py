"""Compositions in an autocast region whose products the program computes outside of it, or in one that rounds otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx

from dorafx.graphs.autocast import Region, is_decided, rounds_to
from dorafx.graphs.operators import canonical_name
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Atom, Lifter, Mat, VectorValue
from dorafx.match import Match

_PRODUCTS = frozenset(
    ("addmm", "baddbmm", "bmm", "conv", "convolution", "einsum", "linear", "matmul", "mv", "outer", "tensordot")
)


def rounds_more(
    lift: Lifter, match: Match, regions: Mapping[fx.Node, Region], order: Mapping[fx.Node, int], is_body: bool
) -> bool:
    """Whether products of a layer that are made at the site of its composition would be rounded there, as autocast does it, and those of the
    program are not.

    Args:
        lift: the terms of the graph.
        match: the composition.
        regions: of each node.
        order: the position of each node.
        is_body: whether the graph is the body of an operator, which may be called in a region of the graph around it.
    """
    site, here = match.node, regions[match.node]
    tensor = tensor_of(site)
    if tensor is None:
        return False
    device = tensor.device.type
    now = rounds_to(here, device)
    unknown = is_body and not is_decided(here, device)
    if now is None and not unknown:
        return False
    return any(
        regions[p] != here and (unknown or rounds_to(regions[p], device) != now) for p in _products(lift, match, order)
    )


def _products(lift: Lifter, match: Match, order: Mapping[fx.Node, int]) -> Iterator[fx.Node]:
    """The products of the program that a composition is made of: of those that its site is computed from, the ones that are computed from the
    layer's input. Others are of a norm or of the weight."""
    heads = {c[0].atom.id for c in (match.base, *(p.core for p in match.parts)) if c and isinstance(c[0], Mat)}
    nodes = {head: lift.atom_of(Atom(head)).node for head in heads}
    inputs = {node for node in nodes.values() if node is not None}
    unformed = {
        head for head, node in nodes.items() if node is None
    }  # the matrix that an embedding's indices stand for
    # From here on what leads to the site comes from the input. The term of the site itself may be closed again.
    first = min((order[node] for node in inputs), default=order[match.origin] - 1)

    def names_input(node: fx.Node) -> bool:
        value = lift.noted(node) if unformed else None
        term = None if value is None else value.poly if isinstance(value, VectorValue) else value.expr
        return term is not None and any(atom.id in unformed for atom in term.atoms())

    between: set[fx.Node] = set()
    stack = [match.node]
    while stack:
        node = stack.pop()
        if node not in between and node not in inputs and (order[node] > first or names_input(node)):
            between.add(node)
            stack.extend(node.all_input_nodes)
    reached = set(inputs)
    for node in sorted(between, key=order.__getitem__):
        if not reached.isdisjoint(node.all_input_nodes) or names_input(node):
            reached.add(node)
            if canonical_name(node) in _PRODUCTS:
                yield node
