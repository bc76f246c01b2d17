"""Nodes that compute the same value: the same operator on the same operands (value numbering).

A frozen weight that a layer dequantises twice, once for its product and once for its norm, is one weight.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Hashable
from typing import Any

from torch import fx

from dorafx._compat.operators import is_function_of_its_operands, is_higher_order

from .inputs import is_leaf
from .lookup import name_in_torch
from .operators import canonical_name
from .tensors import may_require_grad, tensor_of

_PYTHON = frozenset((
    operator.add, operator.and_, operator.eq, operator.floordiv, operator.ge, operator.getitem, operator.gt, operator.inv,
    operator.invert, operator.le, operator.lshift, operator.lt, operator.mod, operator.mul, operator.ne, operator.neg,
    operator.or_, operator.pos, operator.pow, operator.rshift, operator.sub, operator.truediv, operator.xor,
))  # fmt: skip
"""Functions of Python's ``operator`` module that neither write to an operand nor give another result at another time."""

_TO_INTEGERS = frozenset(("bool", "byte", "char", "int", "long", "short"))
"""Methods of tensors that cast, and are no operators."""


class EqualValues:
    """For each node the first one of its graph that computes the same value.

    Two nodes are equal if they call the same operator, which neither writes nor draws random numbers, with equal operands, where
    PyTorch's context (autocast, inference mode) is the same. Results that require a gradient are never taken as equal: a gradient flows
    through each of them by itself, and hooks may see it.

    Args:
        written: nodes whose memory the graph writes to. Their value depends on when it is read.
        leaf: what identifies the tensor that a placeholder or an attribute reads.
    """

    def __init__(self, written: Container[fx.Node], leaf: Callable[[fx.Node], Hashable]) -> None:
        self._written = written
        self._leaf = leaf
        self._first: dict[Hashable, fx.Node] = {}
        self._first_of: dict[fx.Node, fx.Node] = {}
        self._contexts = 0

    def follow(self, node: fx.Node, compare: bool) -> None:
        """Take in the next node of the graph; it and what is computed from it are equal to no other unless ``compare``."""
        if node.op == "call_function" and _changes_context(node):
            self._contexts += 1
        key = self._key(node) if compare else None
        if key is not None:
            self._first_of[node] = self._first.setdefault(key, node)

    def first(self, node: fx.Node) -> fx.Node:
        """The first node with the value of a node; the node itself if there is no other."""
        return self._first_of.get(node, node)

    def _key(self, node: fx.Node) -> Hashable | None:
        if node in self._written:
            return None
        if is_leaf(node):
            return "leaf", self._leaf(node)
        tensor = tensor_of(node)
        if tensor is None or may_require_grad(node) or not _is_pure(node):
            return None
        try:
            operands = self._operands((node.args, node.kwargs))
            key = (node.op, node.target, operands, self._contexts, tensor.dtype, tensor.device)
            hash(key)
        except (TypeError, _Unknown):
            return None
        return key

    def _operands(self, value: Any) -> Hashable:
        if isinstance(value, fx.Node):
            if value not in self._first_of:
                raise _Unknown
            return self._first_of[value]
        if isinstance(value, (tuple, list)):
            return type(value).__name__, tuple(map(self._operands, value))
        if isinstance(value, dict):
            return "dict", tuple((name, self._operands(v)) for name, v in value.items())
        if isinstance(value, slice):
            return "slice", tuple(map(self._operands, (value.start, value.stop, value.step)))
        # 1, 1.0 and True are equal in Python, as are the two zeros.
        return type(value).__name__, repr(value) if isinstance(value, float) else value


class _Unknown(Exception):
    """An operand that is not known to be the same at each read."""


def _changes_context(node: fx.Node) -> bool:
    name = str(getattr(node.target, "__name__", ""))
    return name.startswith(("_enter_", "_exit_"))


def _is_pure(node: fx.Node) -> bool:
    name = canonical_name(node)
    if name is not None:
        return name != "dropout"
    if node.op == "call_function" and not is_higher_order(node.target):
        return node.target in _PYTHON or is_function_of_its_operands(name_in_torch(node.target) or node.target)
    return node.op == "call_method" and (node.target in _TO_INTEGERS or is_function_of_its_operands(node.target))
