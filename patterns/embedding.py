"""Embedding DoRA: ``y = g ⊙ (E[i] + s·A[i]·B)`` with ``g = m / ‖E + s·A·B‖`` by column."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import fx, nn

from dorafx.lift import Mat
from dorafx.match import Candidate, CompositionPlan, Emit, Match, Reason, base_core, forms, pattern


@pattern(name="embedding")
class Embedding:
    """The linear form with the one-hot rows of the indices as activations: a look-up is their product with the table. The
    norm is that of the columns of the table, one an embedding dimension. Look-ups are reused as the graph has them."""

    name: str = "embedding"

    @staticmethod
    def statement(
        i: torch.Tensor, E: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor, s: float
    ) -> torch.Tensor:
        """The form as plain PyTorch. Shapes: i ``[..]`` (integers), E ``[vocabulary, d]``, A ``[vocabulary, r]``,
        B ``[r, d]``, m ``[d]``."""
        n: torch.Tensor = torch.linalg.norm(E + s * (A @ B).detach(), dim=0).detach()
        return (m / n) * (F.embedding(i, E) + s * F.embedding(i, A) @ B)

    @staticmethod
    def example() -> dict[str, torch.Tensor]:
        """Arguments of ``statement``, parameters among them as such."""
        return {
            "i": torch.zeros(3, dtype=torch.long),
            "E": nn.Parameter(torch.empty(6, 5)),
            "A": nn.Parameter(torch.empty(6, 2)),
            "B": nn.Parameter(torch.empty(2, 5)),
            "m": nn.Parameter(torch.empty(5)),
            "s": torch.empty(()),
        }

    def check(self, candidate: Candidate) -> Match | Reason:
        base = base_core(candidate)
        head = base[0] if base else None
        if base is None or not isinstance(head, Mat) or candidate.lift.atom_of(head.atom).kind != "onehot":
            return Reason("the layer's input is no index", candidate.node, specific=False)
        if not isinstance(base[1], Mat) or not self._is_its_table(candidate, base[1]):
            return Reason("the table that is looked up is another layer's", candidate.node, specific=False)
        result = forms()["linear"].check(candidate)
        return replace(result, pattern=self.name) if isinstance(result, Match) else result

    @staticmethod
    def _is_its_table(candidate: Candidate, factor: Mat) -> bool:
        """Whether a factor is the norm's own table, in whatever dtype."""
        table = candidate.lift.unrounded(Mat(candidate.norm.dense_atom))
        return candidate.lift.unrounded(factor).atom.id == table.atom.id

    def rewrite(self, match: Match, plan: CompositionPlan, emit: Emit) -> fx.Node:
        return forms()["linear"].rewrite(match, plan, emit)
