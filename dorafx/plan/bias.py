"""Which base products keep the bias that the graph adds to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import fx

from dorafx._compat.distributed import placements
from dorafx.graphs.tensors import may_require_grad, tensor_of
from dorafx.graphs.uses import dies
from dorafx.lift import Expr, Gemm, Lifter
from dorafx.match import Match
from dorafx.ops import dispatch


class BiasedBase(NamedTuple):
    """A base product that a composition takes with its bias.

    Attributes:
        node: ``x·Wᵀ + bias``, in the graph.
        trained: the bias, if the product may pass gradients to it. The product is then made with the detached bias in its place: what the
            composition takes out of it again is no function of the bias. The difference of two gradients, the product's and that of what is
            taken out, would be NaN where ``g`` is, and a bias that is added last has the output's.
    """

    node: fx.Node
    trained: fx.Node | None


def biased_base(lift: Lifter, match: Match, order: Mapping[fx.Node, int]) -> BiasedBase | None:
    """The base product with its bias, if a composition can take it so. None where the graph has no such product or has it without the
    bias, too, and where a kernel may compose, as on a GPU.

    With it a layer whose adapter does nothing yet gives what the frozen layer does, to the bit.

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
        constant = gemm.node in lift.unrecorded
        inside = lift.detached(vector.poly) if constant else vector.poly
        if inside != match.bias:
            continue
        if constant or not (may_require_grad(gemm.node) and may_require_grad(gemm.bias)):
            return BiasedBase(gemm.node, None)
        if _can_be_made_again(lift, gemm) and dies(gemm.node, match.node, order):
            return BiasedBase(gemm.node, gemm.bias)
    return None


def _can_be_made_again(lift: Lifter, gemm: Gemm) -> bool:
    """Whether one operator computes a product from its three operands, which are as they were and of one dtype, as outside of autocast."""
    operands = {gemm.lhs, gemm.rhs, gemm.bias}
    tensors = [tensor_of(node) for node in (gemm.node, *operands)]
    return (
        len(operands) == 3
        and set(gemm.node.all_input_nodes) == operands
        and lift.written.isdisjoint(operands)
        and len({None if t is None else t.dtype for t in tensors}) == 1
    )
