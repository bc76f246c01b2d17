"""A Tucker delta in two steps: ``einsum("ijkl,jr,ip->prkl", core, A, B)`` is the product of B with the core in whose place stands what A makes
of it. That one is no value of the program; taken apart, it is."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from dorafx._compat.tensors import fake_mode_of, under

from .operators import canonical_name
from .shapes import of_mode
from .tensors import tensor_of

_ELLIPSIS = "*"


class _Tucker(NamedTuple):
    """Operands by position, and the equations of the two steps."""

    core: int
    inner: int
    outer: int
    first: str
    second: str


def has_tucker_products(graph: fx.Graph) -> bool:
    """Whether some node makes filters of a core and a factor on each side."""
    return any(_tucker(node) is not None for node in graph.nodes)


def with_tucker_products_in_steps(graph: fx.Graph) -> bool:
    """Multiply each core with the factor of the input channels first, in a node of its own.

    Args:
        graph: changed in place.

    Returns:
        Whether anything was changed.
    """
    changed = False
    for node in list(graph.nodes):
        tucker = _tucker(node)
        if tucker is not None:
            changed |= _take_apart(graph, node, tucker)
    return changed


def _operands(node: fx.Node) -> tuple[Any, ...]:
    rest = node.args[1:]
    if len(rest) == 1 and isinstance(rest[0], (list, tuple)):
        return tuple(rest[0])
    return tuple(rest)


def _tucker(node: fx.Node) -> _Tucker | None:
    if node.op != "call_function" or canonical_name(node) != "einsum" or node.kwargs or not node.args:
        return None
    equation, operands = node.args[0], _operands(node)
    if not isinstance(equation, str) or len(operands) != 3 or not all(isinstance(o, fx.Node) for o in operands):
        return None
    left, arrow, result = equation.replace(" ", "").replace("...", _ELLIPSIS).partition("->")
    inputs = left.split(",")
    if not arrow or len(inputs) != 3 or len(result) < 3 or result[0] == _ELLIPSIS or result[1] == _ELLIPSIS:
        return None
    if any(len(set(letters)) != len(letters) for letters in (*inputs, result)):
        return None
    rows, channels, positions = result[0], result[1], result[2:]
    core = next((i for i, letters in enumerate(inputs) if len(letters) > 2 and letters[2:] == positions), None)
    if core is None:
        return None
    ranks = set(inputs[core][:2])
    factors = {i: set(inputs[i]) for i in range(3) if i != core}
    inner = next((i for i, letters in factors.items() if channels in letters), None)
    outer = next((i for i, letters in factors.items() if rows in letters), None)
    if inner is None or outer is None or inner == outer or any(len(letters) != 2 for letters in factors.values()):
        return None
    near, far = factors[inner] - {channels}, factors[outer] - {rows}
    if near | far != ranks or near == far or len(inputs[inner]) != 2 or len(inputs[outer]) != 2:
        return None
    (rank,) = far
    between = f"{rank}{channels}{positions}"
    first = f"{inputs[core]},{inputs[inner]}->{between}"
    second = f"{between},{inputs[outer]}->{result}"
    return _Tucker(core, inner, outer, *(text.replace(_ELLIPSIS, "...") for text in (first, second)))


def _take_apart(graph: fx.Graph, node: fx.Node, tucker: _Tucker) -> bool:
    operands = _operands(node)
    pairs = (operands[tucker.core], operands[tucker.inner])
    result, listed = tensor_of(node), isinstance(node.args[1], (list, tuple))
    tensors = [tensor_of(operand) for operand in operands]
    mode = fake_mode_of(result) if result is not None else None
    target = node.target
    if (
        result is None
        or mode is None
        or isinstance(target, str)
        or any(t is None or t.dtype != result.dtype for t in tensors)
    ):
        return False  # without values, or in an autocast region
    with graph.inserting_before(node):
        step = graph.call_function(target, (tucker.first, list(pairs)) if listed else (tucker.first, *pairs))
    step.meta = {key: value for key, value in node.meta.items() if key not in ("example_value", "val")}
    with under(mode), torch.set_grad_enabled(result.requires_grad):
        values = [of_mode(tensor_of(operand), mode) for operand in pairs]
        step.meta["example_value" if "example_value" in node.meta else "val"] = torch.einsum(tucker.first, *values)
    rest = (step, operands[tucker.outer])
    node.args = (tucker.second, list(rest)) if listed else (tucker.second, *rest)
    return True
