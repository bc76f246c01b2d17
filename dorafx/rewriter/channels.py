"""The norm of filters by input channel, of the norms of their columns."""

from __future__ import annotations

import torch
from torch import fx

from dorafx.lift import AtomInfo

from .nodes import NodeEmitter


def norm_by_channel(emit: NodeEmitter, columns: fx.Node, info: AtomInfo) -> fx.Node:
    """The norm of each input channel ``[channels]``.

    Args:
        emit: makes the nodes.
        columns: the norm of each column ``[channels · positions]``.
        info: what is known of the norm. The root of a sum of squares has no gradient at zero, where a norm has one, of zero.
    """
    parts = emit.method("reshape", columns, (-1, info.span))
    whole = emit.call(torch.linalg.vector_norm, parts, 2, 1)
    if not (info.eps or (info.rooted and info.requires_grad)):
        return whole
    largest = torch.finfo(emit.tensor(columns).dtype).max
    finite = emit.call(torch.clamp_max, parts, largest)
    squares = emit.call(torch.sum, emit.call(torch.mul, finite, finite), 1)
    rooted = emit.call(torch.sqrt, emit.call(torch.add, squares, info.eps) if info.eps else squares)
    return emit.call(torch.where, emit.call(torch.le, whole, largest), rooted, whole) if info.requires_grad else rooted
