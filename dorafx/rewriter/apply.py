"""Rewrite: carry a plan out on a copy of the graph. The caller's graph is never touched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import fx

import dorafx.ops  # noqa: F401  (registers the operators that are emitted)
from dorafx._compat.distributed import placements
from dorafx._compat.tensors import is_wrapper
from dorafx.errors import in_a_line
from dorafx.graphs.autocast import regions_of
from dorafx.graphs.copying import copy_graph, module_with_graph
from dorafx.graphs.operators import canonical_name, drops_nothing
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Atom, Expr, Lifter, Poly, VectorValue
from dorafx.match import Matches, ReasonKind, forms
from dorafx.ops.sharding import register_sharding_rules
from dorafx.plan import CompositionPlan, NormPlan, RewritePlan

from .emit import Emitter
from .hoist import DENSE, KEY, NORM, NormKey
from .memory import Ownership, laid_out_like
from .nodes import CannotEmit
from .norm_operands import (
    factor_operands,
    in_its_dtype,
    in_order,
    packed_operands,
    product_dtype,
    weight_operand,
)
from .placements import placed_like, reduced
from .roots import rooted
from .rounding import rounds_more

_logger = logging.getLogger(__name__)  # TORCH_LOGS="+dorafx"


class _Norms:
    """Emits each norm of a graph once, before its first use; once more where the first use records no gradients and a later one
    does."""

    def __init__(self, plan: RewritePlan) -> None:
        self.plan = plan
        self.nodes: dict[tuple[int, bool], fx.Node] = {}

    def __call__(self, atom: Atom, emit: Emitter) -> fx.Node:
        """The vector of an atom. The caller detaches it if the atom is detached."""
        if atom.id not in self.plan.norms:
            return emit.existing_vector(Atom(atom.id))  # of another matrix, or refused: as the graph computes it
        assert emit.site is not None
        norm = self.plan.norms[atom.id]
        unrecorded = norm.factors.info.requires_grad and emit.site in emit.lift.unrecorded
        for key in ((atom.id, unrecorded), (atom.id, not unrecorded)):
            if key in self.nodes and (atom.detached or unrecorded or not key[1]):
                return self.nodes[key]
        node = self.nodes[atom.id, unrecorded] = _emit_norm(norm, (self.plan.part, atom.id), emit)
        node.meta[NORM] = atom.id
        return node

    def is_read(self, norm: NormPlan) -> bool:
        """Whether a norm that was emitted has a reader."""
        return any(node.users for (atom_id, _), node in self.nodes.items() if atom_id == norm.factors.atom.id)

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Emit norms again, instead of reusing those that were emitted."""
        nodes, self.nodes = self.nodes, {}
        try:
            yield
        finally:
            self.nodes = nodes


def _emit_norm(norm: NormPlan, key: NormKey, emit: Emitter) -> fx.Node:
    with in_its_dtype(emit, norm.factors.info):
        n = _row_norm(norm, emit)
    n.meta[KEY] = key
    n = reduced(emit, n)
    if abs(norm.factors.weight_coefficient) != 1.0:
        n = emit.call(torch.mul, n, abs(norm.factors.weight_coefficient))
    return rooted(emit, n, norm.factors.info)


def _row_norm(norm: NormPlan, emit: Emitter) -> fx.Node:
    _refuse_inference_tensors(norm, emit)
    left, right, scale = factor_operands(emit, norm.factors)
    if norm.factors.info.double:
        # One operand in fp64 makes the norm fp64, and this one is the smallest.
        right = emit.cast(right, torch.float64)
    dtype = product_dtype(emit, norm.factors, left, right)
    rounded = () if dtype is None else (dtype,)
    if norm.packed is None:
        batched = norm.factors.batch is not None
        weight, order = weight_operand(emit, norm.factors)
        right = in_order(emit, right, norm.factors, order)
        if any(placements(tensor_of(operand)) is not None for operand in (weight, left, right)):
            if batched:
                raise CannotEmit(
                    "the experts' weights or factors are sharded over devices, and norms of such batches are not known",
                    ReasonKind.BATCHED_WEIGHTS,
                )
            register_sharding_rules()
        operator = torch.ops.dorafx.row_norm_batched.default if batched else torch.ops.dorafx.row_norm.default
        return emit.call(operator, weight, left, right, scale, norm.algorithm, *rounded)
    w = norm.packed
    options = w.format, list(w.shape), w.group, w.dtype, *rounded
    n = emit.call(torch.ops.dorafx.row_norm_quantized.default, *packed_operands(emit, w), left, right, scale, *options)
    dense = emit.lift.atom_of(norm.factors.dense_atom).node
    assert dense is not None
    n.meta[DENSE] = dense.name
    return n


def _refuse_lost_gradient(emit: Emitter, node: fx.Node, term: Expr | Poly) -> None:
    """Refuse a node that requires a gradient only by way of a view that was made where gradients are not recorded.

    Such a view of a tensor that requires a gradient requires one, too, but is a leaf: no gradient reaches that tensor through it. The
    view's term has no gradient, so a node that is emitted from it alone would require none."""
    tensor = tensor_of(node)
    recorded = tensor is not None and tensor.requires_grad and node not in emit.lift.unrecorded
    if recorded and not emit.lift.requires_grad(term):
        raise CannotEmit(
            f"{node.name} requires a gradient by way of a view alone that was made where none are recorded: make the view where they "
            "are, or detach it",
            ReasonKind.VIEW_WITHOUT_GRADIENT,
        )


def _refuse_inference_tensors(norm: NormPlan, emit: Emitter) -> None:
    """Refuse a norm that would save a tensor of inference mode for its backward: that of the original saves ``W + s·B·A``, that of the
    factored norm the summands."""
    assert emit.site is not None
    if not norm.factors.info.requires_grad:
        return
    if norm.packed is None:
        operands = [emit.lift.atom_of(norm.factors.dense_atom).node]
    else:
        operands = [source[0] for source in norm.packed.tensors if source is not None]
    for operand in operands:
        if operand is not None and not emit.lift.can_be_saved(operand, emit.site):
            raise CannotEmit(
                f"{operand.name} was made in inference mode, and the gradient of its norm needs it: "
                "make it under torch.no_grad(), or clone it outside of inference mode",
                ReasonKind.INFERENCE_TENSOR,
            )


def apply_plan(
    gm: fx.GraphModule, matches: Matches, plan: RewritePlan
) -> tuple[fx.GraphModule, dict[fx.Node, fx.Node]]:
    """A new graph module with every planned rewrite in it, and original node -> the node that stands for it there.

    Raises:
        CannotEmit: an operand cannot be read where it is needed; nothing is changed, and ``site`` says which part of the
            plan to leave out.
    """
    graph, copied = copy_graph(gm)
    norms = _Norms(plan)
    memory = Ownership(gm.graph)
    emit = Emitter(matches.lift, graph, copied, norms)
    rules = forms()
    regions = regions_of(matches.lift.graph)
    sites = {site: norm for norm in plan.norms.values() for site in norm.factors.info.sites}
    work: list[tuple[fx.Node, CompositionPlan | None]] = [(c.match.node, c) for c in plan.compositions]
    work += [(site, None) for site in sites]
    dead: list[fx.Node] = []
    for node, composition in sorted(work, key=lambda item: emit.order[item[0]]):
        old = copied[node]
        try:
            with graph.inserting_before(old):
                if composition is None:
                    emit.begin(node)
                    norms(sites[node].factors.atom, emit)  # here, where every later reader finds it
                    continue
                match = composition.match
                emit.begin(node, match)
                _refuse_lost_gradient(emit, node, match.expr)
                apart = rounds_more(matches.lift, match, regions, emit.order, bool(plan.part))
                with emit.unrounded() if apart else nullcontext():
                    replacement = rules[match.pattern].rewrite(match, composition, emit)
                    replacement = laid_out_like(emit, node, placed_like(emit, node, replacement))
                    replacement = memory.of(emit, node, replacement)
        except Exception as reason:
            raise _refusal(reason, node, emit.lift) from reason
        old.replace_all_uses_with(replacement)
        copied[node] = replacement
        dead.append(old)
    _erase_dead(graph, dead)
    # The original norms that are still read; in most layers only the composition read the norm.
    erased = set(copied.values()) - set(graph.nodes)
    remaining = [node for node in sites if copied[node] not in erased and copied[node].users]
    for node in sorted(remaining, key=memory.stays_inside):
        old = copied[node]
        with graph.inserting_before(old):
            emit.begin(node)
            try:
                # A caller may write to a result, so it must not be the norm that others read. A copy would do, but Inductor removes
                # copies of one tensor where it can; two norms of the same operands stay two.
                norm = sites[node]
                shared = norms.is_read(norm) or sum(sites[other] is norm for other in remaining) > 1
                with norms.anew() if shared and not memory.stays_inside(node) else nullcontext():
                    replacement = placed_like(emit, node, _norm_in_place_of(node, norm, emit))
                copied[node] = memory.of(emit, node, laid_out_like(emit, node, replacement))
            except Exception as reason:
                raise _refusal(reason, node, emit.lift) from reason
            old.replace_all_uses_with(copied[node])
        _erase_dead(graph, [old])
    _erase_dead(graph, list(norms.nodes.values()))
    graph.lint()
    alive = set(graph.nodes)
    return module_with_graph(gm, graph), {node: copy for node, copy in copied.items() if copy in alive}


def _refusal(error: Exception, site: fx.Node, lift: Lifter) -> CannotEmit:
    """Why a site is left alone: the emitter's reason, or an unforeseen error. Other sites of the graph are rewritten all the same."""
    refusal = error
    if not isinstance(refusal, CannotEmit):
        _logger.debug("%s is left alone", site.format_node(), exc_info=error)
        message, _ = in_a_line(error)
        operand = _of_a_subclass(lift, site)
        if operand is not None:
            refusal = CannotEmit(
                f"{operand.name} is a {type(tensor_of(operand)).__name__}, a tensor subclass that does not know dorafx's operators ({message})",
                ReasonKind.TENSOR_SUBCLASS,
            )
        else:
            refusal = CannotEmit(f"its replacement failed ({message}): please report it", ReasonKind.REPLACEMENT_FAILED)
    refusal.site = site
    return refusal


def _of_a_subclass(lift: Lifter, site: fx.Node) -> fx.Node | None:
    """An operand of a site that is of a tensor subclass with operators of its own."""
    value = lift.noted(site)
    pending: list[Expr | Poly | None] = []
    if isinstance(value, VectorValue):
        pending += [value.poly, value.row]
    elif value is not None:
        pending.append(value.expr)
    seen: set[int] = set()
    while pending:
        term = pending.pop()
        for atom in term.atoms() if term is not None else ():
            if atom.id in seen:
                continue
            seen.add(atom.id)
            info = lift.atom_of(atom)
            tensor = tensor_of(info.node)
            if tensor is not None and is_wrapper(tensor) and placements(tensor) is None:
                return info.node
            pending += [info.expr, info.poly, *(lift.atom_of(Atom(norm)).expr for norm in info.norms)]
    return None


def _norm_in_place_of(node: fx.Node, norm: NormPlan, emit: Emitter) -> fx.Node:
    """What a node computes from a norm (a multiple, a power), from the factored norm instead, in the node's dtype and shape."""
    tensor, value = tensor_of(node), emit.lift.noted(node)
    assert tensor is not None
    if not isinstance(value, VectorValue):
        raise CannotEmit(f"{node.name} is not known as a vector")
    _refuse_lost_gradient(emit, node, value.poly)
    vector = emit.vector(value.poly)
    if not norm.factors.info.requires_grad:
        vector = emit.method("detach", vector)
    vector = emit.cast(vector, tensor.dtype)
    return vector if tensor.dim() == 1 else emit.method("reshape", vector, tuple(tensor.shape))


def _erase_dead(graph: fx.Graph, roots: list[fx.Node]) -> None:
    """Erase replaced nodes and what only they used. Not the whole graph's dead code: an unused dropout, say, must still
    draw its random numbers, and in-place operators have effects without users."""
    stack = list(roots)
    erased: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in erased or node.users or node.op not in ("call_function", "call_method"):
            continue
        name = canonical_name(node)
        if name is None or (name == "dropout" and not drops_nothing(node)):
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        erased.add(node)
        stack.extend(inputs)
