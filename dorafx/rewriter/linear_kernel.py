"""The whole layer as one operator, ``dorafx::dora_linear``, where the plan says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from dorafx.kernels import linear_operands
from dorafx.match import Match

from .shapes import sizes_of

if TYPE_CHECKING:
    from .emit import Emitter

__all__ = ["linear_kernel"]


def linear_kernel(emit: Emitter, match: Match, g: fx.Node, bias: fx.Node | None) -> fx.Node | None:
    """The layer's output; None where an operand does not fit, which the plan could not see."""
    operands = linear_operands(emit.lift, match, emit.order)
    if isinstance(operands, str):
        return None
    x, weight, h, left = (emit.operand(node) for node in operands.nodes)
    assert emit.site is not None
    wanted, vectors = emit.tensor(emit.site).shape, [v for v in (g, bias) if v is not None]
    flat = any(sizes_of(emit.tensor(t).shape[:-1]) != sizes_of(wanted[:-1]) for t in (x, h))
    if any(sizes_of(emit.tensor(v).shape) != sizes_of(wanted[-1:]) for v in vectors):
        return None
    if flat:
        if not all(isinstance(size, int) for size in wanted):
            return None
        x, h = emit.flat(x), emit.flat(h)
    weight, left = (emit.method("t", t) if flip else t for t, flip in zip((weight, left), operands.transposed))
    y = emit.call(torch.ops.dorafx.dora_linear.default, x, weight, h, left, g, bias, operands.scale, emit.out_dtype())
    return emit.method("reshape", y, tuple(wanted)) if flat else y
