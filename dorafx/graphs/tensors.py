"""The tensors of a graph, as a tracer saw them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx


def tensor_of(node: Any) -> torch.Tensor | None:
    """The (fake) tensor that a tracer left on a node: shape, dtype, device; None where there is none."""
    if not isinstance(node, fx.Node):
        return None
    value = node.meta.get("example_value", node.meta.get("val"))
    return value if isinstance(value, torch.Tensor) else None


def may_require_grad(node: fx.Node) -> bool:
    """Whether a node's tensor requires a gradient, or was left by a tracer whose tensors do not tell."""
    tensor = tensor_of(node)
    return tensor is None or tensor.requires_grad or "example_value" not in node.meta
