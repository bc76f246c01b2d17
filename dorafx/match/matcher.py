"""Match: watch the lifter, recognise norms and compositions, and keep a reason for everything that is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum

from torch import fx

from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Atom, Diag, Expr, Lifter, Poly, Value, VectorValue

from .composition import Candidate, Match, group
from .failures import blame_failures
from .matches import Matches
from .near_misses import Reason, unknown_consumer, unknown_norms, vanished
from .norms import NormFactors, split_norm
from .registry import forms

__all__ = ["Verdict", "match_graph"]


class Verdict(Enum):
    """What the lifter does with a node that it has just lifted."""

    KEEP = "keep"
    SEAL = "seal"
    RELIFT = "relift"


class _Matcher:
    """The lifter's observer. A composition is recognised at the last node that still is one: the match stays pending
    while its node has a single user, and is taken when that user turns out to be something else."""

    def __init__(self) -> None:
        self.matches: Matches | None = None
        self._forms = forms()
        self._seen: set[int] = set()
        self._pending: dict[fx.Node, Match] = {}

    def __call__(self, lift: Lifter, node: fx.Node, value: Value) -> Verdict:
        if self.matches is None:
            self.matches = Matches(lift)
        found = self._recognise(lift, node, value)
        continued = [a for a in node.all_input_nodes if a in self._pending]
        if found is None:
            for argument in continued:
                self._take(self._pending.pop(argument))
                lift.seal(argument)
            return Verdict.RELIFT if continued else Verdict.KEEP
        for argument in continued:
            before = self._pending.pop(argument)
            if before.norm.atom == found.norm.atom:
                found = replace(found, first=before.origin)
        if len(node.users) == 1:
            self._pending[node] = found
            return Verdict.KEEP
        self._take(found)
        return Verdict.SEAL

    def _take(self, match: Match) -> None:
        assert self.matches is not None
        self.matches.compositions.append(match)

    def finish(self, lift: Lifter) -> Matches:
        matches = self.matches or Matches(lift)
        for match in self._pending.values():
            matches.compositions.append(match)
        composed = {atom.id for m in matches.compositions for atom in lift.norms_in(m.expr)}
        for atom_id in composed:
            matches.composition_misses.pop(atom_id, None)
        # Norms whose vector is never used on an activation have been classified by nobody yet.
        for atom_id, info in enumerate(lift.atoms):
            if info.kind == "norm":
                self._classify(lift, Atom(atom_id))
        for atom_id in matches.norms:
            if atom_id not in composed and atom_id not in matches.composition_misses:
                lost = unknown_consumer(lift, lift.atoms[atom_id], atom_id)
                if lost is not None:
                    matches.composition_misses[atom_id] = lost
        matches.unknown.extend(unknown_norms(lift))
        blame_failures(matches)
        return matches

    def _classify(self, lift: Lifter, atom: Atom) -> NormFactors | None:
        matches = self.matches
        if matches is None:
            matches = self.matches = Matches(lift)
        if atom.id not in self._seen:
            self._seen.add(atom.id)
            result = split_norm(lift, atom)
            if isinstance(result, NormFactors):
                matches.norms[atom.id] = result
            elif isinstance(result, Reason):
                matches.misses[atom.id] = result
        return matches.norms.get(atom.id)

    def _recognise(self, lift: Lifter, node: fx.Node, value: Value) -> Match | None:
        if node in lift.written:
            return None
        for expr, transposed in _readings(lift, node, value):
            found = self._recognise_as(lift, node, expr)
            if found is not None:
                return replace(found, transposed=True) if transposed else found
        return None

    def _recognise_as(self, lift: Lifter, node: fx.Node, expr: Expr) -> Match | None:
        norms = [f for atom in sorted(lift.norms_in(expr)) if (f := self._classify(lift, atom)) is not None]
        if not norms:
            return None
        assert self.matches is not None
        if expr.vanished:
            for norm in norms:
                self.matches.composition_misses.setdefault(norm.atom.id, vanished(lift, expr.vanished, node))
            return None
        composition = group(expr)
        for norm in norms:
            candidate = Candidate(lift, node, expr, composition, norm)
            for form in self._forms.values():
                result = form.check(candidate)
                if isinstance(result, Match):
                    return result
                known = self.matches.composition_misses.get(norm.atom.id)
                # Of one node the first specific reason stays: forms come in order of preference.
                if known is None or not known.specific or (result.specific and result.node is not known.node):
                    self.matches.composition_misses[norm.atom.id] = result
        return None


def _readings(lift: Lifter, node: fx.Node, value: Value) -> Iterator[tuple[Expr, bool]]:
    """The terms by which a node may be a layer's output: tokens by row, one token alone, or (the flag) tokens by column."""
    if isinstance(value, VectorValue):
        if value.row is not None:
            yield value.row, False
        return
    if value.squared or not lift.holds_rows(value):
        return
    yield value.expr, False
    tensor = tensor_of(node)
    scaled = (chain[0] for (_, chain), _ in value.expr.items if len(chain) > 2 and isinstance(chain[0], Diag))
    if tensor is not None and tensor.dim() == 2 and any(lift.norms_in(Poly(((d.mono, 1.0),))) for d in scaled):
        yield value.expr.transposed(), True


def match_graph(graph: fx.Graph, is_parameter: Callable[[fx.Node], bool] | None = None) -> Matches:
    """Lift a graph and find every DoRA norm and composition in it. The graph is not changed.

    Args:
        graph: the graph.
        is_parameter: tells which inputs are parameters or buffers, where they do not say so themselves.
    """
    matcher = _Matcher()
    lift = Lifter(graph, matcher, is_parameter).run()
    return matcher.finish(lift)
