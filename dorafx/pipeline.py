"""The pipeline that rewrites a graph. Importing this module has no side effects; the outcome is in the program that is returned and in
the log that is passed in."""

from __future__ import annotations

import contextlib
import gc
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from dorafx._compat.transforms import transform_around_products
from dorafx.errors import DorafxWarning, RewriteMissError, in_a_line
from dorafx.graphs.contractions import has_tucker_products, with_tucker_products_in_steps
from dorafx.graphs.copying import copy_graph_module
from dorafx.graphs.filled import without_filled_zeros
from dorafx.graphs.functional import has_writes, without_private_writes
from dorafx.graphs.grad_mode import modes_of_bodies
from dorafx.log import Record, Reproduction, RewriteLog, rewrite_log
from dorafx.match import Matches, Reason, ReasonKind, match_graph
from dorafx.options import Options
from dorafx.plan import make_plan
from dorafx.recording import Recorder, SiteTerms, reproduction
from dorafx.rewriter import CannotEmit, HoistedNorm, ZeroRows, apply_plan, guard_zero_norms, hoist_norms, norms_inside

if TYPE_CHECKING:
    from dorafx.validation import Check, Validation

_logger = logging.getLogger(__name__)  # TORCH_LOGS="+dorafx"
_warned: set[str] = set()

STAGES = ("functional copy", "lift and match", "plan", "rewrite", "verify", "record", "hoist")
"""The stages in the order in which a graph passes them; the log has the seconds that each took."""


@dataclass
class Program:
    """What a graph became: a norm prologue and a main graph.

    Attributes:
        graph: the main graph, whose last inputs are the norms; the original graph where there was nothing to rewrite.
        norms: how the prologue computes each of them.
        few_tokens: whether every composition serves few tokens, as in decoding (see :func:`dorafx.plan.serves_few_tokens`).
        checks: what the validation of each rewrite found.
        log: the records of this graph alone.
        error: the exception that the rewriting raised, if any; ``graph`` is the original then.
        terms: of every site, if they were requested.
        failures: reasons that are failures of the lifter, including those where only the composition was left alone.
    """

    graph: fx.GraphModule
    norms: tuple[HoistedNorm, ...] = ()
    few_tokens: bool = False
    checks: list[Check] = field(default_factory=list)
    log: RewriteLog = field(default_factory=RewriteLog)
    error: Exception | None = None
    terms: list[SiteTerms] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    @property
    def norm_values(self) -> list[Any]:
        """Fake values of the norms, for a compiler."""
        return [norm.value for norm in self.norms]


def rewrite_graph(
    gm: fx.GraphModule,
    options: Options,
    graph_id: int = 0,
    members: tuple[str, ...] = ("",),
    *,
    prologue: bool = False,
    is_parameter: Callable[[fx.Node], bool] | None = None,
    log: RewriteLog | None = None,
    terms: bool = False,
) -> Program:
    """Rewrite one graph and the bodies of higher-order operators in it.

    Args:
        gm: the graph; it is not changed.
        options: dorafx's options.
        graph_id: number of the graph in the log.
        members: names of the modules that this graph serves; the log has the records once for each.
        prologue: whether norms leave the graph; without it they stay, as in graphs that others compile.
        is_parameter: whether an input is a parameter or buffer, for graphs whose nodes do not show it.
        log: receives the records too, besides the program's own log; the process's log by default.
        terms: whether to collect the terms of every site.

    Returns:
        The program. If anything goes wrong, it is the unchanged graph, with a logged miss and one warning.

    Raises:
        RewriteMissError: ``options.strict`` and a candidate was not rewritten.
        Exception: whatever goes wrong, if ``options.strict``.
    """
    recorder = Recorder(options, graph_id, members, terms)
    transform = transform_around_products(gm)
    try:
        if transform is None:
            program = _Pipeline(options, recorder, is_parameter).run(gm, prologue)
        else:
            program = _under_transform(gm, recorder, *transform)
    except Exception as error:
        if options.strict:
            raise
        program = Program(gm, error=error)
        log_failure(error, options, program.log, members[0], graph_id)
    _attach_script(program, gm, options)
    (rewrite_log() if log is None else log).take_in(program.log)
    _raise_if_strict(program, options)
    return program


def refuse(gm: fx.GraphModule, reason: Reason, options: Options, graph_id: int, site: str, log: RewriteLog) -> Program:
    """Leave a graph unchanged, with a miss in the log.

    Raises:
        RewriteMissError: ``options.strict``.
    """
    recorder = Recorder(options, graph_id, (site,))
    recorder.left_alone(reason)
    program = Program(gm, log=recorder.log({}))
    _attach_script(program, gm, options)
    log.take_in(program.log)
    _raise_if_strict(program, options)
    return program


def _attach_script(program: Program, gm: fx.GraphModule, options: Options) -> None:
    """Keep a script of the graph in the log of what became of it. That this fails must not be noticed by who compiles the graph."""
    if not program.log.records:
        return
    try:
        program.log.attach(reproduction(gm, options, program.log.records))
    except Exception as error:
        _logger.debug("no script of a graph", exc_info=True)
        program.log.attach(Reproduction.impossible(f"it could not be made: {in_a_line(error)[0]}"))


def _raise_if_strict(program: Program, options: Options) -> None:
    if options.strict and program.failures:
        raise RewriteMissError(f"dorafx.strict: {program.failures[0]}")
    missed = [r for r in program.log.misses if r.kind != ReasonKind.SKIPPED.value] if options.strict else []
    if missed:
        first = f"{missed[0].site or 'the graph'}: {missed[0].reason}"
        raise RewriteMissError(f"dorafx.strict: {len(missed)} candidates were not rewritten; the first is {first}")


def _under_transform(gm: fx.GraphModule, recorder: Recorder, transform: str, norms: bool) -> Program:
    """The unchanged graph, with a miss if it might contain DoRA."""
    if norms:
        recorder.left_alone(
            Reason(
                f"the program is transformed ({transform} of torch.func or torch.autograd.forward_ad), and dorafx has no rule for "
                "what its operators are under a transform; the graph is left as it was",
                kind=ReasonKind.TRANSFORMED,
            )
        )
    return Program(gm, log=recorder.log({}))


def log_failure(error: Exception, options: Options, log: RewriteLog, site: str = "", graph_id: int = 0) -> None:
    """Report a fallback: a miss in the log with the last line of the traceback, and one warning for equal failures.

    Args:
        error: what was raised while a graph was rewritten.
        options: those of the graph.
        log: receives the miss.
        site: the module that the graph serves.
        graph_id: number of the graph in the log.
    """
    last, where = in_a_line(error)
    recorder = Recorder(options, graph_id, (site,))
    what = f"internal failure, graph left as it was: {last} ({where})"
    recorder.left_alone(Reason(what, kind=ReasonKind.INTERNAL_FAILURE))
    log.extend(recorder.log({}).records)
    _warn_once(f"dorafx left a graph as it was: {last}")


def without_rewrites(program: Program, gm: fx.GraphModule, error: Exception) -> Program:
    """The program as it was, because what compiles it failed on the rewritten graph; with one warning for equal failures.

    Args:
        program: the rewritten one.
        gm: the graph that it was made of.
        error: what the compiler raised.
    """
    last, where = in_a_line(error)
    miss = {
        "status": "missed",
        "reason": f"{program.log.records[0].codegen} failed on the rewritten graph, the original is compiled instead: {last} ({where})",
        "kind": ReasonKind.CODEGEN_FAILED.value,
        "dense_bytes_avoided": 0,
        "flops_after": 0,
        "norm_algorithm": "",
        "norm_placement": "",
        "decision": "",
    }
    log = RewriteLog()
    records = (replace(record, **miss) if record.rewritten else record for record in program.log.records)
    log.extend(records, program.log.drawings, program.log.seconds, program.log.reproductions)
    _warn_once(
        f"dorafx has the original graph compiled, {program.log.records[0].codegen} failed on the rewritten one: {last}"
    )
    return Program(gm, checks=program.checks, log=log, error=error)


def note_failed_backward(records: Sequence[Record], error: Exception) -> None:
    """Report that the backward of a rewritten graph is not compiled: a note in the process's log, and one warning for equal failures.

    Args:
        records: of what was rewritten in the graph.
        error: what the compiler raised.
    """
    sites = sorted({record.site or "(function)" for record in records})
    last, where = in_a_line(error)
    what = f"{records[0].codegen} failed on the backward of a rewritten graph, which runs operator by operator: {last}"
    shown = ", ".join(sites[:8]) + (", …" if len(sites) > 8 else "")
    rewrite_log().add_note(f"graph {records[0].graph} ({shown}): {what} ({where})")
    _warn_once(f"{what}; with dorafx.strict it is raised")


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, DorafxWarning, stacklevel=4)


class _Pipeline:
    """Takes one graph and its bodies through the stages.

    Args:
        options: dorafx's options.
        recorder: collects the records for the log.
        is_parameter: see :func:`rewrite_graph`.
    """

    def __init__(
        self, options: Options, recorder: Recorder, is_parameter: Callable[[fx.Node], bool] | None = None
    ) -> None:
        self.options = options
        self.recorder = recorder
        self.is_parameter = is_parameter
        self.checks: list[Check] = []
        self.few_tokens: list[bool] = []
        self.failures: list[str] = []
        self.seconds = dict.fromkeys(STAGES, 0.0)

    def run(self, gm: fx.GraphModule, prologue: bool) -> Program:
        """All stages: those of the graph and of its bodies, then the hoisting of all their norms."""
        with _unseen_by_saved_tensors_hooks(), _without_garbage_collection():
            new = self._graph(gm)
            norms = self._hoisted(new) if prologue and new is not gm else ()
            if norms and self.options.verify:
                new, norms = self._verified(gm, new, norms)
            zero_rows: ZeroRows | None = None
            if self.options.zero_rows == "finite" and new is not gm:
                # After the verification, for which the difference, which is intended, would be one.
                with self._stage("rewrite"):
                    zero_rows = guard_zero_norms(new)
        log = self.recorder.log(norms_inside(new) if new is not gm else {}, self.seconds, zero_rows)
        return Program(
            new,
            norms,
            self._serves_few_tokens,
            self.checks,
            log,
            terms=self.recorder.terms or [],
            failures=self.failures,
        )

    def _graph(self, gm: fx.GraphModule, part: str = "") -> fx.GraphModule:
        """The stages of one graph; its bodies are rewritten first."""
        bodies = self._bodies(gm, part)
        with self._stage("functional copy"):
            pure = functional_copy(gm)
        with self._stage("lift and match"):
            matches = match_graph(pure.graph, self.is_parameter)
            if self.options.selection:
                matches.leave_out(partial(self.options.selection.excluded_of, self.recorder.members))
        new = self._rewritten(gm, pure, matches, part)
        return _with_bodies(new, gm, bodies) if bodies else new

    def _bodies(self, gm: fx.GraphModule, part: str) -> dict[str, fx.GraphModule]:
        """The rewritten bodies, by name; those that did not change are left out."""
        bodies = {n: b for n, b in gm.named_children() if isinstance(b, fx.GraphModule) and _is_body(gm, n)}
        modes = modes_of_bodies(gm.graph) if bodies else {}
        changed = {}
        for name, body in bodies.items():
            with modes[name].entered() if name in modes else contextlib.nullcontext():
                new = self._graph(body, f"{part}.{name}")
            if new is not body:
                changed[name] = new
        return changed

    def _rewritten(self, gm: fx.GraphModule, pure: fx.GraphModule, matches: Matches, part: str) -> fx.GraphModule:
        """Plan, rewrite, verify; repeated without each candidate that cannot be emitted or fails the verification."""
        validation: Validation | None = None
        while True:
            new = gm
            refused: list[Reason] = []
            copied: dict[fx.Node, fx.Node] = {}
            with self._stage("plan"):
                plan = make_plan(matches, self.options, part)
            if plan.empty:
                break
            if self.options.verify and validation is None:
                validation = self._validation(gm)
            try:
                with self._stage("rewrite"):
                    new, copied = apply_plan(pure, matches, plan)
            except CannotEmit as failed:
                refused = [failed.reason]
            if validation is not None and not refused:
                with self._stage("verify"):
                    refused = validation.failures(pure, matches, plan, new, copied)
            if not refused:
                break
            for reason in refused:
                matches.refuse(reason.node, reason)
        _logger.debug("%s", plan)
        with self._stage("record"):
            self.recorder.rewritten(matches, plan, copied)
        self.few_tokens.extend(c.few_tokens for c in plan.compositions)
        self.failures.extend(reason.text for reason in matches.failures)
        return new

    def _validation(self, gm: fx.GraphModule) -> Validation:
        # Imported here: only runs with verification pay for it.
        from dorafx.validation import Validation

        return Validation(gm, self.checks)

    def _hoisted(self, new: fx.GraphModule) -> tuple[HoistedNorm, ...]:
        with self._stage("hoist"):
            return hoist_norms(new)

    def _verified(
        self, gm: fx.GraphModule, new: fx.GraphModule, norms: tuple[HoistedNorm, ...]
    ) -> tuple[fx.GraphModule, tuple[HoistedNorm, ...]]:
        """The rewritten graph and its norms. If repeated calls show that they may not leave the graph, all norms stay in it, with a
        logged miss."""
        from dorafx.validation import check_prologue

        with self._stage("verify"):
            check = check_prologue(gm, new, norms, self.options.norm_reuse, self._serves_few_tokens)
        self.checks.append(check)
        if check.passed:
            return new, norms
        self.recorder.forget()
        again = _Pipeline(self.options, self.recorder, self.is_parameter)
        new = again._graph(gm)  # from the original: hoisting has changed the rewritten graph in place
        self.few_tokens = again.few_tokens
        assert check.kind is not None
        self.recorder.left_alone(
            Reason(f"the norms stay in the graph: {check.reason}", kind=check.kind), "norm prologue"
        )
        return new, ()

    @property
    def _serves_few_tokens(self) -> bool:
        return bool(self.few_tokens) and all(self.few_tokens)

    @contextlib.contextmanager
    def _stage(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start


def functional_copy(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``gm`` in which in-place arithmetic on private memory is out of place, zeros that are filled by rows are a concatenation,
    and a product of a core and two factors is two products; ``gm`` itself where there is none of these."""
    writes, tucker = has_writes(gm.graph), has_tucker_products(gm.graph)
    if not writes and not tucker:
        return gm
    copy, _ = copy_graph_module(gm)
    changed = writes and without_private_writes(copy.graph) | without_filled_zeros(copy.graph)
    changed |= tucker and with_tucker_products_in_steps(copy.graph)
    if not changed:
        return gm
    copy.graph.lint()
    copy.recompile()
    return copy


def _is_body(gm: fx.GraphModule, name: str) -> bool:
    return any(node.op == "get_attr" and node.target == name for node in gm.graph.nodes)


def _with_bodies(new: fx.GraphModule, original: fx.GraphModule, bodies: dict[str, fx.GraphModule]) -> fx.GraphModule:
    if new is original:
        new, _ = copy_graph_module(original)
    for name, body in bodies.items():
        setattr(new, name, body)
    return new


@contextlib.contextmanager
def _unseen_by_saved_tensors_hooks() -> Iterator[None]:
    """Hide from saved-tensors hooks what is recorded here: the shapes of new nodes come from running operators on fake tensors, which
    autograd records. Dynamo may compile inside activation checkpointing, whose hooks count saved tensors and would count these."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):  # raised where hooks are forbidden; then there are none
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        yield


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector: graphs consist of reference cycles that all live until the rewriting is done, and it would traverse
    them again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
