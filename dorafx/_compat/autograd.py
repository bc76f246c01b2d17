"""Private API of the autograd engine: what is going on while a forward runs."""

from __future__ import annotations

import torch

__all__ = ["differentiates_by_itself", "in_backward", "saved_tensors_are_packed"]


def differentiates_by_itself(tensor: torch.Tensor) -> bool:
    """Whether all that leads to a tensor is differentiated by formulas of autograd's own, none by a ``torch.autograd.Function``'s
    or a custom operator's (which is one, too)."""
    stack, seen = [tensor.grad_fn], set()
    while stack:
        fn = stack.pop()
        if isinstance(fn, torch.autograd.function.BackwardCFunction):
            return False
        if fn is not None and fn not in seen:
            seen.add(fn)
            stack.extend(following for following, _ in fn.next_functions)
    return tensor.requires_grad


def in_backward() -> bool:
    """Whether this thread runs a backward: a forward that runs there recomputes (activation checkpointing)."""
    return bool(torch._C._current_graph_task_id() != -1)


def saved_tensors_are_packed() -> bool:
    """Whether ``saved_tensors_hooks`` are active, as they are in the forward of a checkpointed region that is not reentrant."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[no-untyped-call,unused-ignore]
