"""Which base products keep the bias that the graph adds to them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from dorafx._compat.distributed import placements
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Expr, Lifter
from dorafx.match import Match
from dorafx.ops import dispatch


def biased_base(lift: Lifter, match: Match, order: Mapping[fx.Node, int]) -> fx.Node | None:
    """The node of ``x·Wᵀ + bias`` that a composition can take as it is. None where the graph has no such product or has it without the
    bias, too, and where a kernel may compose, as on a GPU.

    With it a layer whose adapter does nothing yet gives what the frozen layer does, to the bit. Not where the bias is trained: its
    gradient would be the base's less the difference's, which is NaN where ``g`` is, and a bias that is added last has the output's.

    Args:
        order: the position of each node in the graph.
    """
    if not match.bias.items or match.transposed or match.norm.batch is not None:
        return None
    gemms = [g for g in lift.gemms.get(Expr.chain(match.base), ()) if order[g.node] < order[match.node]]
    if any(gemm.bias is None for gemm in gemms):
        return None
    for gemm in gemms:
        out, bias, vector = tensor_of(gemm.node), tensor_of(gemm.bias), lift.vector(gemm.bias)
        if out is None or bias is None or dispatch.serves(out.device) or placements(out) is not None or vector is None:
            continue
        if out.requires_grad and bias.requires_grad:
            continue
        inside = lift.detached(vector.poly) if gemm.node in lift.unrecorded else vector.poly
        if inside == match.bias:
            return gemm.node
    return None
