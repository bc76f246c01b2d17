"""Private API of the autograd engine: what is going on while a forward runs."""

from __future__ import annotations

import torch

__all__ = ["in_backward", "saved_tensors_are_packed"]


def in_backward() -> bool:
    """Whether this thread runs a backward: a forward that runs there recomputes (activation checkpointing)."""
    return bool(torch._C._current_graph_task_id() != -1)


def saved_tensors_are_packed() -> bool:
    """Whether ``saved_tensors_hooks`` are active, as they are in the forward of a checkpointed region that is not reentrant."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[no-untyped-call,unused-ignore]
