"""The nodes of a graph that are in a term."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from .algebra import Expr, Poly
from .lifter import Lifter


def leaves_of(lift: Lifter, terms: Iterable[Expr | Poly]) -> set[fx.Node]:
    """The nodes that are in terms, at any depth."""
    nodes: set[fx.Node] = set()
    stack = list(terms)
    while stack:
        for atom in stack.pop().atoms():
            info = lift.atom_of(atom)
            if info.node is not None:
                nodes.add(info.node)
            stack.extend(term for term in (info.expr, info.poly) if term is not None)
    return nodes
