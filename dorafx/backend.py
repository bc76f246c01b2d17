"""The Dynamo backend: what ``torch.compile(backend="dorafx")`` calls. The only module whose import has side effects."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx

from dorafx import capture, codegen
from dorafx._compat.distributed import bucket_splitter, rewrite_before_buckets, zero3_parameter
from dorafx._compat.dynamo import (
    allow_variants,
    restarts_tracing,
    through_dynamo,
    trace_artifact,
)
from dorafx._compat.hooks import guard_on_hooks
from dorafx.explanation_files import add_graph
from dorafx.graphs.grad_mode import switches_gradients_on
from dorafx.graphs.provenance import frame_path, site_of
from dorafx.log import RewriteLog, rewrite_log
from dorafx.match import Reason, ReasonKind
from dorafx.options import Options
from dorafx.pipeline import Program, note_failed_backward, refuse, rewrite_graph, without_rewrites
from dorafx.rewriter import replace_view_results, reuse_buffers
from dorafx.runtime import ZeroMagnitudes, with_prologue
from dorafx.selection import joined, settle_by_graph
from dorafx.self_check import announce_untested_versions

_logger = logging.getLogger(__name__)  # TORCH_LOGS="+dorafx"
_graph_ids = itertools.count(1)

_ZERO3 = Reason(
    "DeepSpeed ZeRO-3 partitions these parameters, and gathers them by hooks that a norm taken before the graph would "
    "not pass; use FSDP2, or ZeRO-2",
    kind=ReasonKind.ZERO3,
)

# Polyfills must be installed before Dynamo traces. torch.compile imports this module (by the entry point) when it looks the
# backend up, which is before tracing; no later moment is early enough.
capture.install()


def dorafx(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | None = None,
    mode: str | None = None,
    members: tuple[str, ...] = ("",),
    inner: frozenset[str] = frozenset(),
    named: Callable[[Any], str] | None = None,
) -> Callable[..., Any]:
    """``torch.compile(model, backend="dorafx", mode=…, options={…})``.

    Args:
        gm: the graph that Dynamo captured. It is not changed.
        example_inputs: its inputs, as Dynamo gives them.
        options: ``dorafx.*`` keys are dorafx's own (see :class:`dorafx.options.Options`), the rest go to Inductor.
        mode: Inductor's mode.
        members: where the graph is that of a part of a model: the names of the modules that it serves.
        inner: the names of the modules inside of each, where the graph may be that of one of these.
        named: the name of a parameter in the model of which this is a part; empty for others.

    Returns:
        The compiled callable.

    Raises:
        ValueError: an unknown or wrong ``dorafx.*`` option.
        RewriteMissError: ``dorafx.strict`` and a candidate was not rewritten.
    """
    try:
        parsed, inductor = Options.split(options)
        codegen.check_name(parsed.codegen)
    except ValueError as error:
        raise through_dynamo(error) from None
    capture.install()
    guard_on_hooks()
    announce_untested_versions()
    if members == ("",):  # it is the user's own function that is compiled, of which this is the only sight
        capture.serve_compiled()
        with capture.named_in_model(gm) as name:
            served: tuple[str, ...] = (name,)
            program, compiled = _compiled(gm, example_inputs, parsed, inductor, mode, served)
    else:
        path = frame_path(gm.graph, inner) if inner else ""
        served = tuple(f"{member}.{path}" for member in members) if path else members
        program, compiled = _compiled(gm, example_inputs, parsed, inductor, mode, served)
    if program.graph is not gm:
        allow_variants()
    records = switches_gradients_on(program.graph)
    zeros = ZeroMagnitudes(program.norms, served, named)
    return with_prologue(compiled, program.norms, parsed.norm_reuse, program.few_tokens, None, records, zeros)


def _compiled(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options,
    inductor: dict[str, Any],
    mode: str | None,
    members: tuple[str, ...],
) -> tuple[Program, Callable[..., Any]]:
    """The rewritten program and what the codegen makes of it; the original, and a miss, where the codegen fails on the rewritten one.
    What is logged is what runs."""
    log = RewriteLog()
    restarted = False
    try:
        graph_id = next(_graph_ids)
        if any(map(zero3_parameter, example_inputs)):
            program = refuse(gm, _ZERO3, options, graph_id, members[0], log)
        else:
            program = rewrite_graph(gm, options, graph_id, members, prologue=True, log=log)
        _trace(gm, program)

        try:
            compiled = _code(gm, program, example_inputs, options, inductor, mode)
        except Exception as error:
            if restarts_tracing(error):
                log.clear()  # the graph comes again
                restarted = True
                raise
            if program.graph is gm or options.strict:
                raise
            original = without_rewrites(program, gm, error)
            compiled = _code(gm, original, example_inputs, options, inductor, mode)
            program, log = original, original.log
    finally:
        rewrite_log().take_in(log)
        if options.explain and not restarted:
            add_graph(options.explain, gm, log)
    if options.selection and program.log.records:
        settle_by_graph(options.selection, _modules_of(gm, members))
    trace_artifact("dorafx_rewrite_log", "json", program.log.to_json)
    return program, compiled


def _code(
    gm: fx.GraphModule,
    program: Program,
    example_inputs: Sequence[Any],
    options: Options,
    inductor: dict[str, Any],
    mode: str | None,
) -> Callable[..., Any]:
    rewrites = program.log.rewrites
    way_back = partial(note_failed_backward, rewrites) if rewrites and not options.strict else None

    def compile_piece(graph: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return codegen.compile_graph(graph, inputs, options, inductor, mode, way_back)

    # Dynamo calls a backend in the gradient mode in which the graph begins, and guards on it.
    if program.graph is not gm and codegen.runs_as_it_stands(program.graph, options.codegen):
        if not torch.is_grad_enabled():
            reuse_buffers(program.graph)
        replace_view_results(gm, program.graph)
    inputs = [*example_inputs, *program.norm_values]
    split = bucket_splitter()
    return compile_piece(program.graph, inputs) if split is None else split(program.graph, inputs, compile_piece)


def _modules_of(gm: fx.GraphModule, members: tuple[str, ...]) -> set[str]:
    """The names of the modules in which the graph was traced."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    sites = {site_of(node) for graph in graphs for node in graph.nodes}
    return {joined(member, site) for member in members for site in sites}


def _trace(gm: fx.GraphModule, program: Program) -> None:
    """Show the graph before and after to ``TORCH_LOGS="+dorafx"`` and, by way of ``TORCH_TRACE``, to tlparse."""
    if _logger.isEnabledFor(logging.DEBUG) and program.graph is not gm:
        _logger.debug("graph before\n%s", gm.print_readable(print_output=False))
        _logger.debug("graph after\n%s", program.graph.print_readable(print_output=False))
    if program.graph is not gm:
        trace_artifact("dorafx_rewritten_graph", "string", lambda: program.graph.print_readable(print_output=False))


rewrite_before_buckets(dorafx)
