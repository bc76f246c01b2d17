"""Private API of the autograd engine: its state while a forward runs."""

from __future__ import annotations

from typing import Any

import torch


def differentiates_by_itself(tensor: torch.Tensor) -> bool:
    """Whether a tensor's whole history is differentiated by autograd's built-in formulas, with no ``torch.autograd.Function`` and no
    custom operator (which is one, too)."""
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
    """Whether this thread runs a backward. A forward inside of it is a recomputation (activation checkpointing)."""
    return bool(torch._C._current_graph_task_id() != -1)


def saved_tensors_are_packed() -> bool:
    """Whether ``saved_tensors_hooks`` are active, as they are in the forward of a checkpointed region that is not reentrant."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # type: ignore[no-untyped-call,unused-ignore]


def below_autograd() -> Any:
    """A context in which operators skip their autograd kernels: how an autograd kernel calls its own forward."""
    return torch._C._AutoDispatchBelowAutograd()


def below_autocast() -> Any:
    """A context in which no operator is autocast. Unlike ``torch.autocast(enabled=False)`` it keeps the settings of the surrounding
    region and its cache of cast weights, and costs one thread-local flag."""
    return torch._C._DisableAutocast()


def forward_mode() -> bool:
    """Whether forward-mode differentiation is active (``torch.autograd.forward_ad.dual_level``, ``torch.func.jvp``)."""
    return int(torch.autograd.forward_ad._current_level) >= 0
