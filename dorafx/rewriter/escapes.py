"""Norms that leave a program: a kept norm is never handed out, the program gets a copy where it could return it.

Whoever receives a tensor may write to it. Where a norm that enters a graph as an input, or a view of it, can reach an output,
what leads there reads a copy, made in the graph: in the body of an activation checkpoint, too, so that the recomputation makes
its own. All other readers, which are those of a usual layer, read the norm itself. A compiler may find such a copy superfluous
(Inductor returns ``n.clone() * ones`` as ``n``), so the graph is given a copy as well where it is run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from dorafx._compat import operators
from dorafx._compat.operators import body_operands_start, is_overload, takes_operands_for_body
from dorafx.graphs.operators import canonical_name
from dorafx.graphs.writes import attribute_of, names_another_memory, nodes_in, written_arguments

from .closures import is_number

# On the node of a copy.
_COPY = "dorafx_copy"

# Operators whose result is memory of its own whatever they are given, by canonical name.
_FRESH = frozenset(
    ("add", "addcmul", "addmm", "bmm", "div", "lerp", "linear", "matmul", "maximum", "mul", "outer", "pow", "reciprocal",
     "rsqrt", "rsub", "sqrt", "square", "sub")
)  # fmt: skip
_PACKAGES = frozenset({"torch", "_operator", "builtins", "math"})


def copy_escaping(gm: fx.GraphModule, inputs: Iterable[fx.Node]) -> list[fx.Node]:
    """Let no input in question reach an output of a graph, nor anything that might keep or change it.

    Args:
        gm: changed in place, with the bodies of its higher-order operators.
        inputs: placeholders of the graph.

    Returns:
        Those that did, here or in a body.
    """
    escaping = []
    changed = False
    for tensor in inputs:
        # A body that several calls share was changed for an earlier one.
        escapes = any(_COPY in user.meta for user in tensor.users)
        leaking = []
        for user in list(tensor.users):
            if _COPY not in user.meta:
                out = _Reach(gm, tensor).follow(user)
                leaking += [user] if out.leaks else []
                escapes |= out.leaks or out.leaks_in_body
        if escapes:
            escaping.append(tensor)
        if leaking:
            _give_copy(gm.graph, tensor, leaking)
            changed = True
    if changed:
        gm.graph.lint()
        gm.recompile()
    return escaping


def _give_copy(graph: fx.Graph, tensor: fx.Node, readers: list[fx.Node]) -> None:
    with graph.inserting_before(_after_inputs(graph)):
        copy = graph.call_method("clone", (tensor,))
    copy.meta[_COPY] = True
    for key, value in tensor.meta.items():
        if key in ("nn_module_stack", "stack_trace"):
            copy.meta[key] = value
        elif key in ("example_value", "val"):
            copy.meta[key] = value.clone()
    for reader in readers:
        reader.replace_input_with(tensor, copy)


def _after_inputs(graph: fx.Graph) -> fx.Node:
    first: fx.Node = next(node for node in graph.nodes if node.op != "placeholder")
    return first


class _Reach:
    """Where an input gets to through values that share its memory.

    Attributes:
        leaks: whether it may be handed out, kept or written to.
        leaks_in_body: whether that was so in the body of a higher-order operator, where a copy is read now.
    """

    def __init__(self, gm: fx.GraphModule, tensor: fx.Node) -> None:
        self.leaks = False
        self.leaks_in_body = False
        self._gm = gm
        self._tensor = tensor

    def follow(self, user: fx.Node) -> _Reach:
        """Follow the input through one of its readers."""
        seen: set[fx.Node] = set()
        stack = [(self._tensor, user)]
        while stack:
            alias, reader = stack.pop()
            if self._takes(alias, reader):
                self.leaks = True
                break
            if reader in seen or _is_other_memory(self._tensor, reader):
                continue
            seen.add(reader)
            stack.extend((reader, further) for further in reader.users)
        return self

    def _takes(self, alias: fx.Node, reader: fx.Node) -> bool:
        """Whether a reader hands a tensor out, writes to it, or may do either. Bodies get copies of their own, and take nothing."""
        if reader.op in ("output", "call_module"):
            return True
        if operators.is_higher_order(reader.target):
            return not self._protected_in_body(alias, reader)
        if reader.op == "call_function" and not _is_operator(reader.target):
            return True
        if names_another_memory(reader):
            return True
        return any(alias is written for argument in written_arguments(reader) for written in nodes_in(argument))

    def _protected_in_body(self, alias: fx.Node, call: fx.Node) -> bool:
        """Whether the body of a higher-order operator is known, and lets an operand no further."""
        if not takes_operands_for_body(call.target) or not isinstance(call.args[0], fx.Node):
            return False
        body = attribute_of(call.args[0])
        operands = call.args[body_operands_start(call.target) :]
        if not isinstance(body, fx.GraphModule):
            return False
        inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
        if len(inputs) != len(operands):
            return False
        aliases = [placeholder for placeholder, operand in zip(inputs, operands) if operand is alias]
        self.leaks_in_body |= bool(copy_escaping(body, aliases))
        return True


def _is_operator(target: object) -> bool:
    """Whether a function is an operator of torch's or dorafx's, and keeps nothing of what it is given."""
    if operators.schemas(target):
        return True
    owner = getattr(target, "__objclass__", target)
    module = getattr(owner, "__module__", None) or type(owner).__module__
    return str(module).partition(".")[0] in _PACKAGES


def _is_other_memory(tensor: fx.Node, reader: fx.Node) -> bool:
    """Whether a reader's result never shares memory with what it reads. Of the norm and constants alone a compiler may find
    that the result *is* the norm (``n * ones``), and return it as it is."""
    if operators.is_higher_order(reader.target):
        return True  # its bodies read copies where they have to
    target: Any = reader.target
    if is_overload(target) and target.namespace == "dorafx":
        return not operators.views(target)
    return canonical_name(reader) in _FRESH and _depends_on_others(reader, tensor)


def _depends_on_others(node: fx.Node, tensor: fx.Node) -> bool:
    """Whether a node's value depends on an input of the graph other than ``tensor``. Sizes do not count, nor does what a value is made
    like (``ones_like``, ``new_full``): it gives the value a shape, dtype and device only."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if is_number(current) or current in seen:
            continue
        if current.op == "placeholder" and current is not tensor:
            return True
        seen.add(current)
        name = canonical_name(current) or ""
        made_like = name.endswith("_like") or name.startswith("new_")
        stack.extend(current.all_input_nodes[1:] if made_like else current.all_input_nodes)
    return False
