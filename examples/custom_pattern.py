"""A pattern of one's own, for a variant of DoRA that normalises the base product only.

Takes about 15 s on two CPU cores. Needs torch and dorafx alone.

dorafx's own forms do not cover this variant, so without the class below only its norm would be rewritten.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import fx

import dorafx
from dorafx.extension import Candidate, CompositionPlan, Emit, Match, Part, Reason, base_core


@dorafx.pattern(name="base_only")
class BaseOnly:
    """``y = g ⊙ (x·Wᵀ) + s·(x·Aᵀ)·Bᵀ`` with ``g = m / ‖W + s·B·A‖``."""

    def check(self, candidate: Candidate) -> Match | Reason:
        base = base_core(candidate)
        if base is None:
            return Reason("no product with the norm's weight is scaled by it", candidate.node)
        cores = candidate.composition.cores
        others = {core: scale for core, scale in cores.items() if core != base}
        if not others or any(scale.constant is None for scale in others.values()):
            return Reason("the low-rank product is not added with a constant factor", candidate.node)
        parts = tuple(Part(core, scale) for core, scale in others.items())
        return Match(self.name, candidate.node, candidate.expr, candidate.norm, cores[base], base, parts)

    def rewrite(self, match: Match, plan: CompositionPlan, emit: Emit) -> fx.Node:
        base, _ = emit.base(match.base, match.bias, match.scaling)
        y = emit.compose(base, None, emit.vector(match.scaling), None, 1.0, plan.kernel)
        low_rank, scale = emit.low_rank_sum(match.parts)
        return emit.call(torch.add, y, emit.call(torch.mul, low_rank, scale))

    name: str


def layer(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, magnitude: torch.Tensor
) -> torch.Tensor:
    norm = (weight + 0.5 * b @ a).norm(dim=1).detach()
    return magnitude / norm * F.linear(x, weight) + 0.5 * F.linear(F.linear(x, a), b)


def main() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(64, 128), torch.randn(256, 128)
    a, b, magnitude = torch.randn(8, 128), torch.randn(256, 8), torch.rand(256)
    compiled = torch.compile(layer, backend="dorafx")
    difference = compiled(x, weight, a, b, magnitude) - layer(x, weight, a, b, magnitude)
    print(f"largest difference {difference.abs().max().item():.1e}")
    print(dorafx.rewrite_log())


if __name__ == "__main__":
    main()
