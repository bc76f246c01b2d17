"""What the scripts of ``RewriteLog.save_repro`` and ``DORAFX_REPRO`` run: drawn inputs, and a comparison of a graph before and after
its rewrite."""

from __future__ import annotations

import contextlib
import inspect
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import fx

from dorafx import capture
from dorafx._compat.operators import takes_operands_for_body
from dorafx._compat.scripts import forget_compilations, higher_order_name, let_vary, numbers_of_tensors_in_graphs
from dorafx.errors import in_a_line
from dorafx.graph_check import GraphCheck, Run
from dorafx.graphs.provenance import input_path
from dorafx.log import RewriteLog
from dorafx.observation import ERROR_FACTOR, Observation, distance, observe
from dorafx.options import Options
from dorafx.pipeline import Program, rewrite_graph

__all__ = ["Draw", "compare"]

_T = TypeVar("_T", bound=torch.nn.Module)
_UNKNOWN_ERROR = 1e-3  # relative, where the graph's own rounding errors are unknown


class Draw:
    """Draws the tensors of a script: the same ones for the same seed and the same order of calls.

    Args:
        seed: of the random numbers.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def tensor(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        strides: Sequence[int] | None = None,
        device: str = "cpu",
        symbolic: Sequence[int] = (),
        requires_grad: bool = False,
    ) -> torch.Tensor:
        """An input: normal values of the size of activations; of other dtypes than floating ones, ones and zeros in turn, which any
        table of two rows or more can be indexed by.

        Args:
            shape, dtype, device, requires_grad: of the tensor.
            strides: in elements; those of a contiguous tensor by default.
            symbolic: the dimensions whose size may be another at the next call.
        """
        value = self._values(shape, dtype)
        return self._placed(value, dtype, strides, device, symbolic, requires_grad)

    def parameter(
        self,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        strides: Sequence[int] | None = None,
        device: str = "cpu",
        symbolic: Sequence[int] = (),
        requires_grad: bool = False,
    ) -> torch.nn.Parameter:
        """A parameter: a matrix is normal, scaled as at initialisation; a vector is near one, as a magnitude or a layer norm's weight is.

        Args:
            shape, dtype, strides, device, symbolic, requires_grad: as for :meth:`tensor`.
        """
        if len(shape) < 2:
            value = 1 + 0.2 * torch.randn(tuple(shape), dtype=torch.float64, generator=self._generator)
        else:
            value = self._values(shape, dtype) / math.sqrt(max(math.prod(shape[1:]), 1))
        tensor = self._placed(value, dtype, strides, device, symbolic, False)
        return torch.nn.Parameter(tensor, requires_grad=requires_grad)

    def _values(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        if dtype.is_floating_point or dtype.is_complex:
            return torch.randn(tuple(shape), dtype=torch.float64, generator=self._generator)
        value = torch.ones(tuple(shape), dtype=dtype)
        if value.dim() and dtype is not torch.bool:
            value[..., 1::2] = 0
        return value

    def _placed(
        self,
        value: torch.Tensor,
        dtype: torch.dtype,
        strides: Sequence[int] | None,
        device: str,
        symbolic: Sequence[int],
        requires_grad: bool,
    ) -> torch.Tensor:
        value = value.to(device, dtype)
        if strides is not None and value.numel():
            length = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, strides))
            placed = torch.ones(length, dtype=dtype, device=device).as_strided(value.shape, tuple(strides))
            if all(stride for size, stride in zip(value.shape, strides) if size > 1):
                placed.copy_(value)
            value = placed
        for dimension in symbolic:
            let_vary(value, dimension)
        return value.requires_grad_(requires_grad) if requires_grad else value


@dataclass
class _Settings:
    """Where the data is from, and the modes that the graph was captured in."""

    seed: int
    grad_mode: str
    autocast: Mapping[str, torch.dtype]

    def drawn(self, graph: Callable[[Draw], _T], inputs: Callable[[Draw], Sequence[Any]]) -> tuple[_T, Sequence[Any]]:
        """The module and what to call it with: the same values at every call."""
        draw = Draw(self.seed)
        return graph(draw), inputs(draw)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(numbers_of_tensors_in_graphs())
            if self.grad_mode == "inference":
                stack.enter_context(torch.inference_mode())
            elif self.grad_mode == "no_grad":
                stack.enter_context(torch.no_grad())
            for kind, dtype in self.autocast.items():
                if kind == "cpu" or torch.cuda.is_available():
                    stack.enter_context(torch.autocast(kind, dtype=dtype))
            yield


def compare(
    graph: Callable[[Draw], torch.nn.Module],
    inputs: Callable[[Draw], Sequence[Any]],
    options: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    grad_mode: str = "grad",
    autocast: Mapping[str, torch.dtype] | None = None,
    default_dtype: torch.dtype = torch.float32,
) -> int:
    """Rewrite a graph, run it before and after, and print what differs.

    Args:
        graph: makes the module that is the graph.
        inputs: makes what it is called with.
        options: ``dorafx.*`` options.
        seed: of the numbers that are drawn for both.
        grad_mode: ``"grad"``, ``"no_grad"`` or ``"inference"``.
        autocast: the dtype for each device type on which autocast is on.
        default_dtype: torch's, while the graph runs.

    Returns:
        1 if the results differ, or dorafx fails; else 0.
    """
    parsed, _ = Options.split(options)
    capture.install()
    before = torch.get_default_dtype()
    torch.set_default_dtype(default_dtype)
    try:
        return _compare(graph, inputs, dict(options or {}), parsed, _Settings(seed, grad_mode, autocast or {}))
    finally:
        torch.set_default_dtype(before)


def _compare(
    graph: Callable[[Draw], torch.nn.Module],
    inputs: Callable[[Draw], Sequence[Any]],
    options: dict[str, Any],
    parsed: Options,
    settings: _Settings,
) -> int:
    module, arguments = settings.drawn(graph, inputs)
    captured: list[tuple[fx.GraphModule, list[Any], Program]] = []
    log = RewriteLog()

    def collect(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        captured.append((gm, list(example_inputs), rewrite_graph(gm, parsed, len(captured) + 1, log=log)))
        return gm.forward

    forget_compilations()
    with settings.entered():
        torch.compile(module, backend=collect)(*arguments)
        failures: list[str] = []
        exact: list[dict[str, torch.Tensor]] = []
        print(log)
        for number, (gm, values, program) in enumerate(captured, 1):
            title = f"graph {number} of {len(captured)}" if len(captured) > 1 else "the graph"
            nodes = (len(gm.graph.nodes), len(program.graph.graph.nodes))
            print(f"\n{title}: {nodes[0]} nodes, after the rewrite {nodes[1]}")
            if program.error is not None:
                print("dorafx failed:\n" + "".join(traceback.format_exception(program.error)).rstrip())
                failures.append(f"dorafx failed: {in_a_line(program.error)[0]}")
            failures += _graphs(gm, program.graph, values, exact)
    if not captured:
        failures.append("Dynamo captured no graph")
    failures += _as_compiled(graph, inputs, options, settings, exact[0] if len(exact) == 1 else {})
    print()
    for failure in failures:
        print(f"DIFFERENT: {failure}")
    print(f"{len(failures)} differences" if failures else "no difference")
    return 1 if failures else 0


def _graphs(
    gm: fx.GraphModule, new: fx.GraphModule, values: list[Any], exact: list[dict[str, torch.Tensor]]
) -> list[str]:
    """Compare a graph and its replacement, operator by operator; the differences. ``exact`` receives the original's results in fp64."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    given = {node.name: v for node, v in zip(placeholders, values) if isinstance(v, torch.Tensor)}
    check = GraphCheck(gm, given)
    branches = [n for n in map(_branching, gm.graph.nodes) if n]
    mode = check.runs[0].mode
    labels = {node.name: _label(node) for node in placeholders}
    reference = check.observed(gm, Run(0, "exact", mode))
    exact.append({} if reference.raised or branches else _values(reference, labels))
    if new is gm:
        return []
    if branches:
        print(f"  not run operator by operator, because of {branches[0]}")
        return []
    for reading, title in (("exact", "in fp64"), ("native", "in its own dtypes, error against fp64")):
        expected, actual = (check.observed(side, Run(0, reading, mode)) for side in (gm, new))
        print(f"  {title}:")
        _table(exact[-1] if reading == "native" else None, expected, actual, labels)
    try:
        comparison, run = check.compare(new)
    except RuntimeError as error:
        return [f"the graph cannot be run on random values: {error}"]
    return [f"{run}, {_labelled(sentence, labels)}" for sentence in comparison.differences]


def _branching(node: fx.Node) -> str:
    """The name of an operator that calls graphs in a way that a graph check does not follow, as ``torch.cond`` does; else empty."""
    return "" if takes_operands_for_body(node.target) else higher_order_name(node.target)


def _label(node: fx.Node) -> str:
    """The script's name of an input."""
    return input_path(node) or node.name


def _labelled(sentence: str, labels: Mapping[str, str]) -> str:
    """A sentence with the names of the script's parameters and arguments in place of those of the traced graph."""
    for name in sorted(labels, key=len, reverse=True):
        sentence = sentence.replace(name, labels[name])
    return sentence


def _table(
    exact: Mapping[str, torch.Tensor] | None, expected: Observation, actual: Observation, labels: Mapping[str, str]
) -> None:
    """One line for each output and gradient. With ``exact``: the errors of both sides against it, else their difference."""
    for side, observation in (("before", expected), ("after", actual)):
        if observation.raised:
            print(f"    {side} the rewrite: {observation.raised}: {observation.message}")
    rows = _values(expected, labels)
    others = _values(actual, labels)
    references = exact or {}
    for name, value in rows.items():
        other = others.get(name)
        if other is None or value.shape != other.shape:
            print(f"    {name}: {'none' if other is None else tuple(other.shape)} after the rewrite")
        elif value.numel() and not value.double().isfinite().any():
            print(f"    {name}: no number is finite on the drawn values, so none is compared")
        elif exact is None:
            print(f"    {name}: difference {_distance(other, value):.1e} of its size")
        elif name in references:
            errors = (_distance(v, references[name]) for v in (value, other))
            print("    {}: {:.1e} before, {:.1e} after".format(name, *errors))


def _values(observation: Observation, labels: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Outputs and gradients of floating dtypes, by what they are."""
    outputs = {name: getattr(seen, "value", None) for name, seen in observation.outputs.items()}
    gradients = {f"gradient of {labels.get(name, name)}": value for name, value in observation.gradients.items()}
    return {
        name: value
        for name, value in {**outputs, **gradients}.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    }


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(distance(one.double(), other.double())) if one.numel() else 0.0


def _as_compiled(
    graph: Callable[[Draw], torch.nn.Module],
    inputs: Callable[[Draw], Sequence[Any]],
    options: dict[str, Any],
    settings: _Settings,
    exact: Mapping[str, torch.Tensor],
) -> list[str]:
    """Run the graph as ``torch.compile`` with dorafx compiles it, twice, and compare with the graph run eagerly."""
    print(f"\n  compiled with {options or 'the default options'}{', error against fp64' if exact else ''}:")
    module, arguments = settings.drawn(graph, inputs)
    leaves = dict(module.named_parameters())
    names = [name for name in inspect.signature(module.forward).parameters]

    def seen(program: Callable[..., Any]) -> Observation:
        with settings.entered():
            return observe(lambda *values: program(*values), arguments, leaves, seed=1, names=names)

    expected = seen(module)
    if expected.raised:
        return [f"the graph does not run: {expected.raised}: {expected.message}"]
    if _draws(expected) and options.get("dorafx.codegen", "inductor") == "inductor":
        options = {**options, "fallback_random": True}  # Inductor's own random numbers are others than torch's
    forget_compilations()
    compiled = torch.compile(module, backend="dorafx", options=options)
    rows = _values(expected, {})
    references = exact if exact.keys() >= rows.keys() else rows
    failures = []
    for number in (1, 2):
        actual = seen(compiled)
        if number == 1:
            _table(exact or None, expected, actual, {})
        if actual.raised:
            failures.append(f"compiled, call {number}: {actual.raised}: {actual.message}")
            continue
        others = _values(actual, {})
        for name, value in rows.items():
            if name not in others or others[name].shape != value.shape:
                failures.append(f"compiled, call {number}: {name} is absent or of another shape")
                continue
            if not torch.equal(others[name].double().isfinite(), value.double().isfinite()):
                failures.append(f"compiled, call {number}: {name} is finite in other places")
                continue
            floor = torch.finfo(value.dtype).eps if references is exact else _UNKNOWN_ERROR
            limit = ERROR_FACTOR * (_distance(value, references[name]) + floor)
            error = _distance(others[name], references[name])
            if error > limit:
                failures.append(f"compiled, call {number}: {name} is {error:.1e} off, more than {limit:.1e}")
    return failures


def _draws(observation: Observation) -> bool:
    """Whether a run has drawn random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        fresh = torch.get_rng_state()
    return any(name != "cpu" or not torch.equal(state, fresh) for name, state in observation.generators.items())
