"""Translation validation: run what a rewrite replaces and its replacement on random data, in fp64, forward and backward.

The region of a rewrite reaches from the values that its term is made of (activations, parameters) to the rewritten node.
Both sides are computed from the same random values of these; every cast to a floating dtype is read as one to fp64, so that
what remains of a difference is a difference of the programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dorafx import _compat
from dorafx.lift.targets import canonical_name
from dorafx.lift.values import FLOAT_DTYPES
from dorafx.rewriter.prologue import DENSE

__all__ = ["TOLERANCE", "Check", "Region"]

TOLERANCE = 1e-9
"""Largest difference of outputs and gradients, relative to the largest value. fp64 rounds at 1e-16; a norm of a hundred
million elements in another order of summation stays below 1e-12."""

_TO_DOUBLE = frozenset(("double", "float", "half", "bfloat16", "dequantize"))


@dataclass(frozen=True)
class Check:
    """What the validation of one rewrite found.

    Attributes:
        site: the module's name; empty for a plain function.
        pattern: the canonical form, or ``"norm_only"``.
        error: largest difference of outputs and gradients relative to the largest value, in fp64; inf if the two could
            not be compared.
        reason: what was wrong; empty where nothing was.
    """

    site: str
    pattern: str
    error: float
    reason: str = ""

    @property
    def passed(self) -> bool:
        return not self.reason


class Region:
    """The original region that ends in ``node``, and its replacement that ends in ``replacement``.

    Args:
        leaves: nodes of the original graph where the region begins (its inputs begin it in any case).
        copied: original node -> the node of the new graph that stands for it.
    """

    def __init__(
        self, node: fx.Node, replacement: fx.Node, leaves: set[fx.Node], copied: dict[fx.Node, fx.Node]
    ) -> None:
        self.node = node
        self.replacement = replacement
        self.leaves = leaves - {node}
        self.originals = {copy: original for original, copy in copied.items()}
        self._values: dict[fx.Node, Any] = {}
        self._generator = torch.Generator().manual_seed(0)

    def check(self, site: str, pattern: str) -> Check:
        """Compare outputs and gradients."""
        try:
            with torch.random.fork_rng(), torch.enable_grad(), _compat.below_autocast():
                wanted = self._run(self.node, lambda n: n)
                actual = self._run(self.replacement, self.originals.get)
                error, what = self._compare(wanted, actual)
        except Exception as failed:
            return Check(
                site, pattern, math.inf, f"not verified: {type(failed).__name__}: {str(failed).splitlines()[0]}"
            )
        if error <= TOLERANCE:
            return Check(site, pattern, error)
        return Check(site, pattern, error, f"verification: {what} differ by {error:.1e} from the original's in fp64")

    def _compare(self, wanted: torch.Tensor, actual: torch.Tensor) -> tuple[float, str]:
        if wanted.shape != actual.shape:
            return math.inf, f"shapes ({tuple(actual.shape)} and {tuple(wanted.shape)})"
        worst = (_difference(actual, wanted), "outputs")
        trained = [v for v in self._values.values() if isinstance(v, torch.Tensor) and v.requires_grad]
        if wanted.requires_grad != actual.requires_grad:
            return math.inf, "gradient flows"
        if not wanted.requires_grad:
            return worst
        weights = torch.randn(wanted.shape, dtype=torch.float64, generator=self._generator).to(wanted.device)
        gradients = [
            torch.autograd.grad((side * weights).sum(), trained, allow_unused=True) for side in (wanted, actual)
        ]
        for one, other in zip(*gradients):
            if (one is None) != (other is None):
                return math.inf, "gradient flows"
            if one is not None:
                worst = max(worst, (_difference(other, one), "gradients"))
        return worst

    # -- running a region ---------------------------------------------------------------------------------------------

    def _run(self, end: fx.Node, original: Callable[[fx.Node], fx.Node | None]) -> torch.Tensor:
        needed = self._needed(end, original)
        values: dict[fx.Node, Any] = {}
        modes = [True]
        for node in end.graph.nodes:
            modes = _grad_modes(node, modes)
            if node not in needed:
                continue
            source = original(node)
            if node.op in ("placeholder", "get_attr") or (source is not None and source in self.leaves):
                assert source is not None
                values[node] = self._value(source)
                continue
            with torch.set_grad_enabled(modes[-1]):
                values[node] = self._quantized_norm(node, values) if DENSE in node.meta else _call(node, values)
            if node is end:
                break
        result: torch.Tensor = values[end]
        return result

    def _quantized_norm(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        """The norm of a quantised weight is that of the random value that its dequantisation has here: codes of random values
        there are none in fp64. That blocks are dequantised as the library does it is not this check's business."""
        left, right = (values[factor] for factor in _factors(node))
        weight = self._value(next(n for n in self.node.graph.nodes if n.name == node.meta[DENSE]))
        return torch.ops.dorafx.row_norm.default(weight, left, right, node.args[5])

    def _needed(self, end: fx.Node, original: Callable[[fx.Node], fx.Node | None]) -> set[fx.Node]:
        found: set[fx.Node] = set()
        stack = [end]
        while stack:
            node = stack.pop()
            if node in found:
                continue
            found.add(node)
            if original(node) not in self.leaves:
                stack.extend(_factors(node) if DENSE in node.meta else node.all_input_nodes)
        return found

    def _value(self, node: fx.Node) -> Any:
        """The value of a leaf: random where it is a floating tensor, as traced where it is a number."""
        if node not in self._values:
            traced = node.meta.get("example_value", node.meta.get("val"))
            self._values[node] = self._random(traced) if isinstance(traced, torch.Tensor) else _compat.size_hint(traced)
        return self._values[node]

    def _random(self, traced: torch.Tensor) -> torch.Tensor:
        shape = [_compat.size_hint(size) for size in traced.shape]
        if traced.dtype not in FLOAT_DTYPES:
            return torch.zeros(shape, dtype=traced.dtype, device=traced.device)
        # Away from zero: a magnitude or a scaling near it would hide what it multiplies.
        value = torch.randn(shape, dtype=torch.float64, generator=self._generator)
        value = (value + 0.5 * value.sign()).to(traced.device)
        return value.requires_grad_(traced.requires_grad)


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node]:
    left, right = node.args[3:5]
    assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
    return left, right


def _difference(actual: torch.Tensor, wanted: torch.Tensor) -> float:
    if not wanted.numel():
        return 0.0
    error = (actual - wanted).abs().max().item() / max(wanted.abs().max().item(), 1e-30)
    return math.inf if math.isnan(error) else error


def _grad_modes(node: fx.Node, modes: list[bool]) -> list[bool]:
    name = canonical_name(node)
    if name == "set_grad_enabled":
        return [*modes[:-1], bool(node.args[0])]
    if name == "enter_inference_mode":
        return [*modes, modes[-1] and not node.args[0]]
    if name == "exit_inference_mode" and len(modes) > 1:
        return modes[:-1]
    return modes


def _call(node: fx.Node, values: dict[fx.Node, Any]) -> Any:
    args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
    args, kwargs = _in_double(args), _in_double(kwargs)
    if node.op == "call_method":
        name = "double" if node.target in _TO_DOUBLE else str(node.target)
        return getattr(args[0], name)(*args[1:], **kwargs)
    if node.op != "call_function":
        raise TypeError(f"a region with a {node.op}")
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _in_double(argument: Any) -> Any:
    if isinstance(argument, torch.dtype) and argument in FLOAT_DTYPES:
        return torch.float64
    if isinstance(argument, (list, tuple)):
        return type(argument)(_in_double(a) for a in argument) if type(argument) in (list, tuple) else argument
    if isinstance(argument, dict):
        return {k: _in_double(v) for k, v in argument.items()}
    return argument
