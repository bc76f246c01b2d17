"""Convolutional DoRA: ``y = g ⊙ (conv(x, W) + s·conv₁(conv(x, A), B)) + bias``, ``g = m / ‖W + s·B·A‖`` over all axes but the first."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import fx, nn

from dorafx.lift import Mat
from dorafx.match import Candidate, CompositionPlan, Emit, Match, Reason, ReasonKind, base_core, forms, pattern


@pattern(name="convolution")
class Convolution:
    """The linear forms with the patches of a convolution as activations. These are never formed: the convolutions that the graph has are
    used, or new ones with the factors as filters. The channel axis takes the place of the last. A norm by input channel scales the input."""

    name: str = "convolution"

    @staticmethod
    def statement(
        x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor, s: float
    ) -> torch.Tensor:
        """The form as plain PyTorch. Shapes: x ``[N, c_in, h, w]``, W ``[c_out, c_in, k, k]``, A ``[r, c_in, k, k]``,
        B ``[c_out, r, 1, 1]``, m ``[1, c_out, 1, 1]``; one or three spatial axes likewise."""
        delta = (B.flatten(1) @ A.flatten(1)).view(W.shape)
        n: torch.Tensor = (W + s * delta.detach()).norm(p=2, dim=(1, 2, 3), keepdim=True).transpose(1, 0).detach()
        return (m / n) * (F.conv2d(x, W) + s * F.conv2d(F.conv2d(x, A), B))

    @staticmethod
    def example() -> dict[str, torch.Tensor]:
        """Arguments of ``statement``, parameters among them as such."""
        return {
            "x": torch.empty(1, 3, 4, 4),
            "W": nn.Parameter(torch.empty(5, 3, 3, 3)),
            "A": nn.Parameter(torch.empty(2, 3, 3, 3)),
            "B": nn.Parameter(torch.empty(5, 2, 1, 1)),
            "m": nn.Parameter(torch.empty(1, 5, 1, 1)),
            "s": torch.empty(()),
        }

    def check(self, candidate: Candidate) -> Match | Reason:
        base = base_core(candidate)
        if base is None:
            return self._scaled_input(candidate)
        head = base[0]
        if not isinstance(head, Mat) or candidate.lift.atom_of(head.atom).kind not in ("unfold", "channels"):
            what = "the layer is no convolution"
            return Reason(what, candidate.node, specific=False, kind=ReasonKind.NO_PRODUCT)
        results = [forms()[name].check(candidate) for name in ("linear", "linear_dropout", "linear_weight_delta")]
        match = next((result for result in results if isinstance(result, Match)), None)
        return results[1] if match is None else replace(match, pattern=self.name, channels_first=True)

    def _scaled_input(self, candidate: Candidate) -> Match | Reason:
        """With a norm by input channel: the channels of the input are scaled, and then convolved."""
        result = forms()["linear_columns"].check(candidate)
        if candidate.lift.is_convolved(candidate.expr):
            return replace(result, pattern=self.name, channels_first=True) if isinstance(result, Match) else result
        what = "the layer is no convolution"
        return Reason(what, candidate.node, specific=False, kind=ReasonKind.NO_PRODUCT)

    def rewrite(self, match: Match, plan: CompositionPlan, emit: Emit) -> fx.Node:
        if match.constant is None:
            form = "linear"
        elif match.constant != match.expr:
            form = "linear_dropout"
        else:
            form = "linear_columns" if match.norm.info.side == "col" else "linear_weight_delta"
        return forms()[form].rewrite(match, plan, emit)
