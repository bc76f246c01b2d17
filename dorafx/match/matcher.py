"""Match: watch the lifter, recognise norms and compositions, and keep a reason for everything that is left alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from enum import Enum

from torch import fx

from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Atom, Diag, Expr, Lifter, Poly, Value, VectorValue
from dorafx.lift.algebra import Chain

from .composition import Candidate, Match, group
from .failures import blame_failures
from .matches import Matches
from .near_misses import Reason, unknown_consumer, unknown_norms, vanished
from .norms import NormFactors, split_norm
from .registry import check_form, forms

_FORMS_OF_BATCHES = ("linear", "linear_weight_delta")
"""The forms that are known for a batch of weights: what they emit has the axis of the batch."""


class Verdict(Enum):
    """What the lifter does with a node that it has just lifted."""

    KEEP = "keep"
    SEAL = "seal"
    RELIFT = "relift"


class _Matcher:
    """The lifter's observer. A composition is recognised at the last node that still is one: the match stays pending
    while its node has a single user, and is taken when that user turns out to be something else."""

    def __init__(self, graph: fx.Graph, is_parameter: Callable[[fx.Node], bool] | None) -> None:
        self.lift = Lifter(graph, self, is_parameter)
        self.matches = Matches(self.lift)
        self._forms = forms()
        self._classified: set[int] = set()
        self._pending: dict[fx.Node, Match] = {}

    def __call__(self, lift: Lifter, node: fx.Node, value: Value) -> Verdict:
        match = self._recognise(node, value)
        continued = [a for a in node.all_input_nodes if a in self._pending]
        # Where the next layer begins, of which this one's output is the input, it is another match.
        complete = [a for a in continued if match is None or not _carries_on(lift, self._pending[a], match)]
        for argument in complete:
            self.matches.compositions.append(self._pending.pop(argument))
            lift.seal(argument)
        if complete:
            return Verdict.RELIFT
        if match is None:
            return Verdict.KEEP
        for argument in continued:
            before = self._pending.pop(argument)
            if before.norm.atom == match.norm.atom:
                match = replace(match, first=before.origin)
        if len(node.users) == 1:
            self._pending[node] = match
            return Verdict.KEEP
        self.matches.compositions.append(match)
        return Verdict.SEAL

    def run(self) -> Matches:
        lift, matches = self.lift.run(), self.matches
        matches.compositions.extend(self._pending.values())
        composed = {atom.id for m in matches.compositions for atom in lift.norms_in(m.expr)}
        for atom_id in composed:
            matches.composition_misses.pop(atom_id, None)
        # Norms whose vector is never used on an activation have been classified by nobody yet.
        for atom_id, info in enumerate(lift.atoms):
            if info.kind == "norm":
                self._classify(Atom(atom_id))
        for atom_id in matches.norms:
            if atom_id not in composed and atom_id not in matches.composition_misses:
                reason = unknown_consumer(lift, lift.atoms[atom_id], atom_id)
                if reason is not None:
                    matches.composition_misses[atom_id] = reason
        matches.unknown.extend(unknown_norms(lift))
        blame_failures(matches)
        return matches

    def _classify(self, atom: Atom) -> NormFactors | None:
        if atom.id not in self._classified:
            self._classified.add(atom.id)
            result = split_norm(self.lift, atom)
            if isinstance(result, NormFactors):
                self.matches.norms[atom.id] = result
            elif isinstance(result, Reason):
                self.matches.misses[atom.id] = result
        return self.matches.norms.get(atom.id)

    def _recognise(self, node: fx.Node, value: Value) -> Match | None:
        if node in self.lift.written:
            return None
        for expr, transposed in _readings(self.lift, node, self.lift.batches.get(node) or value):
            match = self._recognise_as(node, expr)
            if match is not None:
                return replace(match, transposed=True) if transposed else match
        return None

    def _recognise_as(self, node: fx.Node, expr: Expr) -> Match | None:
        norms = [f for atom in sorted(self.lift.norms_in(expr)) if (f := self._classify(atom)) is not None]
        if not norms:
            return None
        misses = self.matches.composition_misses
        if expr.vanished:
            for norm in norms:
                misses.setdefault(norm.atom.id, vanished(self.lift, expr.vanished, node))
            return None
        composition = group(expr)
        for norm in norms:
            candidate = Candidate(self.lift, node, expr, composition, norm)
            for form in self._forms.values():
                if norm.batch is not None and form.name not in _FORMS_OF_BATCHES:
                    continue
                result = check_form(form, candidate)
                if isinstance(result, Match):
                    return result
                known = misses.get(norm.atom.id)
                # Of one node the first specific reason stays: forms come in order of preference.
                if known is None or not known.specific or (result.specific and result.node is not known.node):
                    misses[norm.atom.id] = result
        return None


def _carries_on(lift: Lifter, before: Match, match: Match) -> bool:
    """Whether a match has the layer in it that was matched at its argument: a cast, a bias, another summand follow it."""

    def plain(core: Chain) -> Expr:
        return lift.detached(Expr.chain(core))

    return plain(before.base) in {plain(core) for core in group(match.expr).cores}


def _readings(lift: Lifter, node: fx.Node, value: Value) -> Iterator[tuple[Expr, bool]]:
    """The terms by which a node may be a layer's output, each with whether its tokens are columns. Otherwise they are rows, or there is one."""
    if isinstance(value, VectorValue):
        if value.row is not None:
            yield value.row, False
        return
    if value.squared or not lift.holds_rows(value):
        return
    yield value.expr, False
    tensor = tensor_of(node)
    scaled = (chain[0] for (_, chain), _ in value.expr.items if len(chain) > 2 and isinstance(chain[0], Diag))
    if (
        value.layout != "batch"
        and tensor is not None
        and tensor.dim() == 2
        and any(lift.norms_in(Poly(((d.mono, 1.0),))) for d in scaled)
    ):
        yield value.expr.transposed(), True


def match_graph(graph: fx.Graph, is_parameter: Callable[[fx.Node], bool] | None = None) -> Matches:
    """Lift a graph and find every DoRA norm and composition in it. The graph is not changed.

    Args:
        graph: the graph.
        is_parameter: tells which inputs are parameters or buffers, where they do not say so themselves.
    """
    return _Matcher(graph, is_parameter).run()
