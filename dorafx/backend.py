"""The Dynamo backend: the whole road of a graph, one line a station."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from dorafx import _compat, capture, codegen
from dorafx._compat.distributed import bucket_splitter, rewrite_before_buckets, zero3_parameter
from dorafx._compat.hooks import guard_on_hooks
from dorafx._compat.transforms import transform_around_products
from dorafx.errors import DorafxWarning, RewriteMissError
from dorafx.lift.functional import has_writes, without_private_writes
from dorafx.lift.grad_mode import modes_of_bodies, switches_gradients_on
from dorafx.log import Drawing, Record, RewriteLog, fold_key, rewrite_log
from dorafx.match import Matches, Reason, match_graph
from dorafx.options import Options
from dorafx.plan import RewritePlan, make_plan
from dorafx.rewriter import (
    CannotEmit,
    HoistedNorm,
    apply_plan,
    copy_graph_module,
    draw,
    hoist_norms,
    norms_inside,
    own_results,
    reuse_buffers,
)
from dorafx.runtime import with_prologue
from dorafx.self_check import announce_untested_versions

if TYPE_CHECKING:
    from dorafx.validation import Check

__all__ = ["dorafx", "log_failure", "rewrite_graph_module", "validate_graph_module"]

_logger = logging.getLogger(__name__)  # TORCH_LOGS="+dorafx"
_graph_ids = itertools.count(1)
_warned: set[str] = set()

# Polyfills must be in place before Dynamo traces, and torch.compile looks the backend up before it traces: the import of
# this module (by the entry point) is the only moment that comes early enough.
capture.install()


def dorafx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    members: tuple[str, ...] = ("",),
) -> Callable[..., Any]:
    """``torch.compile(model, backend="dorafx", mode=…, options={…})``.

    Args:
        gm: the graph that Dynamo captured. It is not changed.
        example_inputs: its inputs, as Dynamo gives them.
        options: ``dorafx.*`` keys are dorafx's own (see :class:`dorafx.options.Options`), the rest go to Inductor.
        mode: Inductor's mode.
        members: where the graph is that of a part of a model: the names of the modules that it serves.

    Returns:
        The compiled callable.

    Raises:
        ValueError: an unknown or wrong ``dorafx.*`` option.
        RewriteMissError: ``dorafx.strict`` and a candidate was not rewritten.
    """
    try:
        ours, inductor = Options.split(options)
        codegen.check_name(ours.codegen)
    except ValueError as error:
        raise _compat.through_dynamo(error) from None
    capture.install()
    guard_on_hooks()
    announce_untested_versions()
    program = _refused(gm, example_inputs, ours, members) or rewrite_or_fall_back(gm, ours, members)
    # Dynamo calls a backend in the gradient mode in which the graph begins, and guards on it.
    if program.graph is not gm and codegen.runs_as_it_stands(program.graph, ours.codegen):
        if not torch.is_grad_enabled():
            reuse_buffers(program.graph)
        own_results(gm, program.graph)
    _trace(gm, program)
    inputs = [*example_inputs, *program.norm_values]

    def compile_piece(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return codegen.compile_graph(graph, inputs, ours, inductor, mode)

    split = bucket_splitter()
    compiled = compile_piece(program.graph, inputs) if split is None else split(program.graph, inputs, compile_piece)
    records = switches_gradients_on(program.graph)
    return with_prologue(compiled, program.norms, ours.norm_reuse, program.few_tokens, records=records)


@dataclass
class Program:
    """What a graph became: a norm prologue and a main graph.

    Attributes:
        graph: the main graph; its last inputs are the norms.
        norms: how the prologue computes each of them.
        checks: what the validation of each rewrite found.
        few_tokens: whether every composition serves few tokens, as in decoding (see :func:`dorafx.plan.serves_few_tokens`).
        log: the records of this graph alone.
    """

    graph: fx.GraphModule
    norms: tuple[HoistedNorm, ...] = ()
    few_tokens: bool = False
    checks: list[Check] = field(default_factory=list)
    log: RewriteLog = field(default_factory=RewriteLog)

    @property
    def norm_values(self) -> list[Any]:
        """Fake values of the norms, for a compiler."""
        return [norm.value for norm in self.norms]


def _refused(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options, members: tuple[str, ...]
) -> Program | None:
    """The program as it is, with a logged miss, where what it is given rules a rewrite out; None where nothing does."""
    if not any(map(zero3_parameter, example_inputs)):
        return None
    reason = (
        "DeepSpeed ZeRO-3 partitions these parameters, and gathers them by hooks that a norm taken before the graph would "
        "not pass; use FSDP2, or ZeRO-2"
    )
    if options.strict:
        raise RewriteMissError(f"dorafx.strict: {reason}")
    program = Program(gm)
    program.log.add(
        Record(status="missed", site=members[0], reason=reason, codegen=options.codegen, graph=next(_graph_ids))
    )
    rewrite_log().extend(program.log.records)
    return program


def rewrite_or_fall_back(gm: fx.GraphModule, options: Options, members: tuple[str, ...] = ("",)) -> Program:
    """The rewritten program; the original one where anything goes wrong, with a logged miss and one warning."""
    graph_id = next(_graph_ids)
    try:
        return _rewrite_program(gm, options, graph_id, members, rewrite_log(), prologue=True)
    except RewriteMissError:
        raise
    except Exception as error:
        if options.strict:
            raise
        program = Program(gm)
        log_failure(error, options, program.log, members[0], graph_id)
        rewrite_log().extend(program.log.records)
        return program


def _trace(gm: fx.GraphModule, program: Program) -> None:
    """Show what became of a graph to those who watch: ``TORCH_LOGS="+dorafx"``, and tlparse by way of ``TORCH_TRACE``."""
    if _logger.isEnabledFor(logging.DEBUG) and program.graph is not gm:
        _logger.debug("graph before\n%s", gm.print_readable(print_output=False))
        _logger.debug("graph after\n%s", program.graph.print_readable(print_output=False))
    _compat.trace_artifact("dorafx_rewrite_log", "json", program.log.to_json)
    if program.graph is not gm:
        _compat.trace_artifact(
            "dorafx_rewritten_graph", "string", lambda: program.graph.print_readable(print_output=False)
        )


def log_failure(error: Exception, options: Options, log: RewriteLog, site: str = "", graph_id: int = 0) -> None:
    """What every fallback says: a miss in the log with the last line of the traceback, and one warning for equal failures.

    Args:
        error: what was raised while a graph was rewritten.
        options: those of the graph.
        log: receives the miss.
        site: the module that the graph serves.
        graph_id: number of the graph in the log.
    """
    last = traceback.format_exception_only(type(error), error)[-1].strip()
    where = traceback.extract_tb(error.__traceback__)[-1]
    log.add(
        Record(
            status="missed",
            site=site,
            reason=f"internal failure, graph left as it was: {last} ({where.filename.rsplit('/', 1)[-1]}:{where.lineno})",
            codegen=options.codegen,
            graph=graph_id,
        )
    )
    if last not in _warned:
        _warned.add(last)
        warnings.warn(f"dorafx left a graph as it was: {last}", DorafxWarning, stacklevel=3)


def rewrite_graph_module(
    gm: fx.GraphModule,
    options: Options,
    graph_id: int = 0,
    members: tuple[str, ...] = ("",),
    log: RewriteLog | None = None,
    checks: list[Check] | None = None,
    is_parameter: Callable[[fx.Node], bool] | None = None,
) -> fx.GraphModule:
    """Lift, match, plan and rewrite one graph module and the graph modules inside it (bodies of higher-order operators).
    The norms stay in the graph: this is the form for graphs that others compile.

    Args:
        gm: the graph module; it is not changed.
        options: dorafx's options.
        graph_id: number of the graph in the log.
        members: names of the modules that this graph serves; the log has the records once for each.
        log: where the records go; the process's log by default.
        checks: with ``options.verify``, receives what the validation of each rewrite found.
        is_parameter: tells which inputs are parameters or buffers, where they do not say so themselves.

    Returns:
        A new graph module; ``gm`` itself where nothing is there to rewrite.

    Raises:
        RewriteMissError: ``options.strict`` and a candidate was not rewritten.
    """
    own = rewrite_log() if log is None else log
    program = _rewrite_program(gm, options, graph_id, members, own, False, is_parameter)
    if checks is not None:
        checks.extend(program.checks)
    return program.graph


def validate_graph_module(gm: fx.GraphModule, log: RewriteLog) -> list[Check]:
    """Rewrite a graph as the backend does, with its norm prologue, and say what the validation found. The result is thrown away.

    Args:
        gm: the graph module; it is not changed.
        log: where the records go.
    """
    return _rewrite_program(gm, Options(verify=True), 0, ("",), log, prologue=True).checks


def _rewrite_program(
    gm: fx.GraphModule,
    options: Options,
    graph_id: int,
    members: tuple[str, ...],
    log: RewriteLog,
    prologue: bool,
    is_parameter: Callable[[fx.Node], bool] | None = None,
) -> Program:
    transform = transform_around_products(gm)
    if transform is not None:
        return _under_transform(gm, options, graph_id, members, log, *transform)
    found = _Found(is_parameter)
    with _unseen_by_saved_tensors_hooks(), _garbage_kept():
        new = _rewrite(gm, options, graph_id, found)
        norms = hoist_norms(new) if prologue and new is not gm else ()
        if norms and options.verify:
            new, norms = _verified_prologue(gm, new, norms, options, graph_id, found, members[0])
    # Only now: a failure half-way leaves the whole graph as it was, bodies that were rewritten before it included.
    inside = norms_inside(new) if new is not gm else {}
    records = [_placed(r, inside) if r.rewritten else r for r in found.records]
    own = RewriteLog()
    own.extend((under(record, member) for member in members for record in records), found.drawings)
    log.extend(own.records, found.drawings)
    missed = [r for r in records if r.status == "missed"]
    if missed and options.strict:
        raise RewriteMissError(
            f"dorafx.strict: {len(missed)} candidates were not rewritten; the first is {missed[0].site or 'the graph'}: {missed[0].reason}"
        )
    return Program(new, norms, bool(found.few_tokens) and all(found.few_tokens), found.checks, own)


def _under_transform(
    gm: fx.GraphModule,
    options: Options,
    graph_id: int,
    members: tuple[str, ...],
    log: RewriteLog,
    transform: str,
    norms: bool,
) -> Program:
    """The graph as it is, with a logged miss where it might hold DoRA."""
    program = Program(gm)
    if not norms:
        return program
    reason = (
        f"the program is transformed ({transform} of torch.func or torch.autograd.forward_ad), and dorafx has no rule for what "
        "its operators are under a transform; the graph is left as it was"
    )
    if options.strict:
        raise RewriteMissError(f"dorafx.strict: {reason}")
    program.log.extend(
        Record(status="missed", site=member, reason=reason, codegen=options.codegen, graph=graph_id)
        for member in members
    )
    log.extend(program.log.records)
    return program


def _verified_prologue(
    gm: fx.GraphModule,
    new: fx.GraphModule,
    norms: tuple[HoistedNorm, ...],
    options: Options,
    graph_id: int,
    found: _Found,
    site: str,
) -> tuple[fx.GraphModule, tuple[HoistedNorm, ...]]:
    """The rewritten graph and its prologue; with all norms in the graph, and a logged miss, where repeated calls show that they
    may not leave it."""
    from dorafx.validation import check_prologue

    check = check_prologue(gm, new, norms, options.norm_reuse, bool(found.few_tokens) and all(found.few_tokens))
    found.checks.append(check)
    if check.passed:
        return new, norms
    again = _Found(found.is_parameter)
    new = _rewrite(gm, options, graph_id, again)  # what takes the norms out changes the graph
    found.records, found.few_tokens, found.drawings = again.records, again.few_tokens, again.drawings
    found.records.append(
        Record(
            status="missed",
            site=site,
            pattern="norm prologue",
            reason=f"the norms stay in the graph: {check.reason}",
            codegen=options.codegen,
            graph=graph_id,
        )
    )
    return new, ()


def _placed(record: Record, inside: dict[str, str]) -> Record:
    """The record with the place of its norm, and what keeps it in the graph where that is an operator."""
    if record.site not in inside:
        return replace(record, norm_placement="prologue")
    kept = inside[record.site]
    said = filter(None, (record.decision, kept and f"norm kept in the graph: {kept}"))
    return replace(record, norm_placement="graph", decision="; ".join(said))


@dataclass
class _Found:
    """What was met in a graph and its bodies."""

    is_parameter: Callable[[fx.Node], bool] | None = None
    records: list[Record] = field(default_factory=list)
    few_tokens: list[bool] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    drawings: dict[str, Drawing] = field(default_factory=dict)


def _rewrite(gm: fx.GraphModule, options: Options, graph_id: int, found: _Found) -> fx.GraphModule:
    """The recursion of :func:`rewrite_graph_module`; adds to ``found``."""
    nested = {
        name: child for name, child in gm.named_children() if isinstance(child, fx.GraphModule) and _is_body(gm, name)
    }
    replaced = {}
    modes = modes_of_bodies(gm.graph) if nested else {}
    for name, child in nested.items():
        with modes[name].entered() if name in modes else contextlib.nullcontext():
            new_child = _rewrite(child, options, graph_id, found)
        if new_child is not child:
            replaced[name] = new_child
    pure = functional_copy(gm)
    matches = match_graph(pure.graph, found.is_parameter)
    new, plan = gm, make_plan(matches, options, graph_id)
    copied: dict[fx.Node, fx.Node] = {}
    validation = None
    if options.verify and not plan.empty:
        # Who does not ask for it does not pay for its import either.
        from dorafx.validation import Validation

        validation = Validation(gm, found.checks)
    while not plan.empty:
        try:
            new, copied = apply_plan(pure, matches, plan)
        except CannotEmit as failed:
            # Leave out the one candidate that cannot be emitted and carry the rest out.
            refused = [(failed.site, str(failed))]
        else:
            refused = validation.failures(pure, matches, plan, new, copied) if validation is not None else []
        if not refused:
            break
        new, copied = gm, {}
        for site, reason in refused:
            matches.refuse(site, Reason(reason, site))
        plan = make_plan(matches, options, graph_id)
    _logger.debug("graph %d: %s", graph_id, plan)
    found.records.extend(_drawn(matches, plan, copied, found.drawings))
    found.few_tokens.extend(c.few_tokens for c in plan.compositions)
    return _with_bodies(new, gm, replaced) if replaced else new


def _drawn(
    matches: Matches, plan: RewritePlan, copied: dict[fx.Node, fx.Node], drawings: dict[str, Drawing]
) -> list[Record]:
    """The plan's records, each with the key of its drawing: one for all layers that differ in their number only."""
    replaced = {c.match.node for c in plan.compositions}
    replaced |= {site for norm in plan.norms.values() for site in norm.factors.info.sites}
    keys: dict[tuple[object, ...], str] = {}
    records = []
    for record, subject in zip(plan.records, plan.subjects):
        layer = fold_key(record)
        if layer not in keys:
            drawing = draw(subject, matches.lift, copied, replaced)
            keys[layer] = drawing.key
            drawings[drawing.key] = drawing
        records.append(replace(record, drawing=keys[layer]))
    return records


@contextlib.contextmanager
def _unseen_by_saved_tensors_hooks() -> Iterator[None]:
    """The shapes of new nodes are found by running operators on fake tensors, which autograd records. Dynamo may compile
    inside activation checkpointing, whose hooks count what is saved and would count these."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):  # hooks are forbidden here: then there are none to hide from
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        yield


@contextlib.contextmanager
def _garbage_kept() -> Iterator[None]:
    """Graphs are made of cycles and nothing of them dies while they are rewritten: a collector would walk all of them
    again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _is_body(gm: fx.GraphModule, name: str) -> bool:
    return any(node.op == "get_attr" and node.target == name for node in gm.graph.nodes)


def _with_bodies(new: fx.GraphModule, original: fx.GraphModule, bodies: dict[str, fx.GraphModule]) -> fx.GraphModule:
    if new is original:
        new, _ = copy_graph_module(original)
    for name, body in bodies.items():
        setattr(new, name, body)
    return new


def functional_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """``gm``, or a copy without the in-place arithmetic that nobody else can see."""
    if not has_writes(gm.graph):
        return gm
    copy, _ = copy_graph_module(gm)
    if not without_private_writes(copy.graph):
        return gm
    copy.graph.lint()
    copy.recompile()
    return copy


def under(record: Record, member: str) -> Record:
    """The record with its site below a member module."""
    return replace(record, site=".".join(p for p in (member, record.site) if p)) if member else record


rewrite_before_buckets(dorafx)
