"""Operators that go by names which the table does not hold: looked up in torch, or told by how their results lie in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from programs import Layer, S, lora
from same_results import check_everything
from torch.fx.experimental.proxy_tensor import make_fx

import dorafx
from dorafx import rewrite_log
from dorafx.graphs import operators


def transposed(t: torch.Tensor) -> torch.Tensor:
    return t.T


class Reversed(torch.autograd.Function):
    """A view whose gradient is the negative one."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor) -> torch.Tensor:
        return t.t()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return -gradient.t()


def reversed_gradient(t: torch.Tensor) -> torch.Tensor:
    return Reversed.apply(t)  # type: ignore[no-any-return]


def doubled(t: torch.Tensor) -> torch.Tensor:
    t.mul_(2.0)
    return t.t()


for function in (transposed, reversed_gradient, doubled):
    torch.compiler.allow_in_graph(function)

# Ways to transpose a matrix: methods, functions, overloads and packets, properties, and a function of somebody's own.
TRANSPOSES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "T": lambda t: t.T,
    "H": lambda t: t.H,
    "mT": lambda t: t.mT,
    "method": lambda t: t.movedim(0, 1),
    "moveaxis": lambda t: torch.moveaxis(t, -1, 0),
    "keywords": lambda t: torch.movedim(t, source=(0, 1), destination=(1, 0)),
    "packet": lambda t: torch.ops.aten.numpy_T(t),
    "overload": lambda t: torch.ops.aten.matrix_H.default(t),
    "view and back": lambda t: torch.atleast_3d(t).squeeze(-1).T,
    "somebody's own": transposed,
    "strides": lambda t: t.contiguous().as_strided((t.shape[1], t.shape[0]), (1, t.shape[1])),
    "through a third axis": lambda t: t[None].movedim((1, 2), (2, 1)).squeeze(0),
}


def layer(p: Layer, x: torch.Tensor, transpose: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    n = (p.W + S * transpose(p.A.t() @ p.B.t())).norm(dim=1)
    return p.m / n * (F.linear(x, transpose(transpose(p.W))) + S * lora(p, x))


@pytest.fixture
def layer_and_input() -> tuple[Layer, torch.Tensor]:
    return Layer(6, 7, 2), torch.randn(3, 7, dtype=torch.float64)


@pytest.mark.parametrize("codegen", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TRANSPOSES)
def test_a_transpose_under_any_name(name: str, codegen: str, layer_and_input: tuple[Layer, torch.Tensor]) -> None:
    rewrite_log().clear()
    check_everything(lambda p, x: layer(p, x, TRANSPOSES[name]), *layer_and_input, codegen=codegen)
    assert {(r.status, r.pattern) for r in rewrite_log().records} == {("rewritten", "linear")}


def test_transposes_through_inductor(layer_and_input: tuple[Layer, torch.Tensor]) -> None:
    """All of them in one program."""
    p, x = layer_and_input
    rewrite_log().clear()
    check_everything(lambda p, x: tuple(layer(p, x, t) for t in TRANSPOSES.values()), p, x, codegen="inductor")
    assert {r.pattern for r in rewrite_log().rewrites} == {"linear"}


def test_a_part_is_no_view_of_the_whole(layer_and_input: tuple[Layer, torch.Tensor]) -> None:
    """The first rows lie where the whole lies, in the same order, and are fewer."""
    p, x = layer_and_input

    def program(p: Layer, x: torch.Tensor) -> torch.Tensor:
        w, b = torch.narrow(p.W, 0, 0, 4), p.B.narrow(0, 0, 4)
        n = (w + S * (b @ p.A)).norm(dim=1)
        return p.m[:4] / n * (F.linear(x, w) + S * F.linear(F.linear(x, p.A), b))

    check_everything(program, p, x)
    rewrite_log().clear()
    check_everything(
        lambda p, x: p.W.sum(1) / (p.W + S * (p.B @ p.A)).narrow(0, 0, 5).norm(dim=1).sum() + x.sum(), p, x
    )
    assert not rewrite_log().rewrites


@pytest.mark.parametrize("function", [reversed_gradient, doubled])
def test_what_does_more_than_view_stays(function: Any, layer_and_input: tuple[Layer, torch.Tensor]) -> None:
    p, x = layer_and_input
    rewrite_log().clear()
    check_everything(lambda p, x: layer(p, x, lambda t: function(t * 1.0)), p, x)
    assert not rewrite_log().rewrites


class Module(torch.nn.Module):
    def __init__(self, p: Layer) -> None:
        super().__init__()
        for name in ("W", "A", "B", "m"):
            self.register_parameter(name, torch.nn.Parameter(getattr(p, name).detach()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return layer(self, x, lambda t: t.T)  # type: ignore[arg-type]


@pytest.fixture
def without_names() -> Iterator[None]:
    """The table holds no view."""
    by_name, functions = dict(operators._BY_NAME), dict(operators._FUNCTIONS)
    views = ("t", "transpose", "permute", "view", "identity", "detach", "getattr")
    for table in (operators._BY_NAME, operators._FUNCTIONS):
        for name in [n for n, canonical in table.items() if canonical in views and n not in ("clone", "contiguous")]:
            del table[name]
    yield
    operators._BY_NAME.update(by_name)
    operators._FUNCTIONS.update(functions)


@pytest.mark.usefixtures("without_names")
@pytest.mark.parametrize("tracer", ["dynamo", "make_fx", "export"])
def test_views_without_their_names(tracer: str, layer_and_input: tuple[Layer, torch.Tensor]) -> None:
    """As if torch had renamed all of them."""
    p, x = layer_and_input
    rewrite_log().clear()
    if tracer == "dynamo":
        check_everything(lambda p, x: layer(p, x, transposed), p, x)
    else:
        module = Module(p)
        graph: Any
        if tracer == "export":
            graph = dorafx.rewrite(torch.export.export(module, (x,))).module()
        else:
            names = [n for n, _ in module.named_parameters()]

            def functional(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
                return torch.func.functional_call(module, dict(zip(names, values)), (x,))  # type: ignore[no-any-return]

            traced = dorafx.rewrite(make_fx(functional, tracing_mode="fake")(x, *module.parameters()))
            graph = lambda x: traced(x, *module.parameters())  # noqa: E731
        torch.testing.assert_close(graph(x), module(x))
    assert [(r.status, r.pattern) for r in rewrite_log().records] == [("rewritten", "linear")]
