"""What a graph reads: attributes, and the inputs that are parameters."""

from __future__ import annotations

import torch
from torch import fx

from .writes import attribute_of


def is_leaf(node: fx.Node) -> bool:
    """Whether a node is an input or an attribute of the graph."""
    return node.op in ("placeholder", "get_attr")


def attribute_id(node: fx.Node) -> int | None:
    """Which tensor a ``get_attr`` node reads; None for any other node."""
    value = attribute_of(node) if node.op == "get_attr" else None
    return id(value) if isinstance(value, torch.Tensor) else None


def looks_like_parameter(node: fx.Node) -> bool:
    """Whether a placeholder or an attribute is a parameter or a buffer, judged by its tensor or its name."""
    if node.op == "get_attr":
        return True
    example = node.meta.get("example_value")
    if isinstance(example, torch.nn.Parameter):
        return True
    source = str(node.target)
    return "_parameters_" in source or "_buffers_" in source
