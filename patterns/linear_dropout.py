"""Linear DoRA with a dropout on the adapter's input.

``y = x·Wᵀ + bias + (g - 1) ⊙ x'·Wᵀ + g ⊙ s·(x'·Aᵀ)·Bᵀ`` with ``x' = dropout(x)``: the base product is made twice, once of
``x`` and once of ``x'``, so the two do not cancel and the delta form stays.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import fx

from dorafx.lift import Expr, Poly
from dorafx.match import Candidate, Match, Part, Reason, base_core, part_scale, pattern

if TYPE_CHECKING:
    from dorafx.rewriter import Emitter


@pattern(name="linear_dropout")
class LinearDropout:
    """A constant part, a base product scaled by ``g - 1``, and low-rank products scaled by ``g``."""

    name: str = "linear_dropout"
    spellings: tuple[str, ...] = ("result + (g - 1) * F.linear(dropout(x), W) + g * lora(dropout(x)) * s",)

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
        n = torch.linalg.norm(W + s * (B @ A).detach(), dim=1).detach()
        g = m / n
        return F.linear(x, W, bias) + (g - 1) * F.linear(dropped, W) + g * (s * F.linear(F.linear(dropped, A), B))

    def check(self, candidate: Candidate) -> Match | Reason:
        base = base_core(candidate)
        if base is None:
            return Reason(
                "the output scaled by this norm has no product with the norm's weight", candidate.node, specific=False
            )
        cores = candidate.composition.cores
        scaling = cores[base] + Poly.const(1.0)
        if dict(cores[base].items).get((), 0.0) != -1.0:
            return Reason("a part of the output is not scaled by the same vector as the base product", candidate.node)
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
                return Reason(
                    "a low-rank part of the output is not scaled by g while the base is by g - 1", candidate.node
                )
            parts.append(Part(core, scale))
        if unscaled > 1:
            # The layer's own result is one value; what is added beside it (a residual) belongs to somebody else.
            return Reason("something else than the unscaled base product is added to the delta form", candidate.node)
        if not unscaled or not parts:
            lacking = "the unscaled base product" if not unscaled else "a low-rank product"
            return Reason(f"the delta form lacks {lacking}", candidate.node)
        return Match(
            self.name, candidate.node, candidate.expr, candidate.norm, scaling, base, tuple(parts), constant=constant
        )

    def rewrite(self, match: Match, emit: Emitter) -> fx.Node:
        assert match.constant is not None
        g = emit.vector(match.scaling)
        # A base product that the graph only has with its bias brings (g - 1) times the bias along.
        base, bias = emit.base(match.base, Poly(()), match.scaling + Poly.const(-1.0))
        result = emit.expression(match.constant + Expr.broadcast(bias) if bias.items else match.constant)
        lora, scale = emit.low_rank_sum(match.parts)
        return emit.compose_delta(result, base, lora, g, scale)
