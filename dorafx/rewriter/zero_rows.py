"""The option ``zero_rows="finite"``: a quotient with a norm of zero is 0.

A row of ``W + s·B·A`` that is zero has no direction, and ``m / 0`` makes it NaN or infinite, which the backward carries into every
factor. With a norm of infinity in place of zero the scaling ``g = m / n`` is 0: the row gives 0 and the bias, and the gradients of
its magnitude, of its row of B and by way of a differentiable norm are 0. Other rows keep every bit.

This is done where the rewritten graph divides, not where norms are computed: only there is the norm in the dtype in which the
program divides by it (a norm of ``1e-8`` is 0 in fp16), and a norm that the program returns or guards by itself stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dorafx._compat.tensors import fake_mode_of
from dorafx.graphs.operators import arguments, canonical_name
from dorafx.graphs.tensors import tensor_of

from .closures import NORMS
from .fake_values import FakeValues
from .hoist import KEY, NORM_INPUT
from .nodes import gradients_as_of, tensor_method
from .placements import is_redistribution

# Of a norm these are zero exactly where it is zero. Products are, if all their factors are norms or numbers.
_KEEP_ZEROS = frozenset(
    ("abs", "cast", "data", "detach", "expand", "getitem", "identity", "mul", "neg", "permute", "select", "slice", "sqrt",
     "square", "t", "transpose", "view")
)  # fmt: skip
_POWERS = frozenset(("pow", "float_power"))
_REPEAT = "repeat_interleave"
# Which argument of a quotient is the divisor: its place and its name.
_DIVISORS = {"div": (1, "other"), "reciprocal": (0, "input"), "rsqrt": (0, "input"), "addcdiv": (2, "tensor2")}
# Of those that write to their divisor (``reciprocal_``) none: they would write to a copy.
_IN_PLACE = {
    "div_": "div",
    "divide_": "div",
    "true_divide_": "div",
    "__itruediv__": "div",
    "itruediv": "div",
    "addcdiv_": "addcdiv",
}
_REFLECTED = ("__rtruediv__", "__rdiv__")


def guard_zero_norms(gm: fx.GraphModule) -> int:
    """Make every division by a norm that dorafx computes one by infinity where the norm is zero, also in the bodies of higher-order
    operators.

    Args:
        gm: a rewritten graph, before or after its norms were hoisted; changed in place.

    Returns:
        How many divisions are guarded.
    """
    guarded = 0
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            guarded += _guard(module)
    return guarded


def _guard(gm: fx.GraphModule) -> int:
    reached: set[fx.Node] = set()
    guarded = 0
    fake_values = FakeValues()
    for node in list(gm.graph.nodes):
        if _is_norm(node) or _keeps_zeros(node, reached):
            reached.add(node)
            continue
        divisor = _divisor(node)
        if divisor is None or divisor not in reached or not _is_floating(divisor):
            continue
        # Just before the quotient: the program may write to its norm in between.
        with gm.graph.inserting_before(node):
            _replace_divisor(node, divisor, _guarded(gm.graph, divisor, fake_values))
        guarded += 1
    if guarded:
        gm.graph.lint()
        gm.recompile()
    return guarded


def _is_floating(node: fx.Node) -> bool:
    tensor = tensor_of(node)
    return tensor is not None and tensor.dtype.is_floating_point


def _is_norm(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return NORM_INPUT in node.meta
    return node.op == "call_function" and node.target in NORMS and KEY in node.meta


def _name(node: fx.Node) -> str:
    """The canonical name of an operator, of one that works in place too."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return _IN_PLACE.get(str(name)) or canonical_name(node) or str(name)


def _keeps_zeros(node: fx.Node, reached: set[fx.Node]) -> bool:
    inputs = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or not inputs or reached.isdisjoint(inputs):
        return False
    if is_redistribution(node):
        return node.args[0] in reached
    name = _name(node)
    if name == "div":  # by a number
        return node.args[0] in reached and len(inputs) == 1 and _number(node, 1, "other") is not None
    if name in _POWERS:
        exponent = _number(node, 1, "exponent")
        return exponent is not None and exponent > 0
    if name == "mul":
        return all(n in reached for n in inputs) and 0 not in node.args
    if name == "where":  # one norm or another
        return len(node.args) == 3 and all(isinstance(a, fx.Node) and a in reached for a in node.args[1:])
    if name == "clamp_max":
        bound = _number(node, 1, "max")
        return bound is not None and bound > 0 and node.args[0] in reached
    # Sizes, and a tensor whose shape or dtype is taken, may be other inputs.
    return name in (*_KEEP_ZEROS, _REPEAT) and bool(node.args) and node.args[0] in reached


def _number(node: fx.Node, place: int, name: str) -> float | None:
    value = node.args[place] if len(node.args) > place else node.kwargs.get(name)
    return value if isinstance(value, (int, float)) else None


def _divisor(node: fx.Node) -> fx.Node | None:
    """What a node divides by; None if it does not divide by a node."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _REFLECTED:
        value: Any = node.args[0]
        return value if isinstance(value, fx.Node) else None
    name = _name(node)
    if name in _POWERS:
        exponent = _number(node, 1, "exponent")
        place, argument = (0, "input") if exponent is not None and exponent < 0 else (None, "")
    else:
        place, argument = _DIVISORS.get(name, (None, ""))
    if place is None:
        return None
    names = [f"argument {i}" for i in range(place)] + [argument]
    value = arguments(node, *names).get(argument)
    return value if isinstance(value, fx.Node) else None


def _replace_divisor(node: fx.Node, divisor: fx.Node, guarded: fx.Node) -> None:
    """In ``n / n`` or ``n.addcdiv(n, n)`` the other operands stay."""
    if node.target in _REFLECTED or _name(node) in ("reciprocal", "rsqrt", *_POWERS):
        place = 0
    else:
        place = _DIVISORS[_name(node)][0]
    if len(node.args) > place:
        node.args = (*node.args[:place], guarded, *node.args[place + 1 :])
    else:
        node.kwargs = {name: guarded if value is divisor else value for name, value in node.kwargs.items()}


def _guarded(graph: fx.Graph, divisor: fx.Node, fake_values: FakeValues) -> fx.Node:
    """The divisor with infinity in place of zero."""
    is_zero = graph.call_function(torch.eq, (divisor, 0))
    guarded = graph.call_method("masked_fill", (divisor, is_zero, math.inf))
    for node, target in ((is_zero, torch.eq), (guarded, tensor_method("masked_fill"))):
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in divisor.meta:
                node.meta[key] = divisor.meta[key]
        slot = "example_value" if "example_value" in divisor.meta else "val"
        value = divisor.meta.get(slot)
        mode = fake_mode_of(value)
        if mode is not None:
            args = fx.node.map_arg(node.args, _value_in(slot))
            with gradients_as_of(value):
                node.meta[slot] = fake_values(target, args, {}, mode)
    return guarded


def _value_in(slot: str) -> Callable[[fx.Node], Any]:
    return lambda node: node.meta.get(slot)
