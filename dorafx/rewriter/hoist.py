"""The norm prologue: norms leave the main graph, run before it, and enter it as inputs.

A norm depends on parameters only. Outside of the graph it is computed once where activation checkpointing would compute
it again, and not at all where nothing changed since the last forward (:mod:`dorafx.runtime`). A norm through which
gradients flow stays in the graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from dorafx._compat.graphs import mark_new_input
from dorafx._compat.operators import body_operands_start, takes_operands_for_body
from dorafx.graphs.provenance import site_of
from dorafx.graphs.tensors import tensor_of
from dorafx.graphs.writes import written_nodes

from .closures import NORMS, closure_of, is_number, waits_for_device
from .escapes import copy_escaping
from .placements import is_redistribution

# On the node of a quantised weight's norm: name of the original graph's node that holds the weight as it multiplies.
DENSE = "dorafx_dense"

# On the node that ends a norm: the number of the norm's atom.
NORM = "dorafx_norm"

# On a norm's node, and on the input that it becomes: its NormKey.
KEY = "dorafx_norm_key"

NormKey = tuple[str, int]
"""A norm of a graph: the name of the body that it is in (empty for the outermost graph), and the number of its atom there."""

# On an input of a graph or body: it is a norm that has left it.
NORM_INPUT = "dorafx_norm_input"

# On a norm's node: why it cannot leave the graph.
_KEPT = "dorafx_kept"


@dataclass(frozen=True)
class HoistedNorm:
    """One norm of the prologue.

    Attributes:
        inputs: positions among the main graph's inputs of the tensors that it is computed from. One from which the graph reads a
            number may be among them, where it lies on an accelerator.
        scalars: the same of numbers: what Dynamo makes inputs of where shapes are dynamic, as a float or as a tensor of one
            element in the host's memory that the graph reads.
        graph: computes the ``[d_out]`` norm of the tensors and, after them, the numbers.
        signature: equal for norms that are computed in the same way from other inputs.
        value: a fake ``[d_out]`` tensor; None where the graph carries no fake values.
        escapes: whether the graph may hand it out, so that it must be given what nobody else has.
        magnitude: position among the main graph's inputs of the vector that is divided by the norm; None where no input is.
        site: name of the module that it is the norm of, as far as the graph knows it.
    """

    inputs: tuple[int, ...]
    scalars: tuple[int, ...]
    graph: fx.Graph
    signature: str
    value: torch.Tensor | None
    escapes: bool = False
    magnitude: int | None = None
    site: str = ""


def hoist_norms(gm: fx.GraphModule) -> tuple[HoistedNorm, ...]:
    """Take the norms out of a rewritten graph, and out of the bodies of its checkpointed regions.

    Args:
        gm: changed in place: each norm taken out becomes an input after the others, of which nothing that could reach an
            output reads more than a copy.

    Returns:
        How to compute the new inputs, in their order.
    """
    _out_of_bodies(gm)
    norms = [node for node in gm.graph.nodes if _is_norm(node)]
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    position = {node: i for i, node in enumerate(placeholders)}
    last = placeholders[-1] if placeholders else None
    written = written_nodes(gm.graph)
    hoisted: list[HoistedNorm] = []
    entered: list[fx.Node] = []
    for norm in norms:
        closure = _leaving(norm, written)
        if closure is None or last is None:
            continue
        with gm.graph.inserting_after(last):
            last = _new_placeholder(gm.graph, "outer_norm")
        read = _reduced(norm)
        _become_input(last, read, norm)
        entered.append(last)
        hoisted.append(_extracted(norm, closure, position, tensor_of(last)))
        read.replace_all_uses_with(last)
        _erase_unused(gm.graph, read)
    if hoisted:
        escaping = copy_escaping(gm, entered)
        hoisted = [
            replace(norm, escapes=node in escaping, magnitude=_magnitude(node, position))
            for norm, node in zip(hoisted, entered)
        ]
        gm.graph.lint()
        gm.recompile()
    return tuple(hoisted)


def norms_inside(gm: fx.GraphModule) -> dict[NormKey, str]:
    """The norms that a graph and the graphs inside it compute themselves, each with the operator that keeps it there;
    empty where gradients flow through the norm, or nobody tried to take it out."""
    return {
        node.meta[KEY]: node.meta.get(_KEPT, "")
        for module in gm.modules()
        if isinstance(module, fx.GraphModule)
        for node in module.graph.nodes
        if _is_norm(node) and KEY in node.meta
    }


def _is_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in NORMS


def _reduced(norm: fx.Node) -> fx.Node:
    """The norm as the graph reads it: whole, where its operator gives one that is still to be reduced over devices."""
    users = list(norm.users)
    return users[0] if len(users) == 1 and is_redistribution(users[0]) else norm


def _leaving(norm: fx.Node, written: frozenset[fx.Node]) -> list[fx.Node] | None:
    """The nodes that leave the graph with a norm; None where it stays, with the reason on its node."""
    if _needs_gradient(norm):
        return None
    closure = closure_of(norm, written)
    if isinstance(closure, str):
        norm.meta[_KEPT] = closure
        return None
    return closure


def _needs_gradient(norm: fx.Node) -> bool:
    """Whether somebody may ask for the gradient of the norm: it has one, and not every user detaches it."""
    value = tensor_of(norm)
    if value is None or not value.requires_grad:
        return False
    return not _is_detached(_reduced(norm))


def _is_detached(node: fx.Node) -> bool:
    """Whether every user of a value detaches it, perhaps in another shape or dtype."""

    def detaches(user: fx.Node) -> bool:
        if user.op != "call_method" or user.target not in ("detach", "reshape", "to"):
            return False
        return user.target == "detach" or (bool(user.users) and _is_detached(user))

    return all(map(detaches, node.users))


def _extracted(
    norm: fx.Node, closure: list[fx.Node], position: dict[fx.Node, int], value: torch.Tensor | None
) -> HoistedNorm:
    graph = fx.Graph()
    read = {node: node.all_input_nodes[0] for node in closure if node.target == "item" and not waits_for_device(node)}
    numbers = {node: node for node in closure if node.op == "placeholder" and is_number(node)} | read
    used = {a for node in closure if node not in read for a in node.all_input_nodes}
    inputs = [node for node in closure if node.op == "placeholder" and node not in numbers and node in used]
    copies = {node: graph.placeholder(f"input_{i}") for i, node in enumerate([*inputs, *numbers])}
    for node in closure:
        if node in read.values():
            continue
        if node not in copies:
            # Created, not copied: names then come from the operators, and equal computations have equal text.
            args, kwargs = fx.map_arg((node.args, node.kwargs), copies.__getitem__)
            if node.target == "item":  # as precise as the number, and without axes it decides no dtype either
                copies[node] = graph.call_method("double", (graph.call_method("reshape", (*args, ())),))
                continue
            copies[node] = graph.create_node(node.op, node.target, args, kwargs)
    graph.output(copies[norm])
    tensors, scalars = (tuple(position[node] for node in group) for group in (inputs, numbers.values()))
    return HoistedNorm(tensors, scalars, graph, str(graph), value, site=site_of(norm))


def _magnitude(norm: fx.Node, position: dict[fx.Node, int]) -> int | None:
    """The input that is divided by a norm, perhaps in another dtype or shape."""
    for user in norm.users:
        if user.target is torch.div and len(user.args) == 2 and user.args[1] is norm:
            divided = user.args[0]
            while (
                isinstance(divided, fx.Node)
                and divided.op == "call_method"
                and divided.target in ("to", "reshape", "view")
            ):
                divided = divided.args[0]
            if isinstance(divided, fx.Node) and divided in position:
                return position[divided]
    return None


def _new_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A placeholder whose argument has the name of its node. The user's variables may have any name, this one's included: with
    different names, generated code could assign one argument to another's name before it reads that one."""
    node = graph.placeholder(name)
    node.target = node.name
    return node


def _become_input(placeholder: fx.Node, read: fx.Node, norm: fx.Node) -> None:
    """Give a new input what Dynamo gives its own: a fake value without gradient, and a source (there is none).

    Args:
        placeholder: the new input.
        read: what the graph read of the norm, in whose place it is.
        norm: the norm.
    """
    for slot in ("example_value", "val"):
        if slot in read.meta:
            value = read.meta[slot]
            placeholder.meta[slot] = value.detach() if value.requires_grad else value
    for key in ("nn_module_stack", "stack_trace"):
        if key in read.meta:
            placeholder.meta[key] = read.meta[key]
    if KEY in norm.meta:
        placeholder.meta[KEY] = norm.meta[KEY]
    placeholder.meta[NORM_INPUT] = True
    mark_new_input(placeholder)


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


def _calls_of_bodies(gm: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, list[fx.Node]]]:
    """Each body and the calls that run it, where all of them take further operands."""
    users: dict[str, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            users.setdefault(str(node.target), []).extend(node.users)
    for name, calls in users.items():
        body = getattr(gm, name, None)
        if calls and isinstance(body, fx.GraphModule) and all(takes_operands_for_body(c.target) for c in calls):
            yield body, calls


def _out_of_bodies(gm: fx.GraphModule) -> None:
    """Compute the norms of bodies before the operators that run them, and hand them in as additional operands, so that
    recomputation in the backward does not compute them again."""
    for body, calls in _calls_of_bodies(gm):
        _out_of_bodies(body)
        inputs = [node for node in body.graph.nodes if node.op == "placeholder"]
        operands = [call.args[body_operands_start(call.target) :] for call in calls]
        if not inputs or any(len(o) != len(inputs) for o in operands):
            continue
        outside = [dict(zip(inputs, o)) for o in operands]
        norms = [node for node in body.graph.nodes if _is_norm(node)]
        written = written_nodes(body.graph)
        moved = [norm for norm in norms if _out_of_body(gm, body, norm, calls, outside, written)]
        if moved:
            body.graph.lint()
            body.recompile()


def _out_of_body(
    gm: fx.GraphModule,
    body: fx.GraphModule,
    norm: fx.Node,
    calls: list[fx.Node],
    outside: list[dict[fx.Node, Any]],
    written: frozenset[fx.Node],
) -> bool:
    closure = _leaving(norm, written)
    if closure is None:
        return False
    leaves = [node for node in closure if node.op == "placeholder"]
    if not all(isinstance(of_call.get(leaf), fx.Node) for of_call in outside for leaf in leaves):
        norm.meta[_KEPT] = "an operand of the region around it is no node"
        return False
    last = [node for node in body.graph.nodes if node.op == "placeholder"][-1]
    read = _reduced(norm)
    with body.graph.inserting_after(last):
        new_input = _new_placeholder(body.graph, "outer_norm")
    _become_input(new_input, read, norm)
    for call, of_call in zip(calls, outside):
        copies = {leaf: of_call[leaf] for leaf in leaves}
        with gm.graph.inserting_before(call):
            for node in closure if read is norm else (*closure, read):
                if node not in copies:
                    copies[node] = gm.graph.node_copy(node, copies.__getitem__)
            # The body reads it without gradient, so what is handed in has none.
            operand = gm.graph.call_method("detach", (copies[read],))
        operand.meta.update(new_input.meta)
        call.args = (*call.args, operand)
    read.replace_all_uses_with(new_input)
    _erase_unused(body.graph, read)
    return True
