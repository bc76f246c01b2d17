"""Which writes a graph can do without, and what its nodes carry then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from dorafx.graphs.copying import copy_graph_module
from dorafx.graphs.functional import has_writes, without_private_writes
from dorafx.graphs.grad_mode import GradMode
from dorafx.graphs.operators import canonical_name
from dorafx.graphs.writes import written_arguments

W = torch.randn(4, 4, requires_grad=True)


def graph_of(program: Callable[..., Any], *inputs: torch.Tensor) -> fx.GraphModule:
    """The graph that Dynamo captures, and nobody else needs."""
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        found.append(copy_graph_module(gm)[0])
        return gm

    torch._dynamo.reset()
    torch.compile(program, backend=keep, fullgraph=True, dynamic=False)(*inputs)
    return found[0]


def writes_of(gm: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in gm.graph.nodes if any(True for _ in written_arguments(node))]


def test_nodes_carry_what_they_were_at_their_place() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        y = x[:, :3] * 2.0
        y.t_()
        y.unsqueeze_(0)
        y += W[:3]
        return y.detach_()

    gm = graph_of(program, torch.randn(4, 4))
    assert has_writes(gm.graph) and without_private_writes(gm.graph) and writes_of(gm) == []
    values = {n.name: n.meta["example_value"] for n in gm.graph.nodes if n.op in ("call_function", "call_method")}
    shapes = [tuple(v.shape) for v in values.values()][1:]
    assert (4, 3) in shapes and (3, 4) in shapes and shapes[-1] == (1, 3, 4)
    product = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.mul.Tensor or canonical_name(n) == "mul")
    assert tuple(product.meta["example_value"].shape) == (4, 3) and not product.meta["example_value"].requires_grad
    added = next(n for n in gm.graph.nodes if canonical_name(n) == "add")
    assert added.meta["example_value"].requires_grad and not [*values.values()][-1].requires_grad


def read_through_a_view(x: torch.Tensor) -> Any:
    y = x @ W
    view = y[0]
    y.mul_(2.0)
    return y, view


def written_in_part(x: torch.Tensor) -> Any:
    y = x @ W
    y[0].mul_(2.0)
    return y


def overlapping_operand(x: torch.Tensor) -> Any:
    y = x @ W
    y[:2].add_(y[2:])
    return y


def input_written(x: torch.Tensor) -> Any:
    x.mul_(2.0)
    return x @ W


def parts_read_late(x: torch.Tensor) -> Any:
    y = (x @ W).detach() * 1.0
    first, second = y.unbind(0)[:2]
    y.mul_(2.0)
    return first + second


@pytest.mark.parametrize(
    "program", [read_through_a_view, written_in_part, overlapping_operand, input_written, parts_read_late]
)
def test_writes_that_somebody_sees_stay(program: Callable[..., Any]) -> None:
    gm = graph_of(program, torch.randn(4, 4))
    before = writes_of(gm)
    assert before and not without_private_writes(gm.graph) and writes_of(gm) == before


def test_a_tensor_that_is_detached_later_may_have_had_a_gradient() -> None:
    def program(x: torch.Tensor) -> Any:
        y = (x @ W).sin()
        y.detach_()
        return y, y[0].exp_()

    gm = graph_of(program, torch.randn(4, 4))
    sine = next(node for node in gm.graph.nodes if "sin" in str(node.target))
    assert not sine.meta["example_value"].requires_grad
    assert without_private_writes(gm.graph) and sine.meta["example_value"].requires_grad


@pytest.mark.parametrize("outer", [torch.no_grad, torch.enable_grad, torch.inference_mode])
@pytest.mark.parametrize("inner", [True, False, "enabled", "disabled"])
def test_modes_of_gradients(outer: Any, inner: Any) -> None:
    """A graph's switches mean what they mean to autograd."""
    w = W.detach().requires_grad_()

    def switched() -> Any:
        if isinstance(inner, bool):
            return torch.inference_mode(inner)
        return torch.set_grad_enabled(inner == "enabled")

    with outer(), switched():
        expected = (torch.ones(4, 4) * 2 if torch.is_inference_mode_enabled() else w * 2).requires_grad
    graph = fx.Graph()
    mode = GradMode(graph)
    if outer is torch.inference_mode:
        mode.follow(
            graph.call_function(torch.autograd.grad_mode._enter_inference_mode, (True,)), "enter_inference_mode"
        )
    else:
        mode.follow(graph.call_function(torch._C._set_grad_enabled, (outer is torch.enable_grad,)), "set_grad_enabled")
    if isinstance(inner, bool):
        mode.follow(graph.call_function(print, (inner,)), "enter_inference_mode")
    else:
        mode.follow(graph.call_function(print, (inner == "enabled",)), "set_grad_enabled")
    assert mode.records == expected
    if isinstance(inner, bool):
        mode.follow(graph.call_function(print, ()), "exit_inference_mode")
        assert mode.records == (outer is torch.enable_grad)
