"""Rewrite: carry a plan out on a copy of the graph. The caller's graph is never touched."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import fx

import dorafx.ops  # noqa: F401  (registers the operators that are emitted)
from dorafx._compat.distributed import placements
from dorafx.lift import Atom, VectorValue, tensor_of
from dorafx.lift.targets import canonical_name, drops_nothing
from dorafx.match import Matches, forms
from dorafx.ops.sharding import register_sharding_rules
from dorafx.plan import NormPlan, RewritePlan

from .copying import copy_graph, module_with_graph
from .emit import CannotEmit, Emitter
from .memory import Ownership, laid_out_like
from .norm_operands import factor_operands, in_its_dtype, in_order, packed_operands, weight_operand
from .placements import placed_like, reduced
from .prologue import DENSE, NORM, SITE

__all__ = ["apply_plan"]

_logger = logging.getLogger(__name__)  # TORCH_LOGS="+dorafx"


class _Norms:
    """Emits each norm of a graph once, before its first use; once more where the first use records no gradients and a later one
    does."""

    def __init__(self, plan: RewritePlan) -> None:
        self.plan = plan
        self.made: dict[tuple[int, bool], fx.Node] = {}

    def __call__(self, atom: Atom, emit: Emitter) -> fx.Node:
        """The vector of an atom, which the caller detaches if the atom is."""
        if atom.id not in self.plan.norms:
            return emit.existing_vector(Atom(atom.id))  # of another matrix, or one that was refused: the graph's own
        assert emit.site is not None
        norm = self.plan.norms[atom.id]
        unrecorded = norm.factors.info.requires_grad and emit.site in emit.lift.unrecorded
        for key in ((atom.id, unrecorded), (atom.id, not unrecorded)):
            if key in self.made and (atom.detached or unrecorded or not key[1]):
                return self.made[key]
        made = self.made[atom.id, unrecorded] = _emit_norm(norm, self.plan.sites[atom.id], emit)
        made.meta[NORM] = atom.id
        return made

    def is_read(self, norm: NormPlan) -> bool:
        """Whether a norm that was emitted has a reader."""
        return any(node.users for (atom_id, _), node in self.made.items() if atom_id == norm.factors.atom.id)

    @contextmanager
    def anew(self) -> Iterator[None]:
        """Emit norms once more, as the original computes them."""
        made, self.made = self.made, {}
        try:
            yield
        finally:
            self.made = made


def _emit_norm(norm: NormPlan, site: str, emit: Emitter) -> fx.Node:
    with in_its_dtype(emit, norm.factors.info):
        n = _row_norm(norm, emit)
    n.meta[SITE] = site
    n = reduced(emit, n)
    if abs(norm.factors.weight_coefficient) != 1.0:
        n = emit.call(torch.mul, n, abs(norm.factors.weight_coefficient))
    info = norm.factors.info
    if info.eps or info.rooted:
        # An infinite norm has no gradient, as the root of a sum of squares has none; that of ``n·n`` would be ``0·inf``.
        n = emit.call(torch.clamp_max, n, torch.finfo(emit.tensor(n).dtype).max)
        n = emit.call(torch.mul, n, n)
        n = emit.call(torch.sqrt, emit.call(torch.add, n, info.eps) if info.eps else n)
    return n


def _row_norm(norm: NormPlan, emit: Emitter) -> fx.Node:
    left, right, scale = factor_operands(emit, norm.factors)
    if norm.factors.info.double:
        # One operand decides what the norm is computed in, and this is the smallest.
        right = emit.cast(right, torch.float64)
    if norm.packed is None:
        weight, order = weight_operand(emit, norm.factors)
        right = in_order(emit, right, norm.factors, order)
        if any(placements(tensor_of(operand)) is not None for operand in (weight, left, right)):
            register_sharding_rules()
        return emit.call(torch.ops.dorafx.row_norm.default, weight, left, right, scale, norm.algorithm)
    w = norm.packed
    options = w.format, list(w.shape), w.group, w.dtype
    n = emit.call(torch.ops.dorafx.row_norm_quantized.default, *packed_operands(emit, w), left, right, scale, *options)
    dense = emit.lift.atom_of(norm.factors.dense_atom).node
    assert dense is not None
    n.meta[DENSE] = dense.name
    return n


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
    work: list[tuple[int, fx.Node, int]] = [
        (emit.order[c.match.node], c.match.node, i) for i, c in enumerate(plan.compositions)
    ]
    work += [(emit.order[site], site, -1) for norm in plan.norms.values() for site in norm.factors.info.sites]
    sites = {site: norm for norm in plan.norms.values() for site in norm.factors.info.sites}
    dead: list[fx.Node] = []
    for _, node, index in sorted(work, key=lambda item: item[0]):
        old = copied[node]
        try:
            with graph.inserting_before(old):
                if index < 0:
                    emit.begin(node, False)
                    norms(sites[node].factors.atom, emit)  # here, where every later reader finds it
                    continue
                composition = plan.compositions[index]
                emit.begin(node, composition.accumulate, composition.kernel, composition.match.transposed)
                made = rules[composition.match.pattern].rewrite(composition.match, emit)
                made = laid_out_like(emit, node, placed_like(emit, node, made))
                made = memory.of(emit, node, made)
        except Exception as reason:
            raise _refusal(reason, node) from reason
        old.replace_all_uses_with(made)
        copied[node] = made
        dead.append(old)
    _erase_dead(graph, dead)
    # The original norms that somebody still reads: in most layers the composition was the only one.
    erased = set(copied.values()) - set(graph.nodes)
    remaining = [node for node in sites if copied[node] not in erased and copied[node].users]
    for node in sorted(remaining, key=memory.stays_inside):
        old = copied[node]
        with graph.inserting_before(old):
            emit.begin(node, False)
            try:
                # A caller may write to its result, and must not reach the norm that everybody else reads. A copy would do, but of
                # copies of one tensor Inductor removes all that it can; two norms of the same operands stay two.
                norm = sites[node]
                shared = norms.is_read(norm) or sum(sites[other] is norm for other in remaining) > 1
                with norms.anew() if shared and not memory.stays_inside(node) else nullcontext():
                    made = placed_like(emit, node, _norm_in_place_of(node, norm, emit))
                copied[node] = memory.of(emit, node, laid_out_like(emit, node, made))
            except Exception as reason:
                raise _refusal(reason, node) from reason
            old.replace_all_uses_with(copied[node])
        _erase_dead(graph, [old])
    _erase_dead(graph, list(norms.made.values()))
    graph.lint()
    alive = set(graph.nodes)
    return module_with_graph(gm, graph), {node: copy for node, copy in copied.items() if copy in alive}


def _refusal(error: Exception, site: fx.Node) -> CannotEmit:
    """Why a site is left alone: what an emission that failed said of it, or an error that nobody foresaw. Other sites of the graph
    are rewritten all the same."""
    refusal = error
    if not isinstance(refusal, CannotEmit):
        _logger.debug("%s is left alone", site.format_node(), exc_info=error)
        text = str(error).strip().splitlines()
        refusal = CannotEmit(
            f"its replacement failed ({type(error).__name__}: {text[0] if text else ''}): please report it"
        )
    refusal.site = site
    return refusal


def _norm_in_place_of(node: fx.Node, norm: NormPlan, emit: Emitter) -> fx.Node:
    """What a node made of a norm (a multiple, a power), of the factored one, in the dtype and shape that the node has."""
    tensor, value = tensor_of(node), emit.lift.values.get(node)
    assert tensor is not None
    if not isinstance(value, VectorValue):
        raise CannotEmit(f"{node.name} is not known as a vector")
    made = emit.vector(value.poly)
    if not norm.factors.info.requires_grad:
        made = emit.method("detach", made)
    made = emit.cast(made, tensor.dtype)
    return made if tensor.dim() == 1 else emit.method("reshape", made, tuple(tensor.shape))


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
