"""What the matcher finds in one graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import fx

from dorafx.graphs.provenance import site_of
from dorafx.lift import Lifter
from dorafx.log import ReasonKind
from dorafx.selection import Exclusion

from .composition import Match
from .near_misses import Reason
from .norms import NormFactors


@dataclass
class Matches:
    """What was found in one graph. Norms are keyed by the id of their atom."""

    lift: Lifter
    norms: dict[int, NormFactors] = field(default_factory=dict)
    compositions: list[Match] = field(default_factory=list)
    misses: dict[int, Reason] = field(default_factory=dict)
    """Norms that look like DoRA's and are left alone."""
    composition_misses: dict[int, Reason] = field(default_factory=dict)
    """Norms that are rewritten while the composition around them is not."""
    unknown: list[tuple[fx.Node, Reason]] = field(default_factory=list)
    """Nodes that look like a DoRA norm and are no norm that the lifter knows."""
    failures: list[Reason] = field(default_factory=list)
    """Those of the reasons above that are failures of the lifter."""

    def refuse(self, site: fx.Node | None, reason: Reason) -> None:
        """Take back what was matched at a node: a composition leaves its norm, a norm takes its compositions along."""
        refused = [m for m in self.compositions if m.node is site]
        if refused:
            self.compositions = [m for m in self.compositions if m.node is not site]
            for match in refused:
                self.composition_misses[match.norm.atom.id] = reason
            return
        atom_ids = [i for i, f in self.norms.items() if site is None or site in f.info.sites]
        for atom_id in atom_ids:
            del self.norms[atom_id]
            self.misses[atom_id] = reason
        self.compositions = [m for m in self.compositions if m.norm.atom.id not in atom_ids]

    def leave_out(self, excluded: Callable[[str], Exclusion | None]) -> None:
        """Leave alone what is computed at modules that the user excludes. A norm and the compositions that read it stay together: where one
        of them is left alone, all of them are.

        Args:
            excluded: why a module of this name (relative to what was compiled) is left alone.
        """
        lift = self.lift
        read = [{atom.id for atom in lift.norms_in(m.expr)} | {m.norm.atom.id} for m in self.compositions]
        composed = {atom_id for atom_ids in read for atom_id in atom_ids}
        reasons: dict[int, Reason] = {}
        for match, atom_ids in zip(self.compositions, read):
            if why := excluded(site_of(match.origin)):
                reasons.update(dict.fromkeys(atom_ids, _left_out(why, match.origin)))
        for atom_id, factors in self.norms.items():
            for node in factors.info.sites if atom_id not in reasons else ():
                why = excluded(site_of(node))
                # A norm may be computed outside of the only modules that are rewritten, for one of them.
                if why and (why.option == "skip" or atom_id not in composed):
                    reasons[atom_id] = _left_out(why, node)
        while held := [ids for ids in read if ids & reasons.keys() and not ids <= reasons.keys()]:
            for atom_ids in held:
                reasons.update(dict.fromkeys(atom_ids - reasons.keys(), reasons[min(atom_ids & reasons.keys())]))
        self.compositions = [m for m, atom_ids in zip(self.compositions, read) if not atom_ids & reasons.keys()]
        for atom_id, reason in reasons.items():
            self.norms.pop(atom_id, None)
            self.composition_misses.pop(atom_id, None)
            self.misses[atom_id] = reason

        def reread(reason: Reason, node: fx.Node | None) -> Reason:
            why = excluded(site_of(node)) if node is not None and reason.kind is not ReasonKind.SKIPPED else None
            return reason if why is None else replace(reason, text=why.text, kind=ReasonKind.SKIPPED)

        self.misses = {i: reread(r, next(iter(lift.atoms[i].sites), r.node)) for i, r in self.misses.items()}
        self.unknown = [(node, reread(reason, node)) for node, reason in self.unknown]
        self.failures = [r for r in self.failures if reread(r, r.node) is r]


def _left_out(why: Exclusion, node: fx.Node) -> Reason:
    return Reason(why.text, node, kind=ReasonKind.SKIPPED)
