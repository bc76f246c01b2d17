"""Linear DoRA: ``y = g ⊙ (x·Wᵀ + s·(x·Aᵀ)·Bᵀ) + bias`` with ``g = m / ‖W + s·B·A‖``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import fx

from dorafx.match import Candidate, Match, Part, Reason, base_core, part_scale, pattern

if TYPE_CHECKING:
    from dorafx.rewriter import Emitter


@pattern(name="linear")
class Linear:
    """Every part of the output, the base product and each low-rank product, carries the same scaling ``g``.

    What is added unscaled is the bias. Stacked adapters are the same form with the previous adapter's output as base.
    """

    spellings: tuple[str, ...] = (
        "result + (g - 1) * (result - bias) + g * lora * s",
        "g * (base + s * lora) + bias",
        "(base + s * lora) / n * m",
        "F.linear(x, m * W' / n, bias)",
    )

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
        n = torch.linalg.norm(W + s * (B @ A).detach(), dim=1).detach()
        y = (m / n) * (F.linear(x, W) + s * F.linear(F.linear(x, A), B))
        return y if bias is None else y + bias

    def check(self, candidate: Candidate) -> Match | Reason:
        base = base_core(candidate)
        if base is None:
            return Reason(
                "the output scaled by this norm has no product with the norm's weight", candidate.node, specific=False
            )
        cores = candidate.composition.cores
        scaling = cores[base]
        if scaling.constant is not None:
            return Reason("the product with the weight is not scaled by the norm", candidate.node)
        parts = []
        for core, poly in cores.items():
            if core == base:
                continue
            scale = part_scale(candidate, poly, scaling)
            if scale is None:
                return Reason(
                    "a part of the output is not scaled by the same vector as the base product", candidate.node
                )
            parts.append(Part(core, scale))
        if not parts:
            return Reason("the base product is scaled by the norm, but no low-rank product is added", candidate.node)
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

    def rewrite(self, match: Match, emit: Emitter) -> fx.Node:
        g = emit.vector(match.scaling)
        whole = emit.linear_kernel(match, g, emit.vector(match.bias) if match.bias.items else None)
        if whole is not None:
            return whole
        base, bias = emit.base(match.base, match.bias, match.scaling)
        bias_node = emit.vector(bias) if bias.items else None
        if emit.accumulate:
            for part in match.parts:
                base = emit.accumulated(base, part)
            return emit.compose(base, None, g, bias_node, 1.0)
        lora, scale = emit.low_rank_sum(match.parts)
        return emit.compose(base, lora, g, bias_node, scale)
