"""The product with a weight delta: ``y = p ⊙ (x·Wᵀ) + q ⊙ (x·Aᵀ)·Bᵀ + bias``, p and q made of ``g = m / ‖W + s·B·A‖``.

``F.linear(x, g ⊙ (W + s·B·A) - W)`` is ``(g - 1) ⊙ (x·Wᵀ) + g·s ⊙ (x·Aᵀ)·Bᵀ``. A program that hands it to a gate or a layer norm, or adds
a part of it to the base product, has no scaling that all products share.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from dorafx.lift import Expr
from dorafx.lift.algebra import count_matrices
from dorafx.match import (
    Candidate,
    CompositionPlan,
    Emit,
    Match,
    Part,
    Reason,
    base_core,
    group,
    no_base_product,
    pattern,
    unequal_scaling,
    whole_match,
)


@pattern(name="linear_weight_delta")
class LinearWeightDelta:
    """Products that each have a scaling of their own, of a weight that the program merges. Where it has the products already, nothing is
    gained."""

    name: str = "linear_weight_delta"

    @staticmethod
    def statement(
        x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor, s: float
    ) -> torch.Tensor:
        """The form as plain PyTorch. Shapes: x ``[.., d_in]``, W ``[d_out, d_in]``, A ``[r, d_in]``, B ``[d_out, r]``,
        m ``[d_out, 1]``."""
        adapted = W + s * (B @ A)
        n: torch.Tensor = torch.linalg.norm(adapted, dim=1, keepdim=True).detach()
        return F.linear(x, m * adapted / n - W)

    @staticmethod
    def example() -> dict[str, torch.Tensor]:
        """Arguments of ``statement``, parameters among them as such."""
        return {
            "x": torch.empty(3, 5),
            "W": nn.Parameter(torch.empty(4, 5)),
            "A": nn.Parameter(torch.empty(2, 5)),
            "B": nn.Parameter(torch.empty(4, 2)),
            "m": nn.Parameter(torch.empty(4, 1)),
            "s": torch.empty(()),
        }

    def check(self, candidate: Candidate) -> Match | Reason:
        base = base_core(candidate)
        if base is None:
            return no_base_product(candidate)
        lift, cores = candidate.lift, candidate.composition.cores
        parts = []
        for core, scale in cores.items():
            product = Expr.chain(core)
            computed = bool(lift.gemms.get(product) or lift.nodes.get(product))
            if core == base or (computed and core[-1:] == base[-1:]):
                continue  # the base product, and one of an input without dropout
            if computed or core[:1] != base[:1] or count_matrices(core) < 3:
                return unequal_scaling(candidate)
            parts.append(Part(core, scale))
        return whole_match(self.name, candidate, base, parts)

    def rewrite(self, match: Match, plan: CompositionPlan, emit: Emit) -> fx.Node:
        bias = match.bias
        terms = []
        low_rank = {part.core for part in match.parts}
        for core, scale in group(match.expr).cores.items():
            if core in low_rank:
                terms.append((emit.product(core), scale))
            else:
                product, bias = emit.base(core, bias, scale)
                terms.append((product, scale))
        return emit.scaled_sum(terms, bias)
