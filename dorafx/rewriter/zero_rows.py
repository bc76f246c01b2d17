"""The option ``zero_rows="finite"``: a quotient with a norm of zero is 0.

A row of ``W + s·B·A`` that is zero has no direction, and ``m / 0`` makes it NaN or infinite, which the backward carries into every
factor. With a norm of infinity in place of zero the scaling ``g = m / n`` is 0: the row gives 0 and the bias, and the gradients of
its magnitude, of its row of B and by way of a differentiable norm are 0. Other rows keep every bit.

This is done where the rewritten graph divides, not where norms are computed: only there is the norm in the dtype in which the
program divides by it (a norm of ``1e-8`` is 0 in fp16), and a norm that the program returns or guards by itself stays what it is.
Norms are followed into and out of checkpointed regions and the branches of ``torch.cond``. Where one goes anywhere else, the outcome
says so.

A root between the norm and the quotient has an infinite derivative at zero, which would make NaN of the quotient's gradient of 0. Such
a root is computed of 1 where its operand is zero, and set to zero there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from dorafx._compat.operators import body_operands_start, is_cond, is_higher_order, takes_operands_for_body
from dorafx._compat.tensors import fake_mode_of
from dorafx.graphs.provenance import operator_name, source_of
from dorafx.graphs.tensors import tensor_of
from dorafx.graphs.writes import attribute_of, nodes_in

from .closures import NORMS
from .fake_values import FakeValues
from .hoist import KEY, NORM_INPUT, NormKey
from .nodes import gradients_as_of, tensor_method
from .zero_flow import Outputs, Reached, divisor_of, is_part, is_root, keys_of, only_looks, replace_divisor, zeros_kept


@dataclass
class ZeroRows:
    """What became of the norms of a graph.

    Attributes:
        divisions: how many divisions are guarded.
        guarded: norms by which some division is guarded.
        elsewhere: norm -> the first place that takes it as it is, zeros included.
    """

    divisions: int = 0
    guarded: set[NormKey] = field(default_factory=set)
    elsewhere: dict[NormKey, str] = field(default_factory=dict)

    def decision(self, norm: NormKey) -> str:
        """What the record of a norm says."""
        place = self.elsewhere.get(norm)
        if norm not in self.guarded:
            text = "no division by this norm was found that could be guarded; where the norm is 0 a row is what the program makes of it"
            return f'zero_rows="finite": {text}' + (f"; the norm goes to {place}" if place else "")
        text = "what is divided by this norm is 0 where the norm is 0"
        return f'zero_rows="finite": {text}' + (f", except by way of {place}, which takes it as it is" if place else "")


def guard_zero_norms(gm: fx.GraphModule) -> ZeroRows:
    """Make every division by a norm that dorafx computes one by infinity where the norm is zero, also in the bodies of higher-order
    operators.

    Args:
        gm: a rewritten graph, before or after its norms were hoisted; changed in place.

    Returns:
        What is guarded, and what is not.
    """
    guard = _Guard(gm)
    guard.leaves(guard.graph(gm, {}), "the outputs of the graph")
    return guard.outcome


class _Guard:
    def __init__(self, root: fx.GraphModule) -> None:
        self.outcome = ZeroRows()
        self._fake_values = FakeValues()
        self._done: dict[fx.GraphModule, Any] = {}
        self._calls: Counter[fx.GraphModule] = Counter()
        for module in root.modules():
            for node in module.graph.nodes if isinstance(module, fx.GraphModule) else ():
                if node.op == "get_attr" and isinstance(body := attribute_of(node), fx.GraphModule):
                    self._calls[body] += len(node.users)

    def graph(self, gm: fx.GraphModule, inputs: dict[fx.Node, Reached]) -> Any:
        """Guard one graph and its bodies.

        Args:
            gm: changed in place, once.
            inputs: placeholders that are zero exactly where norms are, besides those that are norms.

        Returns:
            What its outputs are, in the structure in which it returns them.
        """
        if gm in self._done:
            return self._done[gm]
        reached: dict[fx.Node, Outputs] = dict(inputs)
        outputs: Any = None
        changed = False
        for node in list(gm.graph.nodes):
            if _is_norm(node):
                reached[node] = Reached(frozenset((node.meta.get(KEY, ("", -1)),)))
            elif node.op == "output":
                outputs = _outputs(node.args[0], reached)
            elif node.op == "call_function" and is_higher_order(node.target):
                self._call(node, reached)
            elif (kept := zeros_kept(node, reached)) is not None:
                reached[node] = kept
                if is_root(node) and _may_need_gradient(node):
                    root = self._guarded_root(node)
                    reached[root] = kept
                    changed = True
            else:
                changed |= self._consumer(node, reached)
        if changed:
            gm.graph.lint()
            gm.recompile()
        for body in gm.children():
            if isinstance(body, fx.GraphModule) and body not in self._done:
                self.leaves(self.graph(body, {}), "the outputs of a region")
        self._done[gm] = outputs
        return outputs

    def leaves(self, outputs: Any, place: str) -> None:
        """Note what nobody follows any further."""
        if isinstance(outputs, Reached):
            for key in sorted(outputs.keys):
                self.outcome.elsewhere.setdefault(key, place)
        elif isinstance(outputs, tuple):
            for output in outputs:
                self.leaves(output, place)

    def _consumer(self, node: fx.Node, reached: dict[fx.Node, Outputs]) -> bool:
        """Guard a node's division by a norm; whether it does divide by one."""
        others = [value for value in node.all_input_nodes if value in reached]
        divisor = divisor_of(node) if others else None
        value = reached.get(divisor) if divisor is not None else None
        guarded = divisor is not None and isinstance(value, Reached) and _is_floating(divisor)
        if guarded and divisor is not None:
            others.remove(divisor)
            # Just before the quotient: the program may write to its norm in between.
            with node.graph.inserting_before(node):
                is_zero = self._new(torch.eq, "eq", divisor, divisor, 0)
                infinite = self._new(tensor_method("masked_fill"), "masked_fill", divisor, divisor, is_zero, math.inf)
            replace_divisor(node, divisor, infinite)
            self.outcome.divisions += 1
            self.outcome.guarded |= keys_of(value)
        for other in others:
            if not only_looks(node, other) and not is_part(node, reached[other]):
                self._unguarded(keys_of(reached[other]), node)
        return guarded

    def _unguarded(self, keys: Iterable[NormKey], node: fx.Node) -> None:
        for key in sorted(keys):
            self.outcome.elsewhere.setdefault(key, f"operator {operator_name(node)} at {source_of(node) or node.name}")

    def _call(self, node: fx.Node, reached: dict[fx.Node, Outputs]) -> None:
        """Follow norms into the bodies of a higher-order operator, and out of them."""
        bodies, operands = _bodies(node)
        inputs = [[n for n in body.graph.nodes if n.op == "placeholder"] for body in bodies]
        if not bodies or any(len(names) != len(operands) for names in inputs):
            self._unguarded(keys_of(_keys(reached, node.all_input_nodes)), node)
            for value in node.all_input_nodes:
                if value.op == "get_attr" and isinstance(body := attribute_of(value), fx.GraphModule):
                    self.leaves(self.graph(body, {}), f"operator {operator_name(node)}")
            return
        once = all(self._calls[body] == 1 for body in bodies)
        results = []
        for body, names in zip(bodies, inputs):
            taken: dict[fx.Node, Reached] = {}
            for name, operand in zip(names, operands):
                given = reached.get(operand) if isinstance(operand, fx.Node) else None
                if _is_norm(name) or given is None or not name.users:
                    continue
                if once and isinstance(given, Reached):
                    taken[name] = given
                else:  # another call may give it what is no norm
                    self._unguarded(keys_of(given), node)
            results.append(self.graph(body, taken))
        followed = set(nodes_in(operands))
        self._unguarded(keys_of(_keys(reached, (v for v in node.all_input_nodes if v not in followed))), node)
        outputs = self._merged(results)
        if keys_of(outputs):
            assert outputs is not None
            reached[node] = outputs

    def _merged(self, results: list[Any]) -> Outputs | None:
        """What is a norm in the results of all branches; one that is so only in some of them is followed no further."""
        if all(isinstance(result, Reached) for result in results):
            return Reached(frozenset().union(*map(keys_of, results)), any(result.negative for result in results))
        if all(isinstance(result, tuple) and len(result) == len(results[0]) for result in results):
            parts = [self._merged(list(of_all)) for of_all in zip(*results)]
            self.leaves(tuple(part for part in parts if isinstance(part, tuple)), "a nested result of a region")
            return tuple(part if isinstance(part, Reached) else None for part in parts)
        for result in results:
            self.leaves(result, "a result of torch.cond, which is no norm in the other branch")
        return None

    def _guarded_root(self, node: fx.Node) -> fx.Node:
        """Compute a root of 1 where its operand is zero, and make it zero there. A gradient through it is 0 then."""
        operand: Any = node.all_input_nodes[0]
        masked_fill = tensor_method("masked_fill")
        with node.graph.inserting_before(node):
            is_zero = self._new(torch.eq, "eq", operand, operand, 0)
            safe = self._new(masked_fill, "masked_fill", operand, operand, is_zero, 1.0)
        users = list(node.users)
        node.replace_input_with(operand, safe)
        with node.graph.inserting_after(node):
            root = self._new(masked_fill, "masked_fill", node, node, is_zero, 0.0)
        for user in users:
            user.replace_input_with(node, root)
        return root

    def _new(self, function: Callable[..., Any], name: str, like: fx.Node, *args: Any) -> fx.Node:
        """A node with the provenance of another one, and a fake value."""
        call = like.graph.call_function if function is getattr(torch, name, None) else like.graph.call_method
        node: fx.Node = call(function if call == like.graph.call_function else name, args)  # type: ignore[arg-type]
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in like.meta:
                node.meta[key] = like.meta[key]
        slot = "example_value" if "example_value" in like.meta else "val"
        value = like.meta.get(slot)
        mode = fake_mode_of(value)
        if mode is not None:
            fakes = fx.node.map_arg(node.args, lambda n: n.meta.get(slot))
            with gradients_as_of(value):
                node.meta[slot] = self._fake_values(function, fakes, {}, mode)
        return node


def _is_norm(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return NORM_INPUT in node.meta
    return node.op == "call_function" and node.target in NORMS and KEY in node.meta


def _is_floating(node: fx.Node) -> bool:
    tensor = tensor_of(node)
    return tensor is not None and tensor.dtype.is_floating_point


def _may_need_gradient(node: fx.Node) -> bool:
    """Only Dynamo's own values tell for sure."""
    value = node.meta.get("example_value")
    return not isinstance(value, torch.Tensor) or value.requires_grad


def _bodies(call: fx.Node) -> tuple[list[fx.GraphModule], tuple[Any, ...]]:
    """The graphs that a call runs on the same operands, and the operands; no graph where that is not known."""
    if takes_operands_for_body(call.target):
        attributes, operands = call.args[:1], call.args[body_operands_start(call.target) :]
    elif is_cond(call.target) and len(call.args) == 4 and isinstance(call.args[3], (tuple, list)):
        attributes, operands = call.args[1:3], tuple(call.args[3])
    else:
        return [], ()
    bodies = [attribute_of(node) for node in attributes if isinstance(node, fx.Node) and node.op == "get_attr"]
    known = [body for body in bodies if isinstance(body, fx.GraphModule)]
    return (known, operands) if len(known) == len(attributes) else ([], ())


def _keys(reached: dict[fx.Node, Outputs], nodes: Iterable[fx.Node]) -> Outputs:
    keys = [keys_of(reached.get(node)) for node in nodes]
    return Reached(frozenset().union(*keys))


def _outputs(value: Any, reached: dict[fx.Node, Outputs]) -> Any:
    """What is reached of what a graph returns."""
    if isinstance(value, fx.Node):
        return reached.get(value)
    if isinstance(value, dict):
        value = list(value.values())
    return tuple(_outputs(item, reached) for item in value) if isinstance(value, (tuple, list)) else None
