"""The prologue at run time: compute a graph's norms, or take them from the store, and call the graph with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import fx

from dorafx._compat.autograd import below_autocast, forward_mode, in_backward, saved_tensors_are_packed
from dorafx._compat.distributed import placements
from dorafx._compat.tensors import fake_mode_of
from dorafx.ops import dispatch
from dorafx.ops.autograd import refuse_forward_mode
from dorafx.ops.dispatch import being_captured
from dorafx.ops.norm import compute_dtype, row_squares
from dorafx.rewriter import HoistedNorm
from dorafx.rewriter.closures import TRANSPOSES, makes_memory

from .content import Contents, NormsByContent, span_of
from .on_device import NormsOnDevice, Source
from .sharded import local_operands, placed_norms
from .store import NormStore, norm_store
from .streams import Streams
from .together import Together
from .watch import parts
from .zero_magnitudes import ZeroMagnitudes

_row_norm = torch.ops.dorafx.row_norm.default
_row_norms = torch.ops.dorafx.row_norms.default


def with_prologue(
    compiled: Callable[..., Any],
    norms: Sequence[HoistedNorm],
    reuse: str,
    few_tokens: bool,
    store: NormStore | None = None,
    records: bool = False,
    zero_magnitudes: ZeroMagnitudes | None = None,
) -> Callable[..., Any]:
    """A callable of the original inputs. Call this in the gradient mode in which the graph will run.

    Args:
        compiled: the main graph, whose last inputs are the norms.
        norms: how each is computed.
        reuse: ``"never"``: compute every norm at every call. Anything else: reuse norms of the same contents, where these can be
            compared; norms of tensors that did not change in calls of few tokens that record no gradients, where computing a norm would
            cost more than all the rest, and when a checkpointed region is recomputed.
        few_tokens: whether the graph serves few tokens (decoding).
        store: where norms are kept; the process's by default.
        records: whether the graph records gradients even if the caller has disabled them.
        zero_magnitudes: is told which norms were not kept.
    """
    kept_in = norm_store() if store is None else store
    if not norms:
        if not (records or torch.is_grad_enabled()):
            return compiled

        def run_without_norms(*args: Any) -> Any:
            if records or torch.is_grad_enabled():
                kept_in.recorded(args)
            return compiled(*args)

        return run_without_norms
    prologue = [(i, norm.inputs, norm.scalars, norm.signature, _takes_apart(norm)) for i, norm in enumerate(norms)]
    recipes = [_recipe(norm) for norm in norms]
    placed = [placements(norm.value) for norm in norms]
    escaping = [i for i, norm in enumerate(norms) if norm.escapes]
    together, on_device = Together(kept_in), NormsOnDevice(few_tokens)
    inputs_of = _inputs([(inputs, scalars, apart) for _, inputs, scalars, _, apart in prologue])

    def computation_of(args: Sequence[Any], i: int) -> _Computation:
        _, inputs, scalars, _, _ = prologue[i]
        return _Computation(recipes[i], [args[k] for k in inputs], _numbers(args[k] for k in scalars), placed[i])

    def one_by_one(
        args: Sequence[Any], may_read: _Read, streams: Streams
    ) -> tuple[list[Any], list[_Missing], list[tuple[str, list[torch.Tensor]]]]:
        """The kept norms (None where there is none), the missing ones, and each norm's signature and tensors."""
        values: list[Any] = [None] * len(prologue)
        missing, sources = [], []
        for i, _, scalars, signature, takes_apart in prologue:
            computation = computation_of(args, i)
            if scalars:
                signature = f"{signature}{computation.numbers}"
            watched = parts(computation.tensors) if takes_apart else computation.tensors
            sources.append((signature, watched))
            norm = None
            if may_read != "none":
                norm = kept_in.kept(signature, watched, may_read == "recomputed", streams)
            if norm is None:
                missing.append(_Missing(i, computation, signature, watched))
            else:
                values[i] = norm
        return values, missing, sources

    def sources(args: Sequence[Any]) -> list[Source | None]:
        computations = [computation_of(args, i) for i in range(len(prologue))]
        return [
            _source(computation, parts(computation.tensors) if apart else computation.tensors)
            for computation, (*_, apart) in zip(computations, prologue)
        ]

    def run(*args: Any) -> Any:
        recording = records or torch.is_grad_enabled()
        if forward_mode():  # checked first, so that a decoding step does not walk over all of its inputs
            # The compiled graph has no forward-mode derivative; here the error can explain it.
            refuse_forward_mode("optimize", *(a for a in args if isinstance(a, torch.Tensor)))
        first = [args[k] for k in prologue[0][1]]
        compares = reuse != "never" and _on_device(first)
        # A CUDA graph repeats at every replay what it captures. So norms are computed here, unless kernels compare the contents: a kept
        # norm would be read from its present memory at every replay, even if the parameters changed. The result is in the graph's own
        # memory, so it is not kept either.
        captured = being_captured()
        may_read = _may_read(reuse, few_tokens, recording)
        streams = Streams()
        inputs = inputs_of(args) if may_read == "any" and (compares or not captured) else None
        taken = together.taken(*inputs) if inputs is not None else None
        entries = None if taken is None else taken.entries
        missing: list[_Missing] = []
        if taken is not None and not captured:
            values = taken.read(streams)
        else:
            values, missing, of_norms = one_by_one(args, "none" if captured else may_read, streams)
            if inputs is not None and not missing:
                together.remember(*inputs, of_norms)
                entries = kept_in.entries(of_norms)
        if recording:  # only now, since a recomputation has taken the norms that were kept for it
            kept_in.recorded(args)
        computed = 0
        keeps_for = "none" if captured else _keeps_for(reuse, recording)
        # Observed before the norms are computed, so that a write in between is noticed later.
        observed = [
            None if keeps_for == "none" else kept_in.observe(signature, watched, keeps_for == "recomputed")
            for _, _, signature, watched in missing
        ]
        compared: dict[int, torch.Tensor] = {}
        if compares and may_read != "recomputed":

            def compute(places: list[int]) -> list[torch.Tensor]:
                nonlocal computed
                computed += len(places)
                return _compute([computation_of(args, i) for i in places])

            compared = on_device.norms(first, lambda: sources(args), compute, entries, may_read == "any", captured)
            for i, norm in compared.items():
                values[i] = norm
        left = len(compared) - computed
        if missing:
            rest = [norm for norm in missing if norm.place not in compared]
            found, computed_now = _by_content(rest, None if captured or reuse == "never" else kept_in.by_content)
            computed += computed_now
            for norm_of_rest, norm in zip(rest, found):
                values[norm_of_rest.place] = norm
            if computed_now and zero_magnitudes is not None:
                zero_magnitudes.look(args, [norm.place for norm in rest])
            for (i, _, signature, watched), state in zip(missing, observed):
                if recording:
                    kept_in.drop(signature, watched)
                kept_in.keep(state, values[i], streams)
            if compared and may_read == "any" and not captured:
                on_device.keep(first, kept_in.entries(of_norms))
        if escaping:
            with torch.inference_mode(False), torch.no_grad():
                for i in escaping:
                    values[i] = values[i].clone()
        kept_in.counters.count(computed, len(prologue) - computed - left, left)
        return compiled(*args, *values)

    return run


_Read = Literal["none", "any", "recomputed"]
"""Which norms a call may take from the store: none, those that serve any forward, or those of the forward that is recomputed."""


def _may_read(reuse: str, few_tokens: bool, recording: bool) -> _Read:
    if reuse == "never":
        return "none"
    if recording and in_backward():
        return "recomputed"  # a forward that records gradients within a backward recomputes a checkpointed region
    return "any" if few_tokens and not recording else "none"


def _keeps_for(reuse: str, recording: bool) -> Literal["none", "any", "recomputed"]:
    """Which later calls may take the norms that this call computes: none, any, or the one that recomputes this forward."""
    if reuse == "never":
        return "none"
    if not recording:
        return "any"
    return "recomputed" if saved_tensors_are_packed() else "none"


def _inputs(
    norms: Sequence[tuple[Sequence[int], Sequence[int], bool]],
) -> Callable[[Sequence[Any]], tuple[list[torch.Tensor], list[float]]]:
    """A function that selects, from a graph's inputs, all tensors and all numbers from which norms are computed.

    Args:
        norms: for each norm the positions of its tensors and of its numbers, and whether its tensors are taken apart.
    """
    whole = {k: None for inputs, _, takes_apart in norms if not takes_apart for k in inputs}
    apart = {k: None for inputs, _, takes_apart in norms if takes_apart for k in inputs}
    scalars = {k: None for _, numbers, _ in norms for k in numbers}

    def inputs(args: Sequence[Any]) -> tuple[list[torch.Tensor], list[float]]:
        tensors = list(map(args.__getitem__, whole))
        if apart:
            tensors += parts(list(map(args.__getitem__, apart)))
        return tensors, _numbers(map(args.__getitem__, scalars))

    return inputs


def _numbers(values: Iterable[Any]) -> list[float]:
    return [value.item() if isinstance(value, torch.Tensor) else value for value in values]


def _takes_apart(norm: HoistedNorm) -> bool:
    """Whether the norm reads the inner tensors of a tensor subclass."""
    return any(node.target is getattr and node.args[1] not in TRANSPOSES for node in norm.graph.nodes)


@dataclass(frozen=True)
class _Recipe:
    """How a norm is computed: its operands from the graph's inputs, and the rest of the operator's arguments.

    Attributes:
        operands: computes weight ``[d_out, d_in]``, left ``[d_out, r]`` and right ``[r, d_in]`` from the inputs.
        scale, algorithm, factor_dtype: see :func:`dorafx.ops.norm.row_norm`.
        frozen: the position of the weight among the inputs, and whether it is transposed; None if the weight is computed.
        makes: whether some operand is neither an input nor a view of one.
        whole: computes the norm itself, if it is that of a quantised weight, whose operator has other operands.
    """

    operands: Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
    scale: float
    algorithm: str
    frozen: tuple[int, bool] | None
    makes: bool = False
    factor_dtype: torch.dtype | None = None
    whole: Callable[..., torch.Tensor] | None = None


class _Computation(NamedTuple):
    """A norm to compute.

    Attributes:
        recipe: how to compute it.
        tensors, numbers: its inputs.
        placements: the placements with which the graph reads it; None for a plain tensor.
    """

    recipe: _Recipe
    tensors: list[torch.Tensor]
    numbers: list[float]
    placements: tuple[Any, ...] | None


class _Missing(NamedTuple):
    """A norm that the store does not have.

    Attributes:
        place: its position among the graph's norms.
        computation: how it is computed.
        signature, watched: see :meth:`NormStore.kept`.
    """

    place: int
    computation: _Computation
    signature: str
    watched: list[torch.Tensor]


def _on_device(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether there are kernels that compare the contents of these."""
    return bool(tensors) and dispatch.serves(tensors[0].device) and fake_mode_of(tensors[0]) is None


def _source(computation: _Computation, tensors: list[torch.Tensor]) -> Source | None:
    """What kernels compare, and compute the norm from; None if it is not all in memory of the first tensor's device."""
    recipe = computation.recipe
    device = tensors[0].device
    if computation.placements or any(t.device != device or span_of(t) is None for t in tensors):
        return None
    operands = None
    if recipe.whole is None and not recipe.makes and recipe.algorithm in ("auto", "tiled"):
        operands = recipe.operands(*computation.tensors, *computation.numbers)
        if not dispatch.takes(*operands):
            operands = None
    return Source(tensors, computation.numbers, operands, recipe.scale, recipe.factor_dtype)


_RECIPES: dict[str, _Recipe] = {}


def _recipe(norm: HoistedNorm) -> _Recipe:
    """The norm's recipe. Equal layers share one, because generating code for each of a few hundred layers takes long."""
    if norm.signature not in _RECIPES:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(norm.graph, copies)
        assert isinstance(output, fx.Node)  # the norm's graph ends with the operator
        if output.target is not _row_norm:
            graph.output(output)
            whole = fx.GraphModule(torch.nn.Module(), graph).forward
            _RECIPES[norm.signature] = _Recipe(whole, 1.0, "", None, whole=whole)
            return _RECIPES[norm.signature]
        weight, left, right, scale, *options = output.args
        algorithm, factor_dtype = (options[0] if options else "auto"), (options[1] if len(options) > 1 else None)
        graph.output((weight, left, right))
        graph.erase_node(output)
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        frozen = None
        if weight in inputs:
            frozen = inputs.index(weight), False
        elif isinstance(weight, fx.Node) and weight.target == "t" and weight.args[0] in inputs:
            frozen = inputs.index(weight.args[0]), True
        makes = any(makes_memory(node) for node in graph.nodes)
        operands = fx.GraphModule(torch.nn.Module(), graph).forward
        _RECIPES[norm.signature] = _Recipe(operands, float(scale), str(algorithm), frozen, makes, factor_dtype)  # type: ignore[arg-type]
    return _RECIPES[norm.signature]


def _by_content(missing: Sequence[_Missing], kept: NormsByContent | None) -> tuple[list[torch.Tensor], int]:
    """Norms that are not kept for these tensors: those that are kept for their contents, and the others computed.

    Returns:
        The norms, and how many of them were computed.
    """
    if kept is None:
        return _compute([norm.computation for norm in missing]), len(missing)
    reading = Contents()
    contents = [None if n.computation.placements else reading.of(n.watched) for n in missing]
    places = [(n.signature, *map(id, n.watched)) for n in missing]
    norms: list[Any] = [
        None if content is None else kept.get(place, content) for place, content in zip(places, contents)
    ]
    rest = [k for k, norm in enumerate(norms) if norm is None]
    if not rest:
        return norms, 0
    for k, norm in zip(rest, _compute([missing[k].computation for k in rest], _Squares(kept, reading))):
        norms[k], content = norm, contents[k]
        if content is not None:
            kept.keep(places[k], content, norm)
    return norms, len(rest)


@dataclass(frozen=True)
class _Squares:
    """The squared row norms of frozen weights, which the factored algorithm starts from, by the contents of the weights."""

    kept: NormsByContent
    contents: Contents

    def of(self, recipe: _Recipe, inputs: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
        """The squares, kept or computed and kept; None if the weight is trained, or its content is not known."""
        if recipe.frozen is None or inputs[recipe.frozen[0]].requires_grad:
            return None
        position, transposed = recipe.frozen
        weight = inputs[position]
        content = self.contents.of([weight])
        if content is None:
            return None
        place = "squares", transposed, dtype, id(weight)
        squares = self.kept.get(place, content)
        if squares is None:
            squares = row_squares(weight.t() if transposed else weight, dtype)
            self.kept.keep(place, content, squares)
        return squares


def zero_rows(norms: Sequence[HoistedNorm], args: Sequence[Any]) -> dict[str, int]:
    """How many rows of each site's weight have a norm of zero, which the host waits for; sites without such rows are left out. Norms of
    tensors without data or that are sharded over devices are not computed.

    Args:
        norms: how each is computed.
        args: the inputs of the graph.
    """
    counts: dict[str, int] = {}
    for norm in norms:
        tensors = [args[k] for k in norm.inputs]
        if placements(norm.value) is not None or any(
            t.device.type == "meta" or fake_mode_of(t) is not None or placements(t) is not None for t in tensors
        ):
            continue
        computation = _Computation(_recipe(norm), tensors, _numbers(args[k] for k in norm.scalars), None)
        zeros = int((_compute([computation])[0] == 0).sum())
        if zeros:
            counts[norm.site] = max(zeros, counts.get(norm.site, 0))
    return counts


def _compute(norms: Sequence[_Computation], squares: _Squares | None = None) -> list[torch.Tensor]:
    """Compute norms, in one operator call for each algorithm; the operator launches those of equal shapes together. Norms whose
    operands are computed here, instead of being parameters, get a call each, so that only one layer's operands are in memory.

    Args:
        squares: those that are kept.
    """
    computed: list[Any] = [None] * len(norms)
    placed: list[Any] = [None] * len(norms)
    groups: dict[Any, list[int]] = {}
    # Without autocast: the rewriter has made sure that the recipes compute in the right dtypes.
    with torch.inference_mode(False), torch.no_grad(), below_autocast():
        for i, n in enumerate(norms):
            if n.recipe.whole is not None:
                computed[i] = n.recipe.whole(*n.tensors, *n.numbers)
            else:
                key = n.recipe.algorithm, n.recipe.factor_dtype, i if n.recipe.makes else None
                groups.setdefault(key, []).append(i)
        for (algorithm, factor_dtype, _), group in groups.items():
            local = [local_operands(*norms[i].recipe.operands(*norms[i].tensors, *norms[i].numbers)) for i in group]
            operands = [tensors for tensors, _ in local]
            kept = [
                squares.of(norms[i].recipe, norms[i].tensors, compute_dtype(*tensors))
                if squares is not None and algorithm == "factored"
                else None
                for i, tensors in zip(group, operands)
            ]
            scales = [norms[i].recipe.scale for i in group]
            results = _row_norms(*map(list, zip(*operands)), scales, algorithm, kept, factor_dtype)
            for i, result, (_, distribution) in zip(group, results, local):
                computed[i], placed[i] = result, distribution
    if not any(placed):
        return computed
    # In the mode of the graph that reads them: inference mode cannot detach a DTensor that was created outside of it.
    with torch.no_grad():
        return placed_norms(computed, placed, [n.placements for n in norms])
