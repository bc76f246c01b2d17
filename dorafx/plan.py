"""Plan: what may be rewritten (legality) and what should be (cost). A plan is plain data that one can print."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import fx

from dorafx import _compat
from dorafx._compat.distributed import placements
from dorafx.cost import MergedCost, merged_cost
from dorafx.kernels import choose_kernel
from dorafx.lift import Expr, Lifter, Mat, PackedWeight, packed_weight, tensor_of
from dorafx.lift.algebra import ONES, transpose_chain
from dorafx.lift.targets import canonical_name, first_argument
from dorafx.log import Record
from dorafx.match import Match, Matches, NormFactors, Reason, source_of
from dorafx.options import Options
from dorafx.provenance import site_of

__all__ = ["CompositionPlan", "NormPlan", "RewritePlan", "Subject", "make_plan", "serves_few_tokens"]

_FEW_TOKENS = 8


@dataclass(frozen=True)
class NormPlan:
    """One norm: its factors and the algorithm that computes it.

    ``packed``: what its weight is dequantised from, block by block; None for a weight that exists dense. ``formed``: why a
    quantised weight has to be formed for it; else empty.
    """

    factors: NormFactors
    algorithm: Literal["tiled", "factored"]
    packed: PackedWeight | None = None
    formed: str = ""


@dataclass(frozen=True)
class CompositionPlan:
    """One composition.

    ``accumulate``: add the low-rank product into the base product inside the GEMM, leaving one ``[tokens, d_out]``
    intermediate. In half precision that would round the sum once more than the original does, so there the two products
    stay apart and the epilogue adds them in fp32.

    ``few_tokens``: see :func:`serves_few_tokens`. ``kernel``: see :func:`dorafx.kernels.choose_kernel`.
    """

    match: Match
    accumulate: bool
    few_tokens: bool
    kernel: str = "auto"


@dataclass(frozen=True)
class Subject:
    """The nodes of the original graph that a record speaks of.

    ``ends``: where its region ends. ``terms``: what the region computes; empty if it is to be followed down to the graph's
    inputs. ``norm_sites``: the nodes that compute its norm. ``cause``: the node that the record's reason is about.
    """

    ends: tuple[fx.Node, ...]
    terms: tuple[Expr, ...] = ()
    norm_sites: tuple[fx.Node, ...] = ()
    cause: fx.Node | None = None


@dataclass
class RewritePlan:
    """Everything that will happen to one graph; ``records`` is what the log will say of it, ``subjects`` which nodes each
    record speaks of, ``sites`` where in the model each norm belongs."""

    norms: dict[int, NormPlan] = field(default_factory=dict)
    compositions: list[CompositionPlan] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    subjects: list[Subject] = field(default_factory=list)
    sites: dict[int, str] = field(default_factory=dict)

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


def make_plan(matches: Matches, options: Options, graph_id: int = 0) -> RewritePlan:
    """Decide for every candidate of a graph.

    Args:
        matches: what the matcher found.
        options: ``norm`` and ``compose`` override the measured choices.
        graph_id: goes into the records.
    """
    plan = RewritePlan()
    lift = matches.lift
    for atom_id, factors in matches.norms.items():
        plan.norms[atom_id] = _norm_plan(lift, factors, options)
    composed: dict[int, Match] = {}
    decisions: dict[int, str] = {}
    misses = dict(matches.composition_misses)
    order = {node: i for i, node in enumerate(lift.graph.nodes)}
    for match in matches.compositions:
        # One composition may be scaled by several norms, by row and by column: all of them are served by it.
        norms = {atom.id for atom in lift.norms_in(match.expr)} | {match.norm.atom.id}
        cost = _cost_if_merged(lift, match)
        if cost is not None:
            decisions.update((atom_id, str(cost)) for atom_id in norms)
            if not cost.pays:
                misses.update((atom_id, Reason("the merged weight is cheaper", match.node)) for atom_id in norms)
                continue
        kernel, said = choose_kernel(lift, match, options, order)
        for atom_id in norms if said else ():
            decisions[atom_id] = "; ".join(filter(None, (decisions.get(atom_id, ""), said)))
        plan.compositions.append(
            CompositionPlan(match, _accumulates(lift, match, options), serves_few_tokens(tensor_of(match.node)), kernel)
        )
        composed.update((atom_id, match) for atom_id in norms)
    flops = _gemm_flops(lift)
    for atom_id in [i for i, norm in plan.norms.items() if i not in composed and not norm.factors.info.sites]:
        # No node computes this norm alone (``F.normalize``), so without its composition there is nothing to replace.
        del plan.norms[atom_id]
        lost = misses.get(atom_id) or Reason("no node computes this norm by itself")
        plan.records.append(replace(_missed([], lost, options, graph_id), decision=decisions.get(atom_id, "")))
        plan.subjects.append(_missed_subject([], lost))
    for atom_id, norm in plan.norms.items():
        record = _rewritten(lift, norm, composed.get(atom_id), misses.get(atom_id), flops, options, graph_id)
        plan.records.append(replace(record, decision="; ".join(filter(None, (decisions.get(atom_id), norm.formed)))))
        plan.sites[atom_id] = plan.records[-1].site
        plan.subjects.append(_subject(norm.factors, composed.get(atom_id), misses.get(atom_id)))
    missed = [(lift.atoms[atom_id].sites, reason) for atom_id, reason in matches.misses.items()]
    # A refused composition beside others of its norm, whose record is theirs.
    missed += [([reason.node], reason) for i, reason in misses.items() if i in composed and reason.node is not None]
    missed += [([node], reason) for node, reason in matches.unknown]
    for sites, reason in missed:
        plan.records.append(_missed(sites, reason, options, graph_id))
        plan.subjects.append(_missed_subject(sites, reason))
    return plan


def _subject(norm: NormFactors, match: Match | None, lost: Reason | None) -> Subject:
    sites = tuple(norm.info.sites)
    if match is not None:
        return Subject((match.node,), (match.expr,), sites)
    return Subject(sites, (), sites, lost.node if lost is not None else None)


def _missed_subject(sites: list[fx.Node], reason: Reason) -> Subject:
    ends = tuple(sites) or ((reason.node,) if reason.node is not None else ())
    return Subject(ends, (), tuple(sites), reason.node)


def _cost_if_merged(lift: Lifter, match: Match) -> MergedCost | None:
    """What it costs to take a merged weight apart; None where the graph multiplies by the weight itself anyway."""
    bases = [Expr.chain(match.base), *([Expr.chain(transpose_chain(match.base))] if match.transposed else ())]
    if len(match.base) < 2 or any(lift.gemms.get(base) or lift.nodes.get(base) for base in bases):
        return None
    output, weight = tensor_of(match.node), tensor_of(lift.atom_of(match.norm.dense_atom).node)
    if output is None or weight is None or not weight.numel():
        return None
    d_out = match.norm.d_out if match.norm.info.side == "row" else match.norm.d_in
    tokens = math.prod(int(_compat.size_hint(size)) for size in output.shape) // max(d_out, 1)
    return merged_cost(
        tokens,
        match.norm.d_out,
        match.norm.d_in,
        match.norm.rank,
        _dense_bytes(match.norm, _norm_closure(match.norm) + _merging(lift, match)),
        output.requires_grad,
        output.device,
        sum(sum(isinstance(f, Mat) for f in part.core) < 3 and part.core[-1:] != (Mat(ONES),) for part in match.parts),
    )


def _merging(lift: Lifter, match: Match) -> list[fx.Node]:
    """The nodes that turn the sum into the merged weight."""
    sizes = sorted((str(match.norm.d_out), str(match.norm.d_in)))
    found: dict[fx.Node, None] = {}
    # The product itself and what follows it up to the match (a view, a bias, a cast) are few.
    stack = [(match.node, 4)]
    while stack:
        node, beyond = stack.pop()
        for argument in node.all_input_nodes:
            tensor = tensor_of(argument)
            if argument in found or tensor is None or argument.op not in ("call_function", "call_method"):
                continue
            if tensor.dim() == 2 and sorted(map(str, tensor.shape)) == sizes:
                found[argument] = None
                stack.append((argument, 0))
            elif beyond:
                stack.append((argument, beyond - 1))
    return list(found)


def _norm_plan(lift: Lifter, factors: NormFactors, options: Options) -> NormPlan:
    node = lift.atom_of(factors.dense_atom).node
    packed = packed_weight(node) if node is not None else ""
    if isinstance(packed, PackedWeight):
        (mat,) = factors.weight
        if any(t is not None and not t[1] and t[0] in lift.written for t in packed.tensors):
            packed = "its codes are written in place"
        elif isinstance(mat, Mat) and mat.transposed:
            packed = "it is transposed, and its rows are no rows of the norm"
        elif factors.info.requires_grad:
            packed = "gradients flow through the norm"
    if isinstance(packed, str):
        formed = f"the dequantised weight is formed: {packed}" if packed else ""
        return NormPlan(factors, _norm_algorithm(options), None, formed)
    # The expansion would dequantise the weight for each of its terms.
    return NormPlan(factors, "tiled", packed)


def _norm_algorithm(options: Options) -> Literal["tiled", "factored"]:
    # Measured on a CPU and on the paper's H200 numbers: the tiled form reads W once, has no cancellation and costs the
    # same FLOPs; the factored form wins only where ‖W‖² is kept between calls.
    return "factored" if options.norm == "factored" else "tiled"


def _accumulates(lift: Lifter, match: Match, options: Options) -> bool:
    head = match.base[0]
    if match.constant is not None or (isinstance(head, Mat) and lift.atom_of(head.atom).kind in ("unfold", "channels")):
        return False
    if options.compose != "auto":
        return options.compose == "accumulated"
    tensor = tensor_of(match.node)
    if placements(tensor) is not None:
        return False  # of partial sums DTensor would make whole ones before it accumulates into them
    if tensor is None:
        return False
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


def _norm_closure(norm: NormFactors) -> list[fx.Node]:
    """The nodes that exist for the sake of the norm: its ancestors down to parameters."""
    seen: dict[fx.Node, None] = {}
    stack = list(norm.info.sites)
    while stack:
        node = stack.pop()
        if node in seen or node.op not in ("call_function", "call_method"):
            continue
        seen[node] = None
        stack.extend(node.all_input_nodes)
    return list(seen)


def _gemm_flops(lift: Lifter) -> dict[fx.Node, int]:
    """FLOPs of every matrix product of the graph whose sizes are numbers."""
    flops: dict[fx.Node, int] = {}
    for gemms in lift.gemms.values():
        for gemm in gemms:
            out, lhs = tensor_of(gemm.node), tensor_of(gemm.lhs)
            if gemm.convolution is None and out is not None and lhs is not None and isinstance(out.numel(), int):
                flops[gemm.node] = flops.get(gemm.node, 0) + 2 * out.numel() * int(lhs.shape[-1])
    return flops


def _still_formed(norm: NormPlan, closure: list[fx.Node]) -> set[int]:
    """Storages of dequantised weights that exist after the rewrite, too: the norm needs them, or a product does."""
    mine = set(closure)
    formed = {
        _compat.storage_id(t) for n in closure if canonical_name(n) == "dequantize" and (t := tensor_of(n)) is not None
    }
    if norm.packed is None:
        return formed
    read = {_compat.storage_id(t) for n in closure if not mine.issuperset(n.users) and (t := tensor_of(n)) is not None}
    return formed & read


def _dense_bytes(norm: NormFactors, nodes: list[fx.Node], kept: Iterable[int] = ()) -> int:
    """Bytes of the intermediates of ``d_out · d_in`` elements or more that the original made for its norm; views and
    casts that change nothing share storage with their input and count once, parameters not at all."""
    seen = {
        _compat.storage_id(t)
        for n in nodes
        for a in n.all_input_nodes
        if a.op == "placeholder" and (t := tensor_of(a)) is not None
    }
    seen.update(kept)
    total = 0
    for node in nodes:
        tensor = tensor_of(node)
        if tensor is None or not isinstance(tensor.numel(), int) or tensor.numel() < norm.d_out * norm.d_in:
            continue
        storage = _compat.storage_id(tensor)
        if storage not in seen:
            seen.add(storage)
            total += tensor.numel() * tensor.element_size()
    return total


def _rewritten(
    lift: Lifter,
    norm: NormPlan,
    match: Match | None,
    composition_miss: Reason | None,
    gemm_flops: dict[fx.Node, int],
    options: Options,
    graph_id: int,
) -> Record:
    factors = norm.factors
    site = match.origin if match is not None else (factors.info.sites[0] if factors.info.sites else None)
    closure = _norm_closure(factors) or (_merging(lift, match) if match is not None else [])
    weight = tensor_of(lift.atom_of(factors.dense_atom).node)
    reason = ""
    if match is None:
        why = composition_miss.text if composition_miss is not None else "no activation is scaled by it"
        reason = f"only the norm is rewritten: {why}"
    return Record(
        status="rewritten",
        site=site_of(site) if site is not None else "",
        pattern=match.pattern if match is not None else "norm_only",
        reason=reason,
        source=source_of(site) if site is not None else "",
        d_out=factors.d_out,
        d_in=factors.d_in,
        rank=factors.rank,
        dtype=_weight_type(norm, weight),
        dense_bytes_avoided=_dense_bytes(factors, closure, _still_formed(norm, closure)),
        flops_before=sum(gemm_flops.get(node, 0) for node in closure),
        flops_after=2 * factors.d_out * factors.d_in * factors.rank,
        norm_algorithm=norm.algorithm,
        codegen=options.codegen,
        graph=graph_id,
    )


def _weight_type(norm: NormPlan, weight: torch.Tensor | None) -> str:
    if norm.packed is not None:
        return norm.packed.format
    return str(weight.dtype).removeprefix("torch.") if weight is not None else ""


def _missed(sites: list[fx.Node], reason: Reason, options: Options, graph_id: int) -> Record:
    node = reason.node or (sites[0] if sites else None)
    operand = tensor_of(first_argument(sites[0])) if sites else None
    matrix = operand is not None and operand.dim() == 2 and all(isinstance(s, int) for s in operand.shape)
    return Record(
        status="missed",
        site=site_of(node) if node is not None else "",
        pattern="norm_only",
        reason=reason.text,
        source=source_of(node) if node is not None else "",
        d_out=int(operand.shape[0]) if matrix and operand is not None else 0,
        d_in=int(operand.shape[1]) if matrix and operand is not None else 0,
        rank=0,
        dtype=str(operand.dtype).removeprefix("torch.") if operand is not None else "",
        codegen=options.codegen,
        graph=graph_id,
    )
