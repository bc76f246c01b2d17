"""Failures of the lifter that cost a rewrite. A node whose transfer function raises has an unknown value. What is not rewritten because
of it is a miss, with the failure as its reason instead of what the matcher says of the unknown value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from dorafx.graphs.operators import canonical_name
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Expr, Lifter, MatrixValue, Poly, leaves_of, term_of
from dorafx.log.kinds import ReasonKind

from .matches import Matches
from .near_misses import Reason, operator_at

_NORMS = frozenset({"norm", "linalg_norm", "vector_norm", "sqrt", "rsqrt", "pow", "normalize", "weight_norm"})
_PRODUCTS = frozenset({"matmul", "bmm", "einsum", "linear", "addmm", "baddbmm", "tensordot", "multi_dot", "outer"})
_SUMS = frozenset({"add", "sub", "rsub", "addmm", "baddbmm", "addcmul", "lerp"})


def blame_failures(matches: Matches) -> None:
    """Replace the reasons that are due to an operator's failure, and add one for each norm that was not noticed because of it."""
    lift = matches.lift
    if not lift.failures:
        return
    for atom_id, reason in matches.misses.items():
        expr = lift.atoms[atom_id].expr
        assert expr is not None
        failed = _first(lift, [*_here(reason), *leaves_of(lift, [expr])])
        if failed is not None:
            matches.misses[atom_id] = _blamed(matches, failed)
    for atom_id, reason in matches.composition_misses.items():
        read = [node for node in _composed(lift, reason) if _is_of_layer(lift, node, atom_id)]
        if not reason.specific:  # it may have become a layer's output further on
            read += [node for node in lift.failures if _reads_norm(lift, node, atom_id)]
        failed = _first(lift, [*_here(reason), *read])
        if failed is not None:
            matches.composition_misses[atom_id] = _blamed(matches, failed)
    for i, (node, reason) in enumerate(matches.unknown):
        failed = _first(lift, [node, *_here(reason), *node.all_input_nodes])
        if failed is not None:
            matches.unknown[i] = node, _blamed(matches, failed)
    known = {reason.node for reason in matches.failures}
    for node in lift.failures:
        if node not in known and _hides_norm(matches, node):
            matches.unknown.append((node, _blamed(matches, node)))


def _blamed(matches: Matches, node: fx.Node) -> Reason:
    reason = Reason(
        f"{operator_at(node)} could not be followed, because dorafx failed in it: {matches.lift.failures[node]}",
        node,
        kind=ReasonKind.OPERATOR_FAILED,
    )
    matches.failures.append(reason)
    return reason


def _first(lift: Lifter, nodes: Iterable[fx.Node]) -> fx.Node | None:
    """The first node in graph order that is one of these and failed."""
    among = set(nodes)
    return next((node for node in lift.graph.nodes if node in among and node in lift.failures), None)


def _here(reason: Reason) -> list[fx.Node]:
    return [reason.node] if reason.node is not None else []


def _composed(lift: Lifter, reason: Reason) -> Iterator[fx.Node]:
    """What a composition that was not recognised is made of."""
    if reason.node is None:
        return
    yield from reason.node.all_input_nodes
    value = lift.values.get(reason.node)
    if value is not None:
        yield from leaves_of(lift, [term_of(value)])


def _is_of_layer(lift: Lifter, node: fx.Node, atom_id: int) -> bool:
    """Whether a node is computed from a layer's parameters or its norm, and not from its input alone."""
    if lift.weights.depends_on_parameters_only(node):
        return True
    expr = lift.atoms[atom_id].expr
    assert expr is not None
    parameters = leaves_of(lift, [expr])
    return _reads_norm(lift, node, atom_id) or any(
        leaves_of(lift, [term]) & parameters for term in _read_by(lift, node)
    )


def _reads_norm(lift: Lifter, node: fx.Node, atom_id: int) -> bool:
    return any(atom.id == atom_id for term in _read_by(lift, node) for atom in lift.norms_in(term))


def _read_by(lift: Lifter, node: fx.Node) -> list[Expr | Poly]:
    values = [lift.values.get(argument) for argument in node.all_input_nodes]
    return [term_of(value) for value in values if value is not None]


def _hides_norm(matches: Matches, node: fx.Node) -> bool:
    """Whether a node is on the way to a norm of a weight plus a low-rank product that has no match and no miss."""
    lift = matches.lift
    if not lift.weights.depends_on_parameters_only(node):
        return False
    behind, ahead = list(_walk(lift, node, back=True)), list(_walk(lift, node, back=False))
    if not any(_is_product(lift, n) for n in behind) or not any(canonical_name(n) in _SUMS for n in (*behind, *ahead)):
        return False
    known = {site for i in (*matches.norms, *matches.misses) for site in lift.atoms[i].sites}
    known |= {n for n, _ in matches.unknown}
    norms = {n for n in ahead if canonical_name(n) in _NORMS}
    return bool(norms) and not norms & known


def _is_product(lift: Lifter, node: fx.Node) -> bool:
    """Whether a node is a product of two matrices, or holds one."""
    value = lift.values.get(node)
    if isinstance(value, MatrixValue) and any(len(chain) > 1 for (_, chain), _ in value.expr.items):
        return True
    matrices = [t for a in node.all_input_nodes if (t := tensor_of(a)) is not None and t.dim() >= 2]
    return canonical_name(node) in _PRODUCTS and len(matrices) > 1


def _walk(lift: Lifter, start: fx.Node, back: bool) -> Iterator[fx.Node]:
    """A node and its ancestors, or else its descendants, as far as they depend on parameters only."""
    stack, seen = [start], set()
    while stack:
        node = stack.pop()
        if node in seen or not lift.weights.depends_on_parameters_only(node):
            continue
        seen.add(node)
        yield node
        stack.extend(node.all_input_nodes if back else node.users)
