"""The formulas as plain PyTorch, one function each: what every kernel is tested against, in fp64."""

from __future__ import annotations

import torch


def row_norm(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """``‖W + s·L·R‖`` by row, the dense way. Shapes: ``[d_out, d_in]``, ``[d_out, r]``, ``[r, d_in]`` -> ``[d_out]``."""
    n: torch.Tensor = torch.linalg.vector_norm(weight + scale * (left @ right), dim=1)
    return n


def row_norm_factored(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    """The same from the expansion ``‖W‖² + 2s·⟨L, W·Rᵀ⟩ + s²·⟨L·(R·Rᵀ), L⟩`` by row (arXiv:2603.22276, section 3): base
    term, cross term, Gram term."""
    base = (weight * weight).sum(dim=1)
    cross = (left * (weight @ right.mT)).sum(dim=1)
    gram = ((left @ (right @ right.mT)) * left).sum(dim=1)
    return (base + 2 * scale * cross + scale * scale * gram).clamp_min(0).sqrt()


def compose(
    base: torch.Tensor, lora: torch.Tensor | None, g: torch.Tensor, bias: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """``g ⊙ (base + s·lora) + bias``. base, lora, result ``[.., d_out]``; g, bias ``[d_out]``."""
    y = g * (base if lora is None else base + scale * lora)
    return y if bias is None else y + bias


def compose_delta(
    result: torch.Tensor, base: torch.Tensor, lora: torch.Tensor, g: torch.Tensor, scale: float
) -> torch.Tensor:
    """``result + (g - 1) ⊙ base + g ⊙ s·lora``: DoRA with a dropout on the adapter's input."""
    return result + (g - 1) * base + g * (scale * lora)
