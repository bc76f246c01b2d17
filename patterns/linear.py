"""Linear DoRA: ``y = g ⊙ (x·Wᵀ + s·(x·Aᵀ)·Bᵀ) + bias`` with ``g = m / ‖W + s·B·A‖``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx, nn

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
    no_low_rank_product,
    part_scale,
    pattern,
    unequal_scaling,
)


@pattern(name="linear")
class Linear:
    """Every part of the output, the base product and each low-rank product, carries the same scaling ``g``.

    What is added unscaled is the bias. Stacked adapters are the same form with the previous adapter's output as base.
    """

    @staticmethod
    def statement(
        x: torch.Tensor,
        W: torch.Tensor,
        A: torch.Tensor,
        B: torch.Tensor,
        m: torch.Tensor,
        s: float,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The form as plain PyTorch. Shapes: x ``[.., d_in]``, W ``[d_out, d_in]``, A ``[r, d_in]``, B ``[d_out, r]``,
        m and bias ``[d_out]``."""
        n: torch.Tensor = torch.linalg.norm(W + s * (B @ A).detach(), dim=1).detach()
        y = (m / n) * (F.linear(x, W) + s * F.linear(F.linear(x, A), B))
        return y if bias is None else y + bias

    @staticmethod
    def example() -> dict[str, torch.Tensor]:
        """Arguments of ``statement``, parameters among them as such."""
        return {
            "x": torch.empty(3, 5),
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
        scaling = cores[base]
        if scaling.constant is not None:
            what = "the product with the weight is not scaled by the norm"
            return Reason(what, candidate.node, kind=ReasonKind.NO_PRODUCT)
        parts = []
        for core, poly in cores.items():
            if core == base:
                continue
            scale = part_scale(candidate, poly, scaling)
            if scale is None:
                return unequal_scaling(candidate)
            parts.append(Part(core, scale))
        if not parts:
            return no_low_rank_product(candidate)
        return Match(
            self.name,
            candidate.node,
            candidate.expr,
            candidate.norm,
            scaling,
            base,
            tuple(parts),
            bias=candidate.composition.bias,
        )

    name: str = "linear"

    def rewrite(self, match: Match, plan: CompositionPlan, emit: Emit) -> fx.Node:
        g = emit.vector(match.scaling)
        if plan.kernel == "triton_linear":
            layer = emit.linear_kernel(match, g, emit.vector(match.bias) if match.bias.items else None)
            if layer is not None:
                return layer
        # Neither a product that accumulates nor a kernel takes it.
        base = None if plan.accumulate or plan.kernel != "auto" else emit.biased_base(match)
        biased, bias = base is not None, match.bias
        if base is None:
            base, bias = emit.base(match.base, match.bias, match.scaling)
        bias_node = emit.vector(bias) if bias.items else None
        if plan.accumulate:
            for part in match.parts:
                base = emit.accumulated(base, part)
            return emit.compose(base, None, g, bias_node, 1.0, plan.kernel)
        lora, scale = emit.low_rank_sum(match.parts)
        return emit.compose(base, lora, g, bias_node, scale, plan.kernel, biased)
