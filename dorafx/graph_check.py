"""Translation validation of whole graphs: run the captured original and its replacement, and compare everything observable.

A region shows which rewrite is wrong; only the whole graph shows effects on writes, aliases, layouts, random numbers and dead
terms. Both sides run on several draws of the inputs, with three readings of their dtypes:

- *exact*: every floating tensor and every cast is fp64, so that any difference is one of the programs, not of rounding;
- *rounded*: fp64, but casts round to their dtype, so that a missing cast shows;
- *native*: in the program's own dtypes, so that arithmetic in too low a precision shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import fx

from dorafx._compat.autograd import below_autocast
from dorafx._compat.distributed import placements
from dorafx._compat.operators import body_operands_start, takes_operands_for_body
from dorafx._compat.tensors import flattened, is_wrapper, size_hint, storage_id
from dorafx.graphs.inputs import is_leaf
from dorafx.graphs.operators import canonical_name
from dorafx.graphs.tensors import tensor_of
from dorafx.graphs.writes import written_arguments
from dorafx.lift.values import FLOAT_DTYPES
from dorafx.observation import Comparison, Observation, compare, default_dtype, observe, random_values
from dorafx.rewriter.hoist import DENSE

_CASTS = {
    "double": torch.float64,
    "float": torch.float32,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_DRAWS = ("random values", "zeros", "ties", "an infinity", "a NaN")
_FINITE_DRAWS = 3

TOLERANCE = 1e-9
"""Largest difference of values, relative to the largest. fp64 rounds at 1e-16; a norm of a hundred million elements in another
order of summation stays below 1e-12."""

_LOW_TOLERANCE = 1e-2
"""The same for a program that runs in its own dtypes only, whose rounding errors are unknown."""


@dataclass(frozen=True)
class Run:
    """One way to run both sides.

    Attributes:
        draw: which values the inputs have, an index of the draws.
        reading: ``"exact"``, ``"rounded"`` or ``"native"``.
        mode: of gradients: ``"grad"``, ``"no_grad"`` or ``"inference"``.
    """

    draw: int
    reading: str
    mode: str

    def __str__(self) -> str:
        reading = {"exact": "in fp64", "rounded": "in fp64 with the program's own casts", "native": "in its own dtypes"}
        mode = {"grad": "", "no_grad": ", under no_grad", "inference": ", under inference_mode"}
        return f"on {_DRAWS[self.draw]} {reading[self.reading]}{mode[self.mode]}"


class GraphCheck:
    """Compares a graph with replacements of it. The graph is not changed, and is observed once for each run.

    Args:
        gm: the captured original. It is run in the grad mode that is active now, in which a Dynamo graph begins, and without
            gradients too.
        given: the values of inputs by name, in place of the first draw's.
    """

    def __init__(self, gm: fx.GraphModule, given: Mapping[str, torch.Tensor] | None = None) -> None:
        self.gm = gm
        self._given = given or {}
        current = "inference" if torch.is_inference_mode_enabled() else "grad" if torch.is_grad_enabled() else "no_grad"
        modes = (current, "no_grad") if current == "grad" else (current,)
        self.runs = [Run(draw, "exact", current) for draw in range(len(_DRAWS))]
        self.runs += [Run(0, "exact", mode) for mode in modes[1:]]
        self.runs.append(Run(0, "native", current))
        # With inputs in low precision, a missing cast cannot be distinguished from other rounding.
        if not _low_precision(gm):
            self.runs.append(Run(0, "rounded", current))
        self._originals: dict[Run, Observation] = {}
        self._leaves: list[fx.Node] | None = None
        self._dense: tuple[str, ...] = ()

    def compare(self, new: fx.GraphModule, runs: list[Run] | None = None) -> tuple[Comparison, Run | None]:
        """Compare a replacement with the original, until something differs.

        Args:
            new: a graph of the same inputs; norms of quantised weights in it are those of random weights.
            runs: some of :attr:`runs`; all of them by default.

        Returns:
            What differs, and in which run; None where nothing does.

        Raises:
            RuntimeError: the original cannot be run on random values; the message says why.
        """
        dense = tuple(sorted({node.meta[DENSE] for node in new.graph.nodes if DENSE in node.meta}))
        if dense != self._dense:
            self._originals.clear()
            self._dense = dense
        error = 0.0
        done: list[Run] = []
        failure = ""
        for run in self.runs if runs is None else runs:
            if dense and (run.mode != self.runs[0].mode or run.reading == "native"):
                continue  # a library may multiply by the codes, which do not belong to the random weight
            expected = self._original(run)
            if expected.raised:
                # The program may reject the values of this draw, or an operator may not support fp64.
                failure = f"{expected.raised}: {expected.message}"
                continue
            actual = self._observe(new, run)
            exact = self._original(Run(run.draw, "exact", run.mode)) if run.reading == "native" else None
            dtypes = self._original(Run(run.draw, "native", run.mode)) if run.reading == "rounded" else None
            tolerance = TOLERANCE if exact is None or not exact.raised else _LOW_TOLERANCE
            finite = run.draw < _FINITE_DRAWS
            comparison = compare(expected, actual, tolerance, _whole(exact), _whole(dtypes), finite)
            if comparison.differences:
                wide = run if exact is None else Run(run.draw, "exact", run.mode)
                noise = _whole(self._observe(self.gm, wide, perturbed=True))
                comparison = compare(expected, actual, tolerance, _whole(exact), _whole(dtypes), finite, noise)
            done.append(run)
            if comparison.differences:
                return comparison, run
            if run.reading == "exact":
                error = max(error, comparison.error)
        if not any(run.draw == 0 for run in done) and runs is None:
            raise RuntimeError(failure or "there is nothing to run")
        return Comparison((), error), None

    # -- running ------------------------------------------------------------------------------------------------------

    def observed(self, gm: fx.GraphModule, run: Run) -> Observation:
        """One run of the original or of a replacement."""
        return self._original(run) if gm is self.gm else self._observe(gm, run)

    def _original(self, run: Run) -> Observation:
        if run not in self._originals:
            self._originals[run] = self._observe(self.gm, run)
        return self._originals[run]

    def _observe(self, gm: fx.GraphModule, run: Run, perturbed: bool = False) -> Observation:
        with torch.inference_mode(False), torch.no_grad():
            values = self._values(run)
            if perturbed:
                generator = torch.Generator().manual_seed(-1)
                for value in (value for _, value in values if _is_floating(value)):
                    _perturb(value, generator, _bounds(self.gm))
        names = [name for name, _ in values]
        program = _Runner(gm, run.reading, names, self._dense)
        with default_dtype(torch.float64 if run.reading != "native" else torch.get_default_dtype()):
            return observe(program, [value for _, value in values], grad_mode=run.mode, seed=1, names=names)

    def _values(self, run: Run) -> list[tuple[str, Any]]:
        """Name and value of every input, of the tensors that the graph holds, and of dequantised weights."""
        generator = torch.Generator().manual_seed(run.draw)
        draw = _Draw(_DRAWS[run.draw], generator, _bounds(self.gm), _factor_width(self.gm))
        values: dict[str, Any] = {}
        storages: dict[int, torch.Tensor] = {}
        written = {n for node in self.gm.graph.nodes for n in node.all_input_nodes if _writes(node)}
        for node in self.gm.graph.nodes:
            name = node.name if node.op == "placeholder" or node.name in self._dense else f"self.{node.target}"
            traced: Any = node.meta.get("example_value", node.meta.get("val"))
            if node.op == "get_attr":
                traced = attrgetter(str(node.target))(self.gm)
                if not isinstance(traced, torch.Tensor):
                    continue
            elif node.op != "placeholder" and node.name not in self._dense:
                continue
            if name in values:
                continue
            if not isinstance(traced, torch.Tensor):
                values[name] = size_hint(traced)
                continue
            # If it requires grad only as the result of an in-place write, it did not before that write.
            recorded = traced.requires_grad and (traced.is_leaf or node not in written)
            drawn = draw(traced)
            if run.draw == 0 and name in self._given:
                drawn = self._given[name].detach().clone()
            values[name] = _placed(drawn, traced, run.reading, storages, recorded)
        return list(values.items())


def _whole(observation: Observation | None) -> Observation | None:
    return None if observation is None or observation.raised else observation


def _writes(node: fx.Node) -> bool:
    return any(True for _ in written_arguments(node))


def crosses_dtensors(gm: fx.GraphModule) -> bool:
    """Whether a graph or one of its bodies converts between plain tensors and DTensors, or calls a method that only DTensors have:
    there a plain random tensor cannot stand for a DTensor."""
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        result = tensor_of(node)
        sharded = [placements(tensor_of(n)) is not None for n in node.all_input_nodes if tensor_of(n) is not None]
        if result is not None and (placements(result) is not None) != any(sharded):
            return True
        if any(sharded) and node.op == "call_method" and not hasattr(torch.Tensor, str(node.target)):
            return True
    return any(crosses_dtensors(child) for child in gm.children() if isinstance(child, fx.GraphModule))


# -- the prologue -----------------------------------------------------------------------------------------------------


def compare_calls(gm: fx.GraphModule, call: Callable[..., Any]) -> tuple[str, float]:
    """Call a rewritten program repeatedly, as a training or decoding loop does, and compare every call with the original. Between the
    calls the outputs are overwritten, parameters are written with and without a change of their version counters, and square
    parameters are transposed in place.

    Args:
        gm: the original graph, whose inputs ``call`` takes.
        call: the program with its norm prologue, over a store of norms of its own.

    Returns:
        The first difference (empty if there is none), and the largest error in the program's own dtypes.

    Raises:
        RuntimeError: the original cannot be run on random values; the message says why.
    """
    check = GraphCheck(gm)
    mode = check.runs[0].mode
    placeholders = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    with torch.inference_mode(False), torch.no_grad():
        values = [value for name, value in check._values(Run(0, "native", mode)) if name in placeholders]
    tensors = {name: value for name, value in zip(placeholders, values) if isinstance(value, torch.Tensor)}

    def original(reading: str, inputs: list[Any]) -> Observation:
        with default_dtype(torch.get_default_dtype() if reading == "native" else torch.float64):
            return observe(_Runner(gm, reading, placeholders, ()), inputs, grad_mode=mode, seed=1, names=placeholders)

    worst = 0.0
    for how, write in _BETWEEN_CALLS.items():
        with torch.no_grad():
            for tensor in tensors.values():
                if tensor.is_floating_point():
                    write(tensor)
        results: list[Any] = []

        def recorded_call(results: list[Any] = results) -> Any:
            results.append(call(*values))
            return results[-1]

        expected = original("native", values)
        if expected.raised:
            raise RuntimeError(f"{expected.raised}: {expected.message}")
        with default_dtype(torch.float64), torch.no_grad():
            wide = [v.detach().double().requires_grad_(v.requires_grad) if _is_floating(v) else v for v in values]
        exact = original("exact", wide)
        actual = observe(recorded_call, (), tensors, grad_mode=mode, seed=1)
        tolerance = TOLERANCE if not exact.raised else _LOW_TOLERANCE
        comparison = compare(expected, actual, tolerance, _whole(exact))
        if comparison.differences:
            with torch.no_grad():
                for value in filter(_is_floating, wide):
                    _perturb(value, torch.Generator().manual_seed(2), _bounds(gm))
            comparison = compare(expected, actual, tolerance, _whole(exact), noise=_whole(original("exact", wide)))
        worst = max(worst, comparison.error)
        if comparison.differences:
            return f"{how}: {comparison.differences[0]}", comparison.error
        with torch.no_grad():
            for i, output in enumerate(flattened(results[0])[0]):
                shared = [name for pair in actual.aliases if f"output {i}" in pair for name in pair]
                if _is_floating(output) and not any(name in tensors for name in shared):
                    output.detach().mul_(2.0)
    return "", worst


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to(
        torch.promote_types(tensor.dtype, torch.float32) if tensor.dtype.itemsize > 1 else torch.float32
    )


def _transposed(tensor: torch.Tensor) -> None:
    if tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]:
        tensor.data = tensor.data.t()


_BETWEEN_CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "at the first call": lambda t: None,
    "at the second call, with the first's outputs written": lambda t: None,
    # By way of fp32 or fp64: float8 has no arithmetic.
    "after parameters were written": lambda t: t.copy_(_wide(t) * 1.5),
    "after parameters were written through .data": lambda t: t.data.copy_(_wide(t) * 0.5),
    "after square parameters were transposed": _transposed,
}


# -- values -----------------------------------------------------------------------------------------------------------


def _bounds(gm: fx.GraphModule) -> list[float]:
    """Numbers that a norm may be equal to: bounds of clamps, and one."""
    bounds = {1.0}
    for node in gm.graph.nodes:
        if canonical_name(node) in ("clamp", "clamp_min", "maximum"):
            bounds |= {float(a) for a in (*node.args[1:], *node.kwargs.values()) if isinstance(a, (int, float))}
    return sorted(bounds)


def _low_precision(gm: fx.GraphModule) -> bool:
    tensors = [tensor_of(node) for node in gm.graph.nodes if is_leaf(node)]
    return any(
        t is not None and t.dtype in FLOAT_DTYPES and torch.finfo(t.dtype).eps > torch.finfo(torch.float32).eps
        for t in tensors
    )


def _factor_width(gm: fx.GraphModule) -> float:
    """The bound on the shorter side of matrices that count as the factors of a low-rank delta."""
    sides = [
        min(int(size_hint(size)) for size in tensor.shape)
        for node in gm.graph.nodes
        if is_leaf(node) and (tensor := tensor_of(node)) is not None and tensor.dim() >= 2
    ]
    return math.sqrt(max(min(sides), 1) * max(sides)) if sides else 0.0


class _Draw:
    """Random values of one kind, in fp64."""

    def __init__(self, kind: str, generator: torch.Generator, bounds: list[float], width: float) -> None:
        self.width = width
        self.kind = kind
        self.generator = generator
        self.bounds = bounds

    def __call__(self, traced: torch.Tensor) -> torch.Tensor:
        shape = [int(size_hint(size)) for size in traced.shape]
        if traced.dtype not in FLOAT_DTYPES:
            value = torch.ones(shape, dtype=traced.dtype)
            if value.dim() >= 2 and traced.dtype in (torch.int32, torch.int64):
                value[..., 1::2] = 0  # with equal tokens, attention has no gradients
            return value
        value = random_values(shape, self.generator)
        if not value.numel():
            return value
        # Scaled as at initialisation: values neither grow with depth nor saturate a softmax.
        value = value / math.sqrt(math.prod(shape[1:]))
        if self.kind == "zeros":
            if value.dim() < 2:
                value.view(-1)[self._index(value.numel())] = 0.0
            elif self._left_factor(shape):
                value.zero_()
            else:
                value[self._index(len(value))] = 0.0
        elif self.kind == "ties" and value.dim() >= 2:
            if self._left_factor(shape):
                value.zero_()
            elif min(shape) >= self.width:
                rows = value.flatten(1)
                bound = self.bounds[self._index(len(self.bounds))]
                rows.zero_()
                rows[torch.arange(len(rows)), torch.arange(len(rows)) % rows.shape[1]] = bound
                value = rows.view(shape)
        elif self.kind == "ties":
            value = value.sign()
        elif self.kind in ("an infinity", "a NaN") and value.dim() != 2 and self._heads():
            value.view(-1)[self._index(value.numel())] = math.inf if self.kind == "an infinity" else math.nan
        return value

    def _left_factor(self, shape: list[int]) -> bool:
        """Whether a matrix of this shape may be the factor that is initialised to zeros."""
        return min(shape) < self.width and shape[0] >= shape[-1]

    def _heads(self) -> bool:
        return bool(torch.rand((), generator=self.generator) < 0.5)

    def _index(self, size: int) -> int:
        return int(torch.randint(size, (), generator=self.generator))


def _perturb(value: torch.Tensor, generator: torch.Generator, bounds: list[float]) -> None:
    """Change a tensor's elements by about one rounding error each, except those that are zero or equal to a bound."""
    if any(not stride for size, stride in zip(value.shape, value.stride()) if size > 1):
        return  # expanded: each element of its memory would be changed several times
    noise = torch.randn(value.shape, dtype=torch.float64, generator=generator).to(value.device, value.dtype)
    fixed = value.detach() == 0
    for bound in bounds:
        fixed |= value.detach().abs() == bound
    value.detach().mul_(torch.where(fixed, 1.0, 1.0 + torch.finfo(value.dtype).eps * noise))


def _placed(
    value: torch.Tensor, traced: torch.Tensor, reading: str, storages: dict[int, torch.Tensor], recorded: bool
) -> torch.Tensor:
    """The value with the layout, the shared memory and the requires_grad of what was traced."""
    dtype = traced.dtype if reading == "native" or traced.dtype not in FLOAT_DTYPES else torch.float64
    if reading == "rounded" and traced.dtype in FLOAT_DTYPES:
        value = value.to(traced.dtype).to(torch.float64)
    device = traced.device
    value = value.to(device, dtype)
    if traced.layout is torch.strided and not is_wrapper(traced):
        strides = [int(size_hint(stride)) for stride in traced.stride()]
        offset = int(size_hint(traced.storage_offset()))
        length = offset + 1 + sum((size - 1) * stride for size, stride in zip(value.shape, strides))
        key = storage_id(traced)
        base = storages.get(key)
        if base is None or base.dtype != dtype or len(base) < length:
            shared = base
            base = torch.zeros(max(length, 0) if value.numel() else 0, dtype=dtype, device=device)
            if shared is None or shared.dtype == dtype:
                storages[key] = base
        if value.numel():
            placed = base.as_strided(value.shape, strides, offset)
            if all(stride for size, stride in zip(value.shape, strides) if size > 1):
                placed.copy_(value)
            else:
                base.fill_(1.5)
            value = placed
    if value.is_floating_point() and recorded:
        value = value.detach().requires_grad_()
    return value


# -- running ----------------------------------------------------------------------------------------------------------


class _Runner:
    """A graph as a callable of all that it reads, in one reading of its dtypes."""

    def __init__(self, gm: fx.GraphModule, reading: str, names: list[str], dense: tuple[str, ...]) -> None:
        self.gm = gm
        self.reading = reading
        self.names = names
        self.dense = dense

    def __call__(self, *values: Any) -> Any:
        inputs = dict(zip(self.names, values))
        contexts: list[Any] = []
        try:
            if self.reading == "native":
                return self._run(self.gm, inputs, None, contexts)
            with below_autocast():
                return self._run(self.gm, inputs, None, contexts)
        finally:
            for context in reversed(contexts):  # an exception left them open
                context.__exit__(None, None, None)

    def _run(self, gm: fx.GraphModule, inputs: dict[str, Any], operands: list[Any] | None, contexts: list[Any]) -> Any:
        """Args:
        inputs: values by name.
        operands: the inputs of a body, in their order; None for the whole graph.
        """
        values: dict[fx.Node, Any] = {}
        unneeded = _unneeded(gm.graph, self.dense)
        body_inputs = iter(operands or ())
        for node in gm.graph.nodes:
            if node in unneeded:
                continue
            if node.op == "placeholder":
                values[node] = inputs[node.name] if operands is None else next(body_inputs)
            elif node.op == "get_attr":
                key = f"self.{node.target}"
                values[node] = inputs[key] if operands is None and key in inputs else self._read(gm, str(node.target))
            elif node.op == "output":
                return fx.map_arg(node.args[0], values.__getitem__)
            elif node.name in self.dense and DENSE not in node.meta:
                values[node] = inputs[node.name]
            elif DENSE in node.meta:
                left, right = (values[a] for a in node.args[3:5])
                values[node] = torch.ops.dorafx.row_norm.default(inputs[node.meta[DENSE]], left, right, node.args[5])
            else:
                values[node] = self._call(gm, node, values, contexts)
        raise RuntimeError("a graph without an output")

    def _read(self, gm: fx.GraphModule, target: str) -> Any:
        value = attrgetter(target)(gm)
        if isinstance(value, torch.Tensor):
            value = value.detach().clone()
            if self.reading != "native" and value.dtype in FLOAT_DTYPES:
                value = value.to(torch.float64)
        return value

    def _call(self, gm: fx.GraphModule, node: fx.Node, values: dict[fx.Node, Any], contexts: list[Any]) -> Any:
        args: Any
        kwargs: Any
        args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
        if takes_operands_for_body(node.target):
            start = body_operands_start(node.target)
            return self._run(args[0], {}, list(args[start:]), contexts)
        rounds = None
        if self.reading != "native":
            rounds = _cast_to(node, args, kwargs) if self.reading == "rounded" else None
            args, kwargs = in_double(args), in_double(kwargs)
        if node.op == "call_method":
            name = str(node.target)
            if self.reading != "native" and name in (*_CASTS, "dequantize"):
                name = "double"
            result = getattr(args[0], name)(*args[1:], **kwargs)
        elif node.op == "call_module":
            result = attrgetter(str(node.target))(gm)(*args, **kwargs)
        else:
            result = node.target(*args, **kwargs)  # type: ignore[operator]
            name = getattr(node.target, "__name__", "")
            if name == "_enter_autocast":
                contexts.append(result)
            elif name == "_exit_autocast":
                contexts.pop()
        if rounds is not None and isinstance(result, torch.Tensor) and result.is_floating_point():
            result = result.to(rounds).to(torch.float64)
        return result


def _unneeded(graph: fx.Graph, dense: tuple[str, ...]) -> set[fx.Node]:
    """Nodes that are read only by nodes that are not run: the parts of a quantised weight, which random dense values replace."""
    unneeded: set[fx.Node] = set()
    if not dense:
        return unneeded

    def reads(user: fx.Node, node: fx.Node) -> bool:
        if user in unneeded or user.name in dense:
            return False
        return node in user.args[3:5] if DENSE in user.meta else True

    for node in reversed(graph.nodes):
        if (
            node.op != "output"
            and node.name not in dense
            and node.users
            and not any(reads(u, node) for u in node.users)
        ):
            unneeded.add(node)
    return unneeded


def _cast_to(node: fx.Node, args: Any, kwargs: Any) -> torch.dtype | None:
    """The dtype that a cast rounds to; None for a node that is no cast, or a widening one."""
    if canonical_name(node) != "cast":
        return None
    dtype = _CASTS.get(str(node.target)) if node.op == "call_method" else None
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, torch.dtype):
            dtype = argument
    source = tensor_of(node.args[0])
    if dtype not in FLOAT_DTYPES or source is None or not source.is_floating_point():
        return None
    return dtype if torch.finfo(dtype).eps > torch.finfo(source.dtype).eps else None


def in_double(argument: Any) -> Any:
    """An operator's argument with fp64 in place of every floating dtype in it."""
    if isinstance(argument, torch.dtype) and argument in FLOAT_DTYPES:
        return torch.float64
    if type(argument) in (list, tuple):
        return type(argument)(in_double(a) for a in argument)
    if isinstance(argument, dict):
        return {k: in_double(v) for k, v in argument.items()}
    return argument
