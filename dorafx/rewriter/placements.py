"""Placements of DTensors: what replaces a node must lie on the devices as the node's value did."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dorafx._compat import distributed as _distributed
from dorafx.graphs.tensors import tensor_of
from dorafx.match import ReasonKind

from .emit import Emitter
from .nodes import CannotEmit


def reduced(emit: Emitter, norm: fx.Node) -> fx.Node:
    """The norm of whole rows. Of a weight sharded along d_in the operator gives a partial norm on each device."""
    placements = _distributed.placements(tensor_of(norm))
    if not any(map(_distributed.is_partial, placements or ())):
        return norm
    whole = tuple(_distributed.replicated() if _distributed.is_partial(p) else p for p in placements or ())
    return emit.call(_redistribution(whole, _Reduction.apply), norm)


def placed_like(emit: Emitter, original: fx.Node, replacement: fx.Node) -> fx.Node:
    """``replacement``, laid out as the value of the node that it replaces: what reads it may take its local part.

    Raises:
        CannotEmit: DTensor cannot bring one layout into the other.
    """
    expected, actual = _distributed.placements(tensor_of(original)), _distributed.placements(tensor_of(replacement))
    if expected == actual:
        return replacement
    if expected is None or actual is None or any(map(_distributed.is_partial, expected)):
        what = f"the original's result is {_text(expected)} and the rewrite's would be {_text(actual)}"
        raise CannotEmit(what, ReasonKind.PLACEMENTS)
    return emit.call(_redistribution(expected), replacement)


def is_redistribution(node: fx.Node) -> bool:
    """Whether a node is a change of placement that the rewriter emitted."""
    return node.op == "call_function" and getattr(node.target, "dorafx_placements", None) is not None


class _Reduction(torch.autograd.Function):
    """Partial norms to whole ones. The backward of the row norm takes the gradient of the whole norm, whole, where DTensor's
    own would split it into parts, and cannot."""

    @staticmethod
    def forward(ctx: Any, tensor: Any, placements: tuple[Any, ...]) -> Any:
        ctx.placements = placements
        return tensor.redistribute(placements=placements)

    @staticmethod
    def backward(ctx: Any, gradient: Any) -> Any:
        return gradient.redistribute(placements=ctx.placements), None


def _redistribute(tensor: Any, placements: tuple[Any, ...]) -> Any:
    return tensor.redistribute(placements=placements)


@functools.cache
def _redistribution(
    placements: tuple[Any, ...], apply: Callable[..., torch.Tensor] = _redistribute
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A graph cannot hold placements as arguments. It can hold a function that has them, as Dynamo does."""

    def redistribute(tensor: torch.Tensor) -> torch.Tensor:
        # The validation of a rewrite runs it on plain tensors.
        return tensor if _distributed.placements(tensor) is None else apply(tensor, placements)

    redistribute.dorafx_placements = placements  # type: ignore[attr-defined]
    return redistribute


def _text(placements: tuple[Any, ...] | None) -> str:
    return "one tensor" if placements is None else f"a DTensor of {', '.join(map(str, placements))}"
