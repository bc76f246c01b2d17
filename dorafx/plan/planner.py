"""Plan: what may be rewritten (legality) and what should be (cost). A plan is plain data that one can print."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import fx

from dorafx._compat.distributed import placements
from dorafx._compat.tensors import size_hint
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Expr, Lifter, Mat, PackedWeight, packed_weight
from dorafx.lift.algebra import ONES, count_matrices, transpose_chain
from dorafx.match import CompositionPlan, Match, Matches, NormFactors, Reason, ReasonKind
from dorafx.ops.norm import fastest
from dorafx.options import Options

from .accounting import dense_bytes, merging, norm_closure
from .bias import biased_base
from .cost import MergedCost, merged_cost
from .kernel import choose_kernel

_FEW_TOKENS = 8


@dataclass(frozen=True)
class NormPlan:
    """How one norm is computed.

    Attributes:
        factors: the weight and the low-rank products.
        algorithm: what computes it.
        packed: what its weight is dequantised from, block by block; None for a weight that exists dense.
        formed: why a quantised weight has to be dequantised as a whole for it; otherwise empty.
    """

    factors: NormFactors
    algorithm: Literal["tiled", "factored"]
    packed: PackedWeight | None = None
    formed: str = ""


@dataclass(frozen=True)
class Left:
    """A candidate that is left alone.

    Attributes:
        reason: why.
        sites: the nodes that compute its norm; none where no node does by itself.
        decision: what a choice by cost was based on; empty without such a choice.
        atom_id: of its norm; None where an operator is no norm that the lifter knows.
    """

    reason: Reason
    sites: tuple[fx.Node, ...] = ()
    decision: str = ""
    atom_id: int | None = None


@dataclass
class RewritePlan:
    """Everything that will happen to one graph.

    Attributes:
        norms: those that are computed by a factored norm, by the id of their atom.
        compositions: those that are replaced.
        composed: for each norm that a planned composition reads, that composition.
        without_composition: for each other norm, why no planned composition reads it.
        decisions: for each norm, what choices were based on.
        left: candidates that are left alone.
        part: the name of the graph among the bodies of the graph that it is in; empty for the outermost.
    """

    norms: dict[int, NormPlan] = field(default_factory=dict)
    compositions: list[CompositionPlan] = field(default_factory=list)
    composed: dict[int, Match] = field(default_factory=dict)
    without_composition: dict[int, Reason] = field(default_factory=dict)
    decisions: dict[int, str] = field(default_factory=dict)
    left: list[Left] = field(default_factory=list)
    part: str = ""

    @property
    def empty(self) -> bool:
        return not self.norms

    def __str__(self) -> str:
        lines = [f"{len(self.norms)} norms, {len(self.compositions)} compositions"]
        for c in self.compositions:
            f = c.match.norm
            how = "accumulated in the GEMM" if c.accumulate else "added in the epilogue"
            if c.kernel != "auto":
                how += ", one kernel" + (" with both products" if c.kernel == "triton_linear" else "")
            lines.append(
                f"  {c.match.pattern} at {c.match.node.name}: [{f.d_out}, {f.d_in}] rank {f.rank}, low-rank product {how}"
            )
        return "\n".join(lines)


def make_plan(matches: Matches, options: Options, part: str = "") -> RewritePlan:
    """Decide for every candidate of a graph.

    Args:
        matches: what the matcher found.
        options: ``norm`` and ``compose`` override the measured choices.
        part: see :class:`RewritePlan`.
    """
    plan = RewritePlan(part=part)
    lift = matches.lift
    for atom_id, factors in matches.norms.items():
        plan.norms[atom_id] = _norm_plan(lift, factors, options)
    misses = dict(matches.composition_misses)
    order = {node: i for i, node in enumerate(lift.graph.nodes)}
    for match in matches.compositions:
        # One composition may be scaled by several norms, by row and by column: all of them are served by it.
        norms = {atom.id for atom in lift.norms_in(match.expr)} | {match.norm.atom.id}
        cost = _cost_if_merged(lift, match)
        if cost is not None and (rounding := _rounds_once(lift, match)) is not None:
            misses.update(dict.fromkeys(norms, rounding))
            continue
        if cost is not None:
            plan.decisions.update((atom_id, str(cost)) for atom_id in norms)
            if not cost.pays:
                cheaper = Reason("the merged weight is cheaper", match.node, kind=ReasonKind.MERGED_CHEAPER)
                misses.update(dict.fromkeys(norms, cheaper))
                continue
        kernel, note = choose_kernel(lift, match, options, order)
        for atom_id in norms if note else ():
            plan.decisions[atom_id] = "; ".join(filter(None, (plan.decisions.get(atom_id, ""), note)))
        accumulate = _accumulates(lift, match, options, order)
        few_tokens = serves_few_tokens(tensor_of(match.node))
        plan.compositions.append(CompositionPlan(match, accumulate, few_tokens, kernel))
        plan.composed.update((atom_id, match) for atom_id in norms)
    for atom_id in [i for i, n in plan.norms.items() if i not in plan.composed and not n.factors.info.sites]:
        # No node computes this norm alone (``F.normalize``), so without its composition there is nothing to replace.
        del plan.norms[atom_id]
        reason = misses.pop(atom_id, None) or Reason(
            "no node computes this norm by itself", kind=ReasonKind.NORM_IN_OPERATOR
        )
        plan.left.append(Left(reason, decision=plan.decisions.get(atom_id, ""), atom_id=atom_id))
    plan.left += [Left(reason, tuple(lift.atoms[i].sites), atom_id=i) for i, reason in matches.misses.items()]
    # A refused composition of a norm that planned compositions read, too: the norm's own record is about those.
    plan.left += [Left(r, (r.node,), atom_id=i) for i, r in misses.items() if i in plan.composed and r.node is not None]
    plan.left += [Left(reason, (node,)) for node, reason in matches.unknown]
    unread = Reason("no activation is scaled by it", kind=ReasonKind.SCALES_NOTHING)
    plan.without_composition = {i: misses.get(i, unread) for i in plan.norms if i not in plan.composed}
    return plan


def _cost_if_merged(lift: Lifter, match: Match) -> MergedCost | None:
    """What the factored form costs in place of a merged weight; None where the graph multiplies by the weight itself anyway."""
    bases = [Expr.chain(match.base), *([Expr.chain(transpose_chain(match.base))] if match.transposed else ())]
    if len(match.base) < 2 or any(lift.gemms.get(base) or lift.nodes.get(base) for base in bases):
        return None
    output, weight = tensor_of(match.node), tensor_of(lift.atom_of(match.norm.dense_atom).node)
    if output is None or weight is None or not weight.numel():
        return None
    d_out = match.norm.d_out if match.norm.info.side == "row" else match.norm.d_in
    batch = match.norm.batch or 1  # the cost of one expert of a batch
    tokens = math.prod(int(size_hint(size)) for size in output.shape) // max(d_out * batch, 1)
    return merged_cost(
        tokens,
        match.norm.d_out,
        match.norm.d_in,
        match.norm.rank,
        dense_bytes(match.norm, norm_closure(match.norm) + merging(lift, match)) // batch,
        output.requires_grad,
        output.device,
        sum(count_matrices(part.core) < 3 and part.core[-1:] != (Mat(ONES),) for part in match.parts),
    )


def _rounds_once(lift: Lifter, match: Match) -> Reason | None:
    """Why a merged weight stays: it is made in more digits than it is multiplied in, as under autocast. It is rounded once then; taken
    apart, the weight, each factor and each product would be. Errors against fp64 grow by up to 1.6 (``tests/soundness/test_rounding.py``)."""
    merged = {node: t.dtype for node in merging(lift, match) if (t := tensor_of(node)) is not None}
    widest = max(merged.values(), key=lambda dtype: dtype.itemsize, default=None)
    for gemm in (gemm for gemms in lift.gemms.values() for gemm in gemms):
        product = tensor_of(gemm.node)
        if widest is None or product is None or not {gemm.lhs, gemm.rhs} & merged.keys():
            continue
        if product.dtype.itemsize < widest.itemsize:
            wide, narrow = (str(dtype).removeprefix("torch.") for dtype in (widest, product.dtype))
            text = f"the merged weight is made in {wide} and rounded to {narrow} once, its parts would each be rounded"
            return Reason(text, match.node, kind=ReasonKind.MERGED_ROUNDS_ONCE)
    return None


def _norm_plan(lift: Lifter, factors: NormFactors, options: Options) -> NormPlan:
    node = lift.atom_of(factors.dense_atom).node
    packed = packed_weight(node) if node is not None else ""
    if isinstance(packed, PackedWeight):
        if any(t is not None and not t[1] and t[0] in lift.written for t in packed.tensors):
            packed = "its codes are written in place"
        elif factors.weight.transposed:
            packed = "it is transposed, and its rows are no rows of the norm"
        elif factors.info.requires_grad:
            packed = "gradients flow through the norm"
        elif factors.batch is not None:
            packed = "it is a batch of matrices"
    if isinstance(packed, str):
        formed = f"the dequantised weight is formed: {packed}" if packed else ""
        return NormPlan(factors, _norm_algorithm(lift, factors, options), None, formed)
    # The factored algorithm would dequantise the weight once for each of its terms.
    return NormPlan(factors, "tiled", packed)


def _norm_algorithm(lift: Lifter, factors: NormFactors, options: Options) -> Literal["tiled", "factored"]:
    if options.norm != "auto" or factors.batch is not None or factors.info.double:
        return "factored" if options.norm == "factored" else "tiled"
    matrices = (m for part in factors.delta for m in (*part.left, *part.right) if isinstance(m, Mat) and m.atom != ONES)
    nodes = [lift.atom_of(m.atom).node for m in (factors.weight, *matrices)]
    tensors = [tensor_of(node) for node in nodes if node is not None]
    known = [t for t in tensors if t is not None]
    if len(known) < len(nodes) or any(placements(t) is not None for t in known):
        return "tiled"
    return fastest(factors.d_out, factors.d_in, factors.rank, known)


def _accumulates(lift: Lifter, match: Match, options: Options, order: Mapping[fx.Node, int]) -> bool:
    head = match.base[0]
    if (
        match.norm.batch is not None
        or match.constant is not None
        or (isinstance(head, Mat) and lift.atom_of(head.atom).kind in ("unfold", "channels"))
    ):
        return False
    if options.compose != "auto":
        return options.compose == "accumulated"
    tensor = tensor_of(match.node)
    if placements(tensor) is not None:
        return False  # DTensor would reduce partial sums before it accumulates into them
    if tensor is None:
        return False
    if biased_base(lift, match, order) is not None:
        return False  # the gradient of g takes the sum without the bias, and once they are added that has lost digits
    if serves_few_tokens(tensor):
        return False  # the sum is nothing to compute, and a product that reads one costs the host more than one that does not
    # Under autocast the result may be fp32 while the products are bf16, and fp64 adapters may stand on an fp32 weight; the
    # narrowest dtype on the way decides.
    dtypes = {tensor.dtype, *(t.dtype for a in _near(match.node, 8) if (t := tensor_of(a)) is not None)}
    narrow = {torch.float16, torch.bfloat16} | ({torch.float32} if torch.float64 in dtypes else set())
    return not dtypes & narrow


def serves_few_tokens(output: torch.Tensor | None) -> bool:
    """Whether a composition's output ``[.., d_out]`` has so few tokens that its norm (2·d_out·d_in·r FLOPs) costs more
    than all the rest (2·tokens·d_out·d_in): at most 8, or one a sequence. Such forwards, and no others, reuse norms."""
    if output is None or output.dim() == 0:
        return False
    leading = output.shape[:-1]
    if len(leading) > 1 and isinstance(leading[-1], int) and leading[-1] == 1:
        return True
    return all(isinstance(size, int) for size in leading) and math.prod(leading) <= _FEW_TOKENS


def _near(node: fx.Node, depth: int) -> set[fx.Node]:
    seen: set[fx.Node] = set()
    frontier = [node]
    for _ in range(depth):
        frontier = [a for n in frontier for a in n.all_input_nodes if a not in seen and a.op != "placeholder"]
        seen.update(frontier)
    return seen
