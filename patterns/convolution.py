"""Convolutional DoRA: ``y = g ⊙ (conv(x, W) + s·conv₁(conv(x, A), B)) + bias``, ``g = m / ‖W + s·B·A‖`` over all axes but the first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import fx

from dorafx.lift import Mat
from dorafx.match import Candidate, Match, Reason, base_core, forms, pattern

if TYPE_CHECKING:
    from dorafx.rewriter import Emitter


@pattern(name="convolution")
class Convolution:
    """The linear form, or the linear form with dropout, with the patches of a convolution as activations: they are never
    formed, the convolutions that the graph has are used. The channel axis takes the place of the last."""

    name: str = "convolution"
    spellings: tuple[str, ...] = (
        "result + (g - 1) * (result - bias) + g * conv1x1(conv(x, A), B) * s",
        "g * (conv(x, W) + s * conv1x1(conv(x, A), B)) + bias",
    )

    @staticmethod
    def statement(
        x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor, s: float
    ) -> torch.Tensor:
        """The form as plain PyTorch. Shapes: x ``[N, c_in, h, w]``, W ``[c_out, c_in, k, k]``, A ``[r, c_in, k, k]``,
        B ``[c_out, r, 1, 1]``, m ``[1, c_out, 1, 1]``; one or three spatial axes likewise."""
        delta = (B.flatten(1) @ A.flatten(1)).view(W.shape)
        n = (W + s * delta.detach()).norm(p=2, dim=(1, 2, 3), keepdim=True).transpose(1, 0).detach()
        return (m / n) * (F.conv2d(x, W) + s * F.conv2d(F.conv2d(x, A), B))

    def check(self, candidate: Candidate) -> Match | Reason:
        base = base_core(candidate)
        head = base[0] if base else None
        if not isinstance(head, Mat) or candidate.lift.atom_of(head.atom).kind not in ("unfold", "channels"):
            return Reason("the layer is no convolution", candidate.node, specific=False)
        result = forms()["linear"].check(candidate)
        if isinstance(result, Reason):
            result = forms()["linear_dropout"].check(candidate)
        return replace(result, pattern=self.name) if isinstance(result, Match) else result

    def rewrite(self, match: Match, emit: Emitter) -> fx.Node:
        emit.channels = True
        made: fx.Node = forms()["linear" if match.constant is None else "linear_dropout"].rewrite(match, emit)
        return made
