"""Closures: what a norm is computed from, down to the graph's inputs, and whether that may be computed before the graph."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from dorafx._compat.autograd import below_autocast
from dorafx._compat.tensors import fake_mode_of, under
from dorafx.graphs.operators import canonical_name
from dorafx.graphs.provenance import operator_name, source_of
from dorafx.graphs.tensors import tensor_of
from dorafx.graphs.writes import nodes_in
from dorafx.lift.quantized import is_torchao

NORMS = frozenset(
    (
        torch.ops.dorafx.row_norm.default,
        torch.ops.dorafx.row_norm_batched.default,
        torch.ops.dorafx.row_norm_quantized.default,
    )
)
TRANSPOSES = ("T", "mT")
"""Attributes of a tensor that are tensors."""

# What may stand between a parameter and the norm: pure operators, by canonical name. ``out=`` is a write, which is looked
# for anyway.
_VIEWS = frozenset(
    ("data", "detach", "expand", "getattr", "getitem", "permute", "select", "slice", "t", "transpose", "view")
)
_COPIES = frozenset(("cast", "dequantize", "identity"))
_PRODUCTS = frozenset(("addmm", "bmm", "einsum", "linear", "matmul", "outer"))
_ARITHMETIC = frozenset(
    ("add", "addcmul", "clamp", "clamp_min", "diag", "div", "lerp", "linalg_norm", "maximum", "mean", "mul", "neg", "norm",
     "pad", "pow", "reciprocal", "rsqrt", "rsub", "sqrt", "square", "sub", "sum", "vector_norm")
)  # fmt: skip

# Operators that take a tensor of no axes in place of a number.
_NUMERIC = frozenset(("add", "div", "mul", "neg", "reciprocal", "rsub", "sub"))


def closure_of(norm: fx.Node, written: frozenset[fx.Node]) -> list[fx.Node] | str:
    """The nodes from the graph's inputs to a norm, in their order; or which of them cannot leave the graph.

    Args:
        norm: a node that is one of :data:`NORMS`.
        written: what the graph writes to (:func:`dorafx.graphs.writes.written_nodes`): before the graph it has another value.
    """
    nodes: dict[fx.Node, None] = {}
    stack = [norm]
    while stack:
        current = stack.pop()
        if current in nodes:
            continue
        reason = _stays(current, written)
        if reason:
            return reason
        nodes[current] = None
        stack.extend(current.all_input_nodes)
    closure = sorted(nodes)
    cast = next((node for node in closure if not _is_same_outside_of_autocast(node)), None)
    if cast is not None and not (canonical_name(cast) in _PRODUCTS and _runs_outside_of_autocast(closure)):
        return f"{_named(cast)} runs in an autocast region"
    return _weight_that_is_made(norm) or _number_of_a_device(closure) or closure


def waits_for_device(node: fx.Node) -> bool:
    """Whether a node of a closure reads a number from an accelerator, for which the host would wait (and which fails while a CUDA
    graph is captured). The prologue takes the tensor instead."""
    source = tensor_of(node.args[0]) if node.target == "item" else None
    return source is not None and source.device.type != "cpu"


def is_number(node: fx.Node) -> bool:
    """Whether a node stands for a symbolic number."""
    return isinstance(node.meta.get("example_value", node.meta.get("val")), (torch.SymFloat, torch.SymInt))


def makes_memory(node: fx.Node) -> bool:
    """Whether a node of a closure makes a tensor of its own; a ``reshape`` counts as the view that it mostly is."""
    return node.op in ("call_function", "call_method") and canonical_name(node) not in _VIEWS


def _stays(node: fx.Node, written: frozenset[fx.Node]) -> str:
    """Why a node cannot be computed before the graph; empty if it can."""
    if node in written:
        return f"{_named(node)} is written in place"
    if node.op == "placeholder":
        return "" if tensor_of(node) is not None or is_number(node) else f"{_named(node)} is no tensor"
    if node.target == "item":
        source = node.args[0]
        return "" if isinstance(source, fx.Node) and source.op == "placeholder" else _named(node)
    return "" if node.target in NORMS or _is_pure(node) else _named(node)


def _is_pure(node: fx.Node) -> bool:
    if node.target is torch.cat:
        return True
    name = canonical_name(node)
    if name == "getattr":
        # A tensor subclass's parts.
        return is_torchao(tensor_of(node.args[0])) or node.args[1] in TRANSPOSES
    if name == "getitem":
        constant = len(node.all_input_nodes) == 1 and isinstance(node.args[0], fx.Node)
        return constant and tensor_of(node.args[0]) is not None
    return name in _VIEWS | _COPIES | _PRODUCTS | _ARITHMETIC


def _is_same_outside_of_autocast(node: fx.Node) -> bool:
    """Whether an operator has the same dtype outside of the program's autocast regions, in which no prologue runs."""
    value = tensor_of(node)
    name = canonical_name(node)
    if value is None or not value.dtype.is_floating_point or name in _VIEWS | _COPIES or node.target in NORMS:
        return True
    dtypes = _dtypes(map(tensor_of, node.all_input_nodes))
    return not dtypes or (value.dtype in dtypes and (name not in _PRODUCTS or len(dtypes) == 1))


def _runs_outside_of_autocast(closure: list[fx.Node]) -> bool:
    """Whether products that autocast rounds can be computed without it, and so more exactly. Two dtypes may meet then, which is
    an error."""
    values: dict[fx.Node, Any] = {}
    try:
        with below_autocast(), torch.no_grad():
            for node in closure:
                known = node.meta.get("example_value", node.meta.get("val"))
                if node.op == "placeholder" or node.target == "item":
                    values[node] = known
                    continue
                if canonical_name(node) in _PRODUCTS and len(_dtypes(values[n] for n in node.all_input_nodes)) > 1:
                    return False  # of which fake tensors know nothing
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                target: Any = getattr(torch.Tensor, str(node.target)) if node.op == "call_method" else node.target
                with under(fake_mode_of(known)):
                    values[node] = target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError):
        return False
    return True


def _dtypes(values: Iterable[Any]) -> set[torch.dtype]:
    return {v.dtype for v in values if isinstance(v, torch.Tensor) and v.dtype.is_floating_point}


def _weight_that_is_made(norm: fx.Node) -> str:
    """The operator that computes a norm's dense weight; empty where the weight is an input. The graph multiplies by it, so it
    would be computed twice, and of all layers at a time."""
    node = norm.args[0]
    while isinstance(node, fx.Node) and node.op != "placeholder":
        if canonical_name(node) not in _VIEWS | _COPIES:
            return f"the weight is made by {_named(node)}"
        node = node.args[0]
    return ""


def _number_of_a_device(closure: list[fx.Node]) -> str:
    """The operator that needs a number from an accelerator and cannot take the tensor in its place; empty where there is none."""
    numbers = {node for node in closure if waits_for_device(node)}
    for node in closure:
        if numbers.isdisjoint(node.all_input_nodes):
            continue
        if canonical_name(node) not in _NUMERIC or not numbers.isdisjoint(
            nodes_in((*node.args[2:], *node.kwargs.values()))
        ):
            return f"{_named(node)} takes a number that lies on a device"
        if tensor_of(node) is None:
            numbers.add(node)
    return ""


def _named(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"input {node.name}"
    return f"operator {operator_name(node)} at {source_of(node) or node.name}"
