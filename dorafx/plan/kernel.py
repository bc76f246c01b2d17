"""Which compositions the Triton kernels serve, and with which operands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from dorafx._compat.distributed import placements
from dorafx.graphs.tensors import tensor_of
from dorafx.graphs.uses import dies
from dorafx.lift import Expr, Lifter, Mat
from dorafx.lift.algebra import ONES
from dorafx.match import Match
from dorafx.ops.dispatch import runs_kernels
from dorafx.options import Options


@dataclass(frozen=True)
class LinearOperands:
    """What the DoRA linear in one kernel reads: nodes of the original graph.

    Attributes:
        nodes: x ``[.., d_in]``, W, h ``[.., r]``, B.
        transposed: whether W and B are ``[d_in, d_out]`` and ``[r, d_out]`` there.
        scale: the scaling s.
    """

    nodes: tuple[fx.Node, fx.Node, fx.Node, fx.Node]
    transposed: tuple[bool, bool]
    scale: float


def choose_kernel(lift: Lifter, match: Match, options: Options, order: Mapping[fx.Node, int]) -> tuple[str, str]:
    """The kernel of a composition, ``"auto"``, ``"triton"`` or ``"triton_linear"``, and a note on it for the log, empty where the user
    chose no kernel.

    Args:
        order: see :func:`linear_operands`.
    """
    requested = options.compose in ("triton", "triton_linear")
    if options.compose == "accumulated" or not (requested or options.codegen == "eager"):
        return "auto", ""
    output = tensor_of(match.node)
    sharded = output is not None and placements(output) is not None
    if output is None or sharded or not runs_kernels(output.device, output.dtype):
        what = "of unknown shape"
        if output is not None:
            what = "a DTensor" if sharded else f"{str(output.dtype).removeprefix('torch.')} on {output.device}"
        return "auto", f"composed without a kernel: the output is {what}" if requested else ""
    if not requested:
        return "triton", ""
    if options.compose == "triton":
        return "triton", "composed by a Triton kernel"
    operands = linear_operands(lift, match, order)
    if isinstance(operands, str):
        return "triton", f"composed by a Triton kernel, not in one with the products: {operands}"
    return "triton_linear", "the whole layer is one Triton kernel"


def linear_operands(lift: Lifter, match: Match, order: Mapping[fx.Node, int]) -> LinearOperands | str:
    """The operands of the layer as one kernel, or why it cannot be one.

    Args:
        order: the position of each node in the graph.
    """
    if match.pattern != "linear":
        return f"its form is {match.pattern}"
    gemms = [g for g in lift.gemms.get(Expr.chain(match.base), ()) if order[g.node] < order[match.node]]
    if not gemms or gemms[0].convolution is not None or gemms[0].detached:
        return "the graph has no base product of its own"
    if not all(dies(g.node, match.node, order) for g in gemms):
        return "somebody else reads the base product"
    if len(match.parts) != 1 or match.parts[0].scale.constant is None:
        return "there is more than one low-rank product, or its scaling is no number"
    core = match.parts[0].core
    last = core[-1]
    if len(core) < 2 or not isinstance(last, Mat) or last.atom == ONES or last.atom.detached:
        return "the low-rank product does not end in a factor of the graph"
    low = [n for n in lift.nodes.get(Expr.chain(core[:-1]), ()) if order[n] < order[match.node]]
    left = lift.atom_of(last.atom)
    if not low or left.node is None or left.kind != "node":
        return "x·Aᵀ or B is no value of the graph"
    gemm = gemms[0]
    nodes = (gemm.lhs, gemm.rhs, low[-1], left.node)
    if any(not isinstance(n, fx.Node) or n in lift.written or order[n] >= order[match.node] for n in nodes):
        return "an operand is written in place"
    tensors = [tensor_of(n) for n in (*nodes, gemm.node)]
    known = [t for t in tensors if t is not None]
    if len(known) < len(tensors) or known[1].dim() != 2 or known[3].dim() != 2 or min(t.dim() for t in known) < 2:
        return "an operand is no matrix"
    if len({t.dtype for t in known}) != 1:
        return "the products' operands have different dtypes"
    return LinearOperands(nodes, (not gemm.rhs_transposed, not last.transposed), match.parts[0].scale.constant)
