"""Linear DoRA with a dropout on the adapter's input.

``y = x·Wᵀ + bias + (g - 1) ⊙ x'·Wᵀ + g ⊙ s·(x'·Aᵀ)·Bᵀ`` with ``x' = dropout(x)``: the base product is made twice, once of
``x`` and once of ``x'``, so the two do not cancel and the delta form stays.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

from dorafx.lift import Expr, Poly
from dorafx.match import (
    Candidate,
    CompositionPlan,
    Emit,
    Match,
    Part,
    Reason,
    ReasonKind,
    base_core,
    no_base_product,
    part_scale,
    pattern,
    unequal_scaling,
)


@pattern(name="linear_dropout")
class LinearDropout:
    """A constant part, a base product scaled by ``g - 1``, and low-rank products scaled by ``g``."""

    name: str = "linear_dropout"

    @staticmethod
    def statement(
        x: torch.Tensor,
        dropped: torch.Tensor,
        W: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        m: torch.Tensor,
        s: float,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The form as plain PyTorch; ``dropped`` is the dropout of x. Shapes as for the linear form."""
        n: torch.Tensor = torch.linalg.norm(W + s * (B @ A).detach(), dim=1).detach()
        g = m / n
        return F.linear(x, W, bias) + (g - 1) * F.linear(dropped, W) + g * (s * F.linear(F.linear(dropped, A), B))

    @staticmethod
    def example() -> dict[str, torch.Tensor]:
        """Arguments of ``statement``, parameters among them as such."""
        return {
            "x": torch.empty(3, 5),
            "dropped": torch.empty(3, 5),
            "W": nn.Parameter(torch.empty(4, 5)),
            "A": nn.Parameter(torch.empty(2, 5)),
            "B": nn.Parameter(torch.empty(4, 2)),
            "m": nn.Parameter(torch.empty(4)),
            "s": torch.empty(()),
            "bias": nn.Parameter(torch.empty(4)),
        }

    def check(self, candidate: Candidate) -> Match | Reason:
        base = base_core(candidate)
        if base is None:
            return no_base_product(candidate)
        cores = candidate.composition.cores
        scaling = cores[base] + Poly.const(1.0)
        if dict(cores[base].items).get((), 0.0) != -1.0:
            return unequal_scaling(candidate)
        parts: list[Part] = []
        constant = Expr.broadcast(candidate.composition.bias)
        unscaled = 0
        for core, poly in cores.items():
            if core == base:
                continue
            if poly.constant is not None:
                constant = constant + Expr.chain(core, poly.constant)
                unscaled += 1
                continue
            scale = part_scale(candidate, poly, scaling)
            if scale is None:
                what = "a low-rank part of the output is not scaled by g while the base is by g - 1"
                return Reason(what, candidate.node, kind=ReasonKind.UNEQUAL_SCALING)
            parts.append(Part(core, scale))
        if unscaled > 1:
            # The layer's own result is one value; what else is added (a residual) is no part of the layer.
            what = "something else than the unscaled base product is added to the delta form"
            return Reason(what, candidate.node, kind=ReasonKind.OTHER_PARTS)
        if not unscaled or not parts:
            lacking = "the unscaled base product" if not unscaled else "a low-rank product"
            return Reason(f"the delta form lacks {lacking}", candidate.node, kind=ReasonKind.OTHER_PARTS)
        return Match(
            self.name, candidate.node, candidate.expr, candidate.norm, scaling, base, tuple(parts), constant=constant
        )

    def rewrite(self, match: Match, plan: CompositionPlan, emit: Emit) -> fx.Node:
        assert match.constant is not None
        g = emit.vector(match.scaling)
        # A base product that the graph only has with its bias brings (g - 1) times the bias along.
        base, bias = emit.base(match.base, Poly(()), match.scaling + Poly.const(-1.0))
        result = emit.expression(match.constant + Expr.broadcast(bias) if bias.items else match.constant)
        lora, scale = emit.low_rank_sum(match.parts)
        return emit.compose_delta(result, base, lora, g, scale, plan.kernel)
