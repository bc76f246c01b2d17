"""Linear DoRA with the norm of columns: ``y = (x ⊙ c)·Wᵀ + s·((x ⊙ c)·Aᵀ)·Bᵀ + bias`` with ``c = m / ‖W + s·B·A‖`` by column.

The scaling lies on the input's side, where the linear form has it on the output's.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from dorafx.lift import Diag, Expr, Mat, Poly
from dorafx.match import Candidate, CompositionPlan, Emit, Match, Part, Reason, ReasonKind, no_base_product, pattern


@pattern(name="linear_columns")
class LinearColumns:
    """A merged weight whose columns are normalised. Where the program itself scales the input, nothing is left to do but the
    norm."""

    name: str = "linear_columns"

    @staticmethod
    def statement(
        x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor, s: float
    ) -> torch.Tensor:
        """The form as plain PyTorch. Shapes: x ``[.., d_in]``, W ``[d_out, d_in]``, A ``[r, d_in]``, B ``[d_out, r]``,
        m ``[d_in]``."""
        adapted = W + s * (B @ A)
        return F.linear(x, m * adapted / torch.linalg.norm(adapted, dim=0))

    @staticmethod
    def example() -> dict[str, torch.Tensor]:
        """Arguments of ``statement``, parameters among them as such."""
        return {
            "x": torch.empty(3, 5),
            "W": nn.Parameter(torch.empty(4, 5)),
            "A": nn.Parameter(torch.empty(2, 5)),
            "B": nn.Parameter(torch.empty(4, 2)),
            "m": nn.Parameter(torch.empty(5)),
            "s": torch.empty(()),
        }

    def check(self, candidate: Candidate) -> Match | Reason:
        lift = candidate.lift
        weight = lift.unrounded(Mat(candidate.norm.dense_atom)).atom.id
        cores = candidate.composition.cores
        base = next(
            (
                c
                for c in cores
                if c and isinstance(c[-1], Mat) and lift.unrounded(c[-1]).atom.id == weight and self._head(c)
            ),
            None,
        )
        head = self._head(base) if base is not None else None
        if base is None or head is None or candidate.norm.atom not in lift.norms_in(Poly(((head[-1].mono, 1.0),))):
            return no_base_product(candidate)
        if lift.gemms.get(Expr.chain(base)):
            return Reason(
                "the program scales the input and multiplies it by the weight itself: nothing else to do",
                candidate.node,
                kind=ReasonKind.NOTHING_ELSE,
            )
        parts = [Part(core, poly) for core, poly in cores.items() if core != base]
        if not parts or any(self._head(part.core) != head for part in parts):
            what = "a part of the output has an input that is not scaled as the weight's is"
            return Reason(what, candidate.node, kind=ReasonKind.UNEQUAL_SCALING)
        constant, scaling = candidate.expr, cores[base]
        return Match(
            self.name, candidate.node, constant, candidate.norm, scaling, base, tuple(parts), constant, Poly(())
        )

    @staticmethod
    def _head(core: tuple[Mat | Diag, ...]) -> tuple[Mat, Diag] | None:
        """The activation and its scaling, that a core begins with."""
        if len(core) < 3 or not isinstance(core[0], Mat) or not isinstance(core[1], Diag):
            return None
        return core[0], core[1]

    def rewrite(self, match: Match, plan: CompositionPlan, emit: Emit) -> fx.Node:
        return emit.shaped_like_site(emit.expression(match.expr))
