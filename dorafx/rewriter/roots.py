"""Norms as the program computes them from the norms that an operator gives: with an epsilon, as a root of squares, by input channel."""

from __future__ import annotations

import torch
from torch import fx

from dorafx.lift import AtomInfo

from .nodes import NodeEmitter


def rooted(emit: NodeEmitter, norms: fx.Node, info: AtomInfo) -> fx.Node:
    """The norm that an indeterminate stands for.

    Args:
        emit: makes the nodes.
        norms: the norm of each row or column; of filters by input channel, of each column ``[channels · positions]``.
        info: what is known of the norm. The root of a sum of squares has no gradient at zero, where a norm has one, of zero.
    """
    n = parts = norms
    if info.span > 1:
        parts = emit.method("reshape", norms, (-1, info.span))
        n = emit.call(torch.linalg.vector_norm, parts, 2, 1)
    if not (info.eps or (info.rooted and info.requires_grad)):
        return n
    # ``sqrt(n·n)`` has no gradient at zero, either. Where n is infinite, the gradient is a norm's in either case (NaN where what comes in
    # is NaN); that of ``n·n`` would be ``0·inf``, so n itself is taken.
    largest = torch.finfo(emit.tensor(norms).dtype).max
    finite = emit.call(torch.clamp_max, parts, largest)
    squares = emit.call(torch.mul, finite, finite)
    squares = emit.call(torch.sum, squares, 1) if info.span > 1 else squares
    root = emit.call(torch.sqrt, emit.call(torch.add, squares, info.eps) if info.eps else squares)
    return emit.call(torch.where, emit.call(torch.le, n, largest), root, n) if info.requires_grad else root
