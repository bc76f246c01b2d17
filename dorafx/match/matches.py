"""What the matcher finds in one graph."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from dorafx.lift import Lifter

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
