"""The public functions: optimize, restore, explain, verify, rewrite, invalidate.

The backend is imported inside the functions that need it: its import installs the polyfills, and ``import dorafx`` alone
must not change how anything else is compiled.
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import fx

from dorafx import capture
from dorafx._compat.dynamo import (
    fresh_compile,
    graph_breaks,
    is_compiled,
    restore_compiled_call,
    whole_graphs,
)
from dorafx._compat.graphs import exported_program_with_graph
from dorafx.capture.in_place import OPTIMIZED, compile_in_place
from dorafx.errors import DorafxError
from dorafx.explanation import Explanation, graph_breaks_of
from dorafx.explanation_files import begin
from dorafx.log import ReasonKind, Record, RewriteLog, rewrite_log
from dorafx.options import Options
from dorafx.pipeline import log_failure, rewrite_graph
from dorafx.recording import SiteTerms
from dorafx.scope import Group, adapted_modules, adapter_layer, check_scope, groups_of, not_compiled, resolve_scope
from dorafx.selection import joined, settle
from dorafx.serving import remove_scales, scaled_adapters

if TYPE_CHECKING:
    from dorafx.validation import Check

M = TypeVar("M", bound=torch.nn.Module)
_numbers = itertools.count(1)


class _Undo(list[tuple[torch.nn.Module, Any]]):
    """What :func:`restore` puts back, and what ends the record of layers outside of graphs. Copied and pickled as an empty plain list: a
    copy of a model has no compiled calls to undo, and a pickle must load where dorafx is not installed."""

    end: Callable[[], None]
    by_callback = False
    """Whether a callback of a trainer did it, and not the user."""
    number = 0
    """The later one is undone first, where a model and a part of it were optimized."""

    def __reduce__(self) -> Any:
        return list, ()


def optimize(
    model: M,
    *,
    scope: str = "auto",
    codegen: str = "inductor",
    norm: str = "auto",
    compose: str = "auto",
    norm_reuse: str = "auto",
    zero_rows: str = "peft",
    verify: bool = False,
    strict: bool = False,
    skip: str | Sequence[str] = (),
    only: str | Sequence[str] = (),
    explain: str | os.PathLike[str] = "",
    dynamic: bool | None = None,
    mode: str | None = None,
) -> M:
    """Compile a model's DoRA layers in place, by themselves or with the blocks that they are in.

    Only the way the model is called changes; object, class, parameters, ``state_dict`` keys, hooks and training mode stay the same, so
    ``Trainer``, ``generate`` and ``save_pretrained`` keep working. Hooks that are registered later run too, as the module's code is
    recompiled. [`dorafx.restore`][] undoes it. With a static cache on a GPU ``generate`` compiles its decoding step itself, with Inductor
    unless ``compile_config=CompileConfig(backend="dorafx")`` is passed.

    Args:
        model: any ``nn.Module``.
        scope: which parts of the model are compiled. All work under gradient checkpointing and data-parallel wrappers.

            - ``"blocks"``: the blocks that a model repeats (decoder layers, transformer blocks), and adapter layers outside of them by
              themselves. Equal blocks share their graphs, so the compile time does not grow with depth. A block leaves its graph for
              ``generate``'s changing cache.
            - ``"modules"``: each adapter layer by itself. There is less to compile and nothing else of the model is touched, but each
              layer is a call.
            - ``"model"``: the whole forward as one graph. It costs the host least, and compile time grows with depth. ``generate`` of a
              PEFT model sees it too.
            - ``"auto"``: ``"blocks"`` where PEFT adapter layers are in repeated blocks of at most eight kinds, ``"modules"`` where they
              are elsewhere, else ``"model"``.
        codegen: what compiles the rewritten graph: ``"inductor"``, ``"eager"``, or another Dynamo backend. This and the following are the
            options of the page ``examples/guide/options.md``, which says more of each.
        norm: how the norms of the weight's rows are computed: ``"auto"``, ``"tiled"`` or ``"factored"``.
        compose: where the low-rank product is added to the base product: ``"auto"``, ``"accumulated"``, ``"epilogue"``, ``"triton"`` or
            ``"triton_linear"``.
        norm_reuse: when a norm of an earlier forward is used again: ``"auto"`` or ``"never"``.
        zero_rows: what a row with a norm of zero gives: ``"peft"`` (NaN or infinity) or ``"finite"`` (zero).
        verify: check every rewrite when its graph is compiled, and undo what differs.
        strict: raise where a DoRA layer is not rewritten or dorafx fails, instead of running it as it was.
        skip: patterns of the names of modules that are left as they are. An adapter layer that ``skip`` or ``only`` leaves alone is not
            compiled by itself, and a block whose adapter layers are all left alone is not compiled either. A pattern that matches no
            module of the model is a warning.
        only: patterns of the names of the only modules that are rewritten; empty for all.
        explain: a file that says what was compiled so far: ``.txt`` the table, ``.html`` the report, ``.json`` the log.
        dynamic: as for ``torch.compile``.
        mode: Inductor's mode, as for ``torch.compile``.

    Returns:
        The same ``model``.

    Raises:
        ValueError: an unknown scope or option value.
        TypeError: ``model`` is no ``nn.Module``.
        DorafxError: the model is optimized already, or has scales of [`dorafx.apply_scales`][].

    Examples:
        >>> dorafx.optimize(layer, codegen="eager") is layer
        True
        >>> layer(x).shape
        torch.Size([8, 96])
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"optimize takes an nn.Module, not {type(model).__name__}")
    if model.__dict__.get(OPTIMIZED):
        raise DorafxError("this model is optimized already; call dorafx.restore(model) first")
    if scaled_adapters(model):
        raise DorafxError("scales are applied to this model; call dorafx.restore(model) first")
    from dorafx.backend import dorafx as dorafx_backend

    # A wrong value fails here, not at the first forward.
    options = checked_options(
        scope,
        codegen=codegen,
        norm=norm,
        compose=compose,
        norm_reuse=norm_reuse,
        zero_rows=zero_rows,
        verify=verify,
        strict=strict,
        skip=skip,
        only=only,
        explain=explain,
    )
    parsed, _ = Options.split(options)
    options["dorafx.explain"] = parsed.explain
    selection = parsed.selection
    resolved = resolve_scope(model, scope, selection)
    if selection:
        settle(selection, {name for name, _ in model.named_modules(remove_duplicate=False)})
    capture.install()
    undo = _Undo()
    reference = weakref.ref(model)

    def compile_groups(groups: list[Group], undo: _Undo) -> None:
        for group in groups:
            backend = functools.partial(
                dorafx_backend, options=options, mode=mode, members=group.names, inner=group.inner, named=parameter_name
            )
            undo += compile_in_place([module for _, module in group.members], backend, dynamic, group.blocks)

    def parameter_name(parameter: Any) -> str:
        model = reference()
        named = () if model is None else model.named_parameters()
        return next((name for name, p in named if p is parameter), "")

    def compile_added() -> int:
        model = reference()
        undo = None if model is None else model.__dict__.get(OPTIMIZED)
        if model is None or not isinstance(undo, _Undo):
            return 0
        added = [(name, module) for name, module in adapted_modules(model) if not is_compiled(module)]
        groups = groups_of(model, "modules", added, selection)
        compile_groups(groups, undo)
        return sum(len(group.members) for group in groups)

    if parsed.explain:
        begin(parsed.explain)
    groups = groups_of(model, resolved, selection=selection)
    for site, why in not_compiled(model, resolved, groups, selection):
        rewrite_log().add(Record("missed", site, reason=why.text, kind=ReasonKind.SKIPPED.value, codegen=codegen))
    compile_groups(groups, undo)
    undo.number = next(_numbers)
    undo.end = capture.serve(model, strict, None if resolved == "model" else compile_added)
    model.__dict__[OPTIMIZED] = undo
    return model


def checked_options(scope: str, **options: Any) -> dict[str, Any]:
    """Options of :func:`optimize` as ``torch.compile`` takes them.

    Raises:
        ValueError: an unknown scope or option value.
    """
    check_scope(scope)
    named = {f"dorafx.{name}": value for name, value in options.items()}
    Options.split(named)
    return named


def restore(model: M) -> M:
    """Undo [`dorafx.optimize`][] and [`dorafx.apply_scales`][], of the model and of every part of it: every module is called as it was before. Any
    other model is left alone.

    Args:
        model: the model that was passed to either, or one that contains it. A part of it does not do: what was done to the whole stays.

    Returns:
        The same ``model``.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.

    Examples:
        >>> dorafx.restore(dorafx.optimize(layer)) is layer
        True
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"restore takes an nn.Module, not {type(model).__name__}")
    left = [module.__dict__.pop(OPTIMIZED) for module in model.modules() if OPTIMIZED in module.__dict__]
    # In a copy of an optimized model there are empty lists.
    for undo in sorted((u for u in left if isinstance(u, _Undo)), key=lambda u: u.number, reverse=True):
        undo.end()
        for module, previous in undo:
            restore_compiled_call(module, previous)
    remove_scales(model)
    return model


def invalidate(model: torch.nn.Module) -> int:
    """Remove all kept norms of a model's parameters and buffers from the store; the next forward computes them again.

    Not needed after changes through PyTorch, which are noticed (see ``dorafx.runtime.store``), only after other writes, such as those
    of a custom kernel through a raw pointer.

    Args:
        model: any ``nn.Module``.

    Returns:
        The number of norms that were removed.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.

    Examples:
        >>> dorafx.invalidate(layer)  # nothing was kept
        0
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"invalidate takes an nn.Module, not {type(model).__name__}")
    from dorafx.runtime import norm_store

    return norm_store().invalidate([*model.parameters(), *model.buffers()])


@dataclass
class VerifyReport:
    """The results of validating every rewrite of a model. ``str()`` is a table; true if all checks passed.

    Attributes:
        checks: one for each rewritten region, one for each whole graph and one for its norm prologue: ``site``, ``pattern``,
            ``error`` (largest difference of outputs and gradients in fp64, relative to the largest value) and ``reason``
            (what differs; empty if it passed).
        log: the records.
    """

    checks: list[Check]
    log: RewriteLog = field(default_factory=RewriteLog)

    @property
    def failures(self) -> list[Check]:
        """The checks that did not pass."""
        return [check for check in self.checks if not check.passed]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return not self.failures

    def __bool__(self) -> bool:
        return self.passed

    def __str__(self) -> str:
        lines = [
            f"{'ok    ' if c.passed else 'FAILED'}  {c.site or '(function)'}  {c.pattern}  {c.reason or f'{c.error:.1e}'}"
            for c in self.checks
        ]
        worst = max((c.error for c in self.checks), default=0.0)
        lines.append(f"{len(self.checks)} checks, {len(self.failures)} failed, largest difference {worst:.1e}")
        return "\n".join(lines)


def verify(model: Callable[..., Any], *args: Any, **kwargs: Any) -> VerifyReport:
    """Translation validation: trace one call of ``model`` and compare every region that dorafx would rewrite, and every whole
    graph, with its replacement. Compiles nothing; like [`dorafx.explain`][] otherwise.

    Outputs and gradients of a region are compared on random data in fp64. A graph is compared in everything that a caller can observe
    (values, gradients, which of them are None, strides, dtypes, shared memory, writes to inputs, random numbers), on several draws
    with zeros, ties, infinities and NaN among them, in fp64 and in its own dtypes; and by repeated calls with parameters
    and outputs written between them.

    Args:
        model: a module or function.
        *args: what to call it with.
        **kwargs: what to call it with, by name.

    Raises:
        TypeError: ``model`` cannot be called.

    Examples:
        >>> report = dorafx.verify(layer, x)
        >>> report.passed, report.checks[0].error < 1e-12
        (True, True)
    """
    from dorafx.validation import Check

    _check_callable("verify", model)
    capture.install()
    report = VerifyReport([])

    def collect(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        program = rewrite_graph(gm, Options(verify=True), prologue=True, log=report.log)
        report.checks.extend(program.checks)
        if program.error is not None:
            failure = report.log.records[-1].reason
            report.checks.append(Check("", "whole graph", math.inf, failure, ReasonKind.INTERNAL_FAILURE))
        return gm.forward

    with torch.random.fork_rng(), whole_graphs(), capture.explained(model, report.log):
        fresh_compile(model, collect)(*args, **kwargs)
    return report


def explain(model: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """A dry run: trace one call of ``model``, rewrite every graph without compiling it, and report the result.

    The call runs once, eagerly, on the original graphs; random number generators are restored afterwards; the process's
    rewrite log and an earlier ``optimize`` are not changed.

    Args:
        model: a module or function.
        *args: what to call it with.
        **kwargs: what to call it with, by name.

    Returns:
        The explanation; ``print()`` it, or call its ``print()`` method for colours in a terminal, and ``print(terms=True)`` for what
        each site computes, as a formula.

    Raises:
        TypeError: ``model`` cannot be called.

    Examples:
        >>> explanation = dorafx.explain(layer, x)
        >>> explanation.graph_count, explanation.graph_break_count, [r.pattern for r in explanation.rewrites], explanation.misses
        (1, 0, ['linear'], [])
        >>> print(explanation)
        1 graph, 0 graph breaks
        module      x  pattern  shape    rank  dtype    dense avoided  norm FLOPs   after  norm   codegen
        (function)  1  linear   96 x 64     4  float32         48 KiB      49.2 k  49.2 k  tiled  inductor
        total       1                                          48 KiB      49.2 k  49.2 k
        1 modules rewritten, 0 missed, 48 KiB of dense intermediates avoided a forward
    """
    from dorafx.rewriter import hoist_norms
    from dorafx.runtime import zero_rows

    _check_callable("explain", model)
    capture.install()
    log = RewriteLog()
    graphs = 0
    terms: list[SiteTerms] = []
    zeros: dict[str, int] = {}

    def collect(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        # Where the model's graph breaks, what it calls is compiled by itself.
        with capture.named_in_model(gm) as member:
            program = rewrite_graph(gm, Options(), graphs, (member,), log=log, terms=True)
        terms.extend(program.terms)
        if program.graph is gm:
            return gm.forward
        norms = hoist_norms(program.graph)

        def run(*inputs: Any) -> Any:
            # PEFT computes a norm in a module of its own inside of the layer.
            for site, count in zero_rows(norms, inputs).items():
                zeros[joined(member, adapter_layer(site))] = count
            return gm.forward(*inputs)

        return run

    with torch.random.fork_rng(), whole_graphs(), graph_breaks() as breaks, capture.explained(model, log):
        fresh_compile(model, collect)(*args, **kwargs)
    layers = [name for name, _ in adapted_modules(model)] if isinstance(model, torch.nn.Module) else []
    return Explanation(graphs, graph_breaks_of(breaks), log, terms, layers, zeros)


def _check_callable(name: str, model: Any) -> None:
    if not callable(model):
        raise TypeError(f"{name} takes an nn.Module or a function, not {type(model).__name__}")


def rewrite(program: Any, *example_inputs: Any, portable: bool = False, zero_rows: str = "peft") -> Any:
    """Rewrite a graph that was captured elsewhere.

    Args:
        program: an ``fx.GraphModule`` (from Dynamo, ``make_fx``, ``torch.export`` or ``fx.symbolic_trace``), or a
            ``torch.export.ExportedProgram``. It is not changed.
        example_inputs: inputs of the graph, needed if its nodes carry no shapes, as after ``fx.symbolic_trace``.
        portable: use no operator of dorafx's, so that the result runs where dorafx is not installed: norms are computed by aten
            operators over blocks of a tenth of the rows (a twentieth in half precision). Meant for inference: if gradients flow
            through a norm, autograd saves every block.
        zero_rows: what a row with a norm of zero gives: ``"peft"`` (NaN or infinity) or ``"finite"`` (zero).

    Returns:
        A new program of the same type; ``program`` itself if it contains no DoRA, its shapes are unknown, or dorafx fails. The log says
        which.

    Raises:
        TypeError: ``program`` is of another type.
        ValueError: the graph carries no shapes, and there are no example inputs to compute them with; an unknown ``zero_rows``.
        DorafxError: ``portable``, and the program holds an operator of dorafx's that could not be written out.

    Examples:
        >>> program = torch.export.export(layer, (x,))
        >>> type(dorafx.rewrite(program)).__name__
        'ExportedProgram'
    """
    from dorafx.graphs.shapes import UnknownShapes, carries_shapes, with_shapes
    from dorafx.rewriter.lowering import dorafx_operators, lower_to_aten, without_dorafx_operators

    if not isinstance(program, (torch.export.ExportedProgram, fx.GraphModule)):
        raise TypeError(
            f"rewrite takes a torch.fx.GraphModule or a torch.export.ExportedProgram, not {type(program).__name__}"
        )
    options, _ = Options.split({"dorafx.zero_rows": zero_rows})
    exported = isinstance(program, torch.export.ExportedProgram)
    graph_module: Any = program.graph_module if exported else program
    if not exported and not carries_shapes(graph_module):
        if not example_inputs:
            raise ValueError(
                "rewrite: the graph's nodes carry no shapes (fx.symbolic_trace leaves none): pass example inputs, as in "
                "dorafx.rewrite(graph_module, x)"
            )
        try:
            graph_module = with_shapes(graph_module, example_inputs)
        except UnknownShapes as unknown:
            rewrite_log().add(Record("missed", reason=str(unknown), kind=ReasonKind.UNKNOWN_SHAPES.value))
            return program
    log = RewriteLog()
    result: Any = program
    try:
        named = _parameters_of(program) if isinstance(program, torch.export.ExportedProgram) else None
        new = rewrite_graph(graph_module, options, is_parameter=named, log=log).graph
        if portable and dorafx_operators(new):
            new = without_dorafx_operators(new)
        if new is not graph_module:
            if exported:
                lower_to_aten(new)
            result = exported_program_with_graph(program, new) if exported else new
    except Exception as error:
        log_failure(error, Options(), rewrite_log())
    else:
        # Only now: if something failed, the log must not claim rewrites.
        rewrite_log().take_in(log)
    left = dorafx_operators(result.graph_module if exported else result) if portable else []
    if left:
        # A polyfill made it when the program was captured.
        raise DorafxError(f"rewrite: the program holds {', '.join(left)}, which could not be written out in aten")
    return result


def _parameters_of(program: torch.export.ExportedProgram) -> Callable[[fx.Node], bool]:
    """A predicate: whether an input of an exported graph is a parameter, buffer or constant, which only the signature shows."""
    signature = program.graph_signature
    names = {
        *signature.inputs_to_parameters,
        *signature.inputs_to_buffers,
        *signature.inputs_to_lifted_tensor_constants,
    }
    return lambda node: node.op == "get_attr" or node.target in names
