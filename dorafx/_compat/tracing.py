"""Private API of tracing: what a compiler is told about the nodes that it records."""

from __future__ import annotations

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils.checkpoint import CheckpointPolicy

__all__ = ["save_for_backward"]


def save_for_backward(tensor: torch.Tensor) -> None:
    """While a joint graph of forward and backward is traced: let its partitioner save this tensor and not what it is made
    of. No effect outside of tracing, nor in a checkpointed region, which has its own policy for every node."""
    mode = get_proxy_mode()
    if mode is None:
        return
    inner = torch._from_functional_tensor(tensor.elem) if hasattr(tensor, "elem") else tensor
    slot = get_proxy_slot(inner, mode.tracer, None)
    if slot is not None:
        slot.proxy.node.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)
