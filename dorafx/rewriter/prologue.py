"""The norm prologue: norms leave the main graph, run before it, and enter it as inputs.

A norm depends on parameters only. Outside of the graph it is computed once where activation checkpointing would compute
it again, and not at all where nothing changed since the last forward (:mod:`dorafx.runtime`). A norm through which
gradients flow stays in the graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dorafx import _compat
from dorafx.lift import tensor_of

__all__ = ["HoistedNorm", "hoist_norms", "norms_inside"]

# What may stand between a parameter and the norm in the prologue: pure, and without gradients of its own there.
_FUNCTIONS = frozenset(
    (
        torch.ops.dorafx.row_norm.default,
        torch.add,
        torch.cat,
        torch.clamp_min,
        torch.div,
        torch.matmul,
        torch.mul,
        torch.nn.functional.linear,
        torch.reciprocal,
        torch.sqrt,
    )
)
_METHODS = frozenset(("detach", "reshape", "t", "to", "unsqueeze"))


@dataclass(frozen=True)
class HoistedNorm:
    """One norm of the prologue.

    Attributes:
        inputs: positions among the main graph's inputs of what it is computed from.
        graph: computes the ``[d_out]`` norm of these inputs.
        signature: equal for norms that are computed in the same way from other inputs.
        value: a fake ``[d_out]`` tensor; None where the graph carries no fake values.
    """

    inputs: tuple[int, ...]
    graph: fx.Graph
    signature: str
    value: torch.Tensor | None


def hoist_norms(gm: fx.GraphModule) -> tuple[HoistedNorm, ...]:
    """Take the norms out of a rewritten graph, and out of the bodies of its checkpointed regions.

    Args:
        gm: changed in place: each norm taken out becomes an input after the others.

    Returns:
        How to compute the new inputs, in their order.
    """
    for call in list(gm.graph.nodes):
        if _compat.takes_operands_for_body(call.target):
            _out_of_body(gm, call)
    norms = [node for node in gm.graph.nodes if _is_norm(node)]
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    position = {node: i for i, node in enumerate(placeholders)}
    last = placeholders[-1] if placeholders else None
    hoisted: list[HoistedNorm] = []
    for norm in norms:
        closure = _closure(norm)
        if closure is None or _needs_gradient(norm) or last is None:
            continue
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(f"norm_{len(hoisted) + 1}")
        _become_input(last, norm)
        hoisted.append(_extracted(norm, closure, position, tensor_of(last)))
        norm.replace_all_uses_with(last)
        _erase_unused(gm.graph, norm)
    if hoisted:
        gm.graph.lint()
        gm.recompile()
    return tuple(hoisted)


def norms_inside(gm: fx.GraphModule) -> list[fx.Node]:
    """The norms that a graph and the graphs inside it compute themselves."""
    return [
        node
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if _is_norm(node)
    ]


def _is_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.dorafx.row_norm.default


def _closure(node: fx.Node) -> list[fx.Node] | None:
    """The nodes from the graph's inputs to ``node``, in their order; None if one of them cannot leave the graph."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        current = stack.pop()
        if current in found:
            continue
        if current.op == "placeholder":
            if tensor_of(current) is None:
                return None
        elif not _may_leave(current):
            return None
        found[current] = None
        stack.extend(current.all_input_nodes)
    return sorted(found)


def _may_leave(node: fx.Node) -> bool:
    if node.op == "call_function":
        return node.target in _FUNCTIONS
    return node.op == "call_method" and node.target in _METHODS


def _needs_gradient(norm: fx.Node) -> bool:
    """Whether somebody may ask for the gradient of the norm: it has one, and not every user detaches it."""
    value = tensor_of(norm)
    if value is None or not value.requires_grad:
        return False
    return any(not (user.op == "call_method" and user.target == "detach") for user in norm.users)


def _extracted(
    norm: fx.Node, closure: list[fx.Node], position: dict[fx.Node, int], value: torch.Tensor | None
) -> HoistedNorm:
    graph = fx.Graph()
    inputs = [node for node in closure if node.op == "placeholder"]
    copies = {node: graph.placeholder(f"input_{i}") for i, node in enumerate(inputs)}
    for node in closure:
        if node not in copies:
            # Made anew, not copied: names then come from the operators, and equal computations have equal text.
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            copies[node] = graph.create_node(node.op, node.target, args, kwargs)
    graph.output(copies[norm])
    return HoistedNorm(tuple(position[node] for node in inputs), graph, str(graph), value)


def _become_input(placeholder: fx.Node, norm: fx.Node) -> None:
    """Give a new input what Dynamo gives its own: a fake value without gradient, and a source (there is none)."""
    for slot in ("example_value", "val"):
        if slot in norm.meta:
            value = norm.meta[slot]
            placeholder.meta[slot] = value.detach() if value.requires_grad else value
    for key in ("nn_module_stack", "stack_trace"):
        if key in norm.meta:
            placeholder.meta[key] = norm.meta[key]
    _compat.mark_new_input(placeholder)


def _erase_unused(graph: fx.Graph, root: fx.Node) -> None:
    stack = [root]
    while stack:
        node = stack.pop()
        if node.users or node.op == "placeholder":
            continue
        inputs = node.all_input_nodes
        graph.erase_node(node)
        stack.extend(n for n in dict.fromkeys(inputs) if n not in stack)


# -- bodies of higher-order operators ---------------------------------------------------------------------------------


def _calls_of(gm: fx.GraphModule, reference: fx.Node) -> int:
    return sum(len(n.users) for n in gm.graph.nodes if n.op == "get_attr" and n.target == reference.target)


def _out_of_body(gm: fx.GraphModule, call: fx.Node) -> None:
    """Compute the norms of a body before the operator that runs it, and hand them in as additional operands, so that
    recomputation in the backward does not compute them again."""
    reference = call.args[0]
    if not isinstance(reference, fx.Node):
        return
    body = getattr(gm, str(reference.target), None)
    if not isinstance(body, fx.GraphModule) or _calls_of(gm, reference) != 1:
        return  # a body that several calls share needs the operand from each of them: its norms stay inside
    for nested in list(body.graph.nodes):
        if _compat.takes_operands_for_body(nested.target):
            _out_of_body(body, nested)
    operands = call.args[_compat.body_operands_start(call.target) :]
    placeholders = [node for node in body.graph.nodes if node.op == "placeholder"]
    if len(operands) != len(placeholders) or not placeholders:
        return
    outside: dict[fx.Node, Any] = dict(zip(placeholders, operands))
    last, changed = placeholders[-1], False
    for norm in [node for node in body.graph.nodes if _is_norm(node)]:
        closure = _closure(norm)
        if closure is None or _needs_gradient(norm):
            continue
        if not all(isinstance(outside.get(n), fx.Node) for n in closure if n.op == "placeholder"):
            continue
        moved = {n: outside[n] for n in closure if n.op == "placeholder"}
        with gm.graph.inserting_before(call):
            for node in closure:
                if node not in moved:
                    moved[node] = gm.graph.node_copy(node, moved.__getitem__)
        with body.graph.inserting_after(last):
            last = body.graph.placeholder(f"norm_{norm.name}")
        _become_input(last, norm)
        # The body reads it without gradient; so does whoever hands it in.
        with gm.graph.inserting_before(call):
            operand = gm.graph.call_method("detach", (moved[norm],))
        operand.meta.update(last.meta)
        call.args = (*call.args, operand)
        norm.replace_all_uses_with(last)
        _erase_unused(body.graph, norm)
        changed = True
    if changed:
        body.graph.lint()
        body.recompile()
