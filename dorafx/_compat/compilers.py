"""Private API of compilers: what the partitioner and Inductor are told."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot
from torch.utils.checkpoint import CheckpointPolicy

__all__ = ["mode_options", "save_for_backward"]


def mode_options(mode: str) -> dict[str, Any]:
    """Inductor's options that a mode of ``torch.compile`` stands for."""
    return dict(torch._inductor.list_mode_options(mode))


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
