"""Fake values, and so shapes, for graphs whose nodes have none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from dorafx._compat.hooks import has_forward_hooks
from dorafx._compat.tensors import fake_mode, needs_values
from dorafx.graphs.tensors import tensor_of

from .copying import copy_graph_module


class UnknownShapes(Exception):
    """The shapes of a graph's values cannot be determined."""


def carries_shapes(gm: fx.GraphModule) -> bool:
    """Whether a tracer left values on the graph's nodes; a graph without calls needs none."""
    calls = [n for n in gm.graph.nodes if n.op in ("call_function", "call_method", "call_module")]
    return not calls or any(tensor_of(n) is not None for n in calls)


def with_shapes(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> fx.GraphModule:
    """A copy of the graph whose nodes carry the fake values that the graph computes from these inputs. No real values are computed or
    written, even if the graph writes in place.

    Raises:
        UnknownShapes: an operator cannot be run on fake tensors.
    """
    shaped, _ = copy_graph_module(gm)
    _open_linears(shaped)
    mode = fake_mode()
    with mode:
        inputs = [mode.from_tensor(value) if isinstance(value, torch.Tensor) else value for value in example_inputs]
        _Propagation(shaped, mode).run(*inputs)
    return shaped


def of_mode(value: Any, mode: Any) -> Any:
    """A fake value as one of another mode, which the caller has entered: ``make_fx`` of real tensors creates a mode for each value."""
    if not isinstance(value, torch.Tensor) or getattr(value, "fake_mode", mode) is mode:
        return value
    twin = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return twin.requires_grad_(value.requires_grad)


class _Propagation(fx.Interpreter):
    """Runs a graph on fake tensors, with fake copies of its parameters."""

    def __init__(self, gm: fx.GraphModule, mode: Any) -> None:
        super().__init__(gm)
        self._mode = mode
        self._twins: dict[int, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        try:
            result = super().run_node(n)
        except Exception as error:
            if not needs_values(error):
                raise
            raise UnknownShapes(
                f"the shapes behind {n.name} ({n.format_node()}) are unknown, since it cannot be run on fake tensors: capture the "
                "program with Dynamo or torch.export, or write it without the value of a tensor"
            ) from error
        if isinstance(result, (torch.Tensor, int)):  # an int is a size; a norm that is computed from a mean needs it
            n.meta["val"] = result
        return result

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return self._twin(value) if isinstance(value, torch.Tensor) else value

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        twins = {name: self._twin(value) for name, value in state.items()}
        return torch.func.functional_call(module, twins, args, kwargs)

    def _twin(self, value: torch.Tensor) -> torch.Tensor:
        if id(value) not in self._twins:
            self._twins[id(value)] = self._mode.from_tensor(value)
        return self._twins[id(value)]


def _open_linears(gm: fx.GraphModule) -> None:
    """Replace calls of plain ``nn.Linear`` modules, which ``fx.symbolic_trace`` leaves as they are, by ``F.linear``."""
    for node in list(gm.graph.nodes):
        module = gm.get_submodule(str(node.target)) if node.op == "call_module" else None
        if type(module) is not nn.Linear or has_forward_hooks(module) or node.kwargs:
            continue
        with gm.graph.inserting_before(node):
            weight = gm.graph.get_attr(f"{node.target}.weight")
            bias = gm.graph.get_attr(f"{node.target}.bias") if module.bias is not None else None
            linear = gm.graph.call_function(F.linear, (node.args[0], weight, bias))
        linear.meta = dict(node.meta)
        node.replace_all_uses_with(linear)
        gm.graph.erase_node(node)
    gm.recompile()


def sizes_of(shape: Iterable[Any]) -> tuple[str, ...]:
    """Sizes that can be compared without a guard on symbolic ones."""
    return tuple(map(str, shape))
