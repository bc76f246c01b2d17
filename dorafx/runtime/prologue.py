"""The prologue at run time: compute a graph's norms, or take them from the store, and call the graph with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from dorafx.rewriter import HoistedNorm

from .store import NormStore, norm_store

__all__ = ["with_prologue"]


def with_prologue(
    compiled: Callable[..., Any],
    norms: Sequence[HoistedNorm],
    reuse: str,
    few_tokens: bool,
    store: NormStore | None = None,
) -> Callable[..., Any]:
    """A callable of the original inputs.

    Args:
        compiled: the main graph, whose last inputs are the norms.
        norms: how each is computed.
        reuse: ``"never"``: compute every norm at every call. ``"auto"``: reuse where no gradients are recorded and the
            call has few tokens, where computing a norm would cost more than all the rest. ``"step"``: also while
            gradients are recorded, until the optimizer steps.
        few_tokens: whether the graph serves few tokens (decoding).
        store: where norms are kept; the process's by default.
    """
    if not norms:
        return compiled
    kept_in = norm_store() if store is None else store
    prologue = [(_callable(norm), norm.inputs, norm.signature) for norm in norms]

    def run(*args: Any) -> Any:
        recording = torch.is_grad_enabled()
        may_reuse = reuse == "step" or (reuse == "auto" and few_tokens and not recording)
        values = []
        for compute, inputs, signature in prologue:
            tensors = [args[i] for i in inputs]
            norm = kept_in.kept(signature, tensors) if may_reuse else None
            if norm is None:
                with torch.inference_mode(False), torch.no_grad():
                    norm = compute(*tensors)
                kept_in.counters.count(computed=1)
                if reuse == "step" or (reuse == "auto" and not recording):
                    kept_in.keep(signature, tensors, norm)
                elif recording:
                    # Whoever trains writes the parameters next, and not every optimizer can be seen doing it.
                    kept_in.drop(signature, tensors, "a forward recorded gradients")
            values.append(norm)
        return compiled(*args, *values)

    return run


_CALLABLES: dict[str, Callable[..., torch.Tensor]] = {}


def _callable(norm: HoistedNorm) -> Callable[..., torch.Tensor]:
    """Equal layers share one: generating code for each of a few hundred takes its time."""
    if norm.signature not in _CALLABLES:
        _CALLABLES[norm.signature] = fx.GraphModule(torch.nn.Module(), norm.graph).forward
    return _CALLABLES[norm.signature]
