"""A forward that records gradients drops what was kept of its parameters, whatever its graph does with norms.

No samples are taken here, as on a GPU: the optimizer of these tests writes where nobody sees it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from integration_support import assert_close
from layer_support import Layer, compiled, one_row, rows
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import dorafx
from dorafx import rewrite_log
from dorafx.runtime import watch


@pytest.fixture(autouse=True)
def _no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "is_read", lambda tensor: False)


def unseen_step(parameters: Iterable[nn.Parameter]) -> None:
    for p in parameters:
        if p.grad is not None:
            p.data.add_(p.grad, alpha=-0.1)
            p.grad = None


def check(decode: Callable[..., Any], train: Callable[..., Any], layer: nn.Module, x: torch.Tensor) -> None:
    """Decode, a step, decode; twice."""
    for _ in range(2):
        with torch.no_grad():
            assert_close(decode(one_row()), layer(one_row()), 1e-12)
            before = rewrite_log().norms.reused
            assert_close(decode(one_row()), layer(one_row()), 1e-12)
            assert rewrite_log().norms.reused > before
        train(x).sin().sum().backward()
        unseen_step(layer.parameters())


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_a_differentiable_norm_stays_in_the_graph(codegen: str) -> None:
    layer = Layer(differentiable=True)
    call = compiled(layer, codegen)
    check(call, call, layer, one_row())
    assert rewrite_log().norms.invalidated["a forward recorded gradients"] >= 1


def test_another_graph_without_any_norm() -> None:
    """A loss of the factors alone, in a graph where nothing is rewritten."""
    layer = Layer()
    call = compiled(layer)
    penalty = torch.compile(
        lambda x: layer.a @ layer.b * x.mean(), backend="dorafx", options={"dorafx.codegen": "eager"}
    )
    check(call, penalty, layer, one_row())


def test_another_layer_with_a_tied_factor() -> None:
    layer, other = Layer(), Layer(differentiable=True)
    other.a = layer.a
    call = compiled(layer)
    train = torch.compile(other, backend="dorafx", options={"dorafx.codegen": "eager"})
    check(call, train, layer, rows())


def test_graphs_of_other_options() -> None:
    """One compiled for training, which never reuses, and one for decoding."""
    layer = Layer(differentiable=True)
    call = compiled(layer)
    train = torch.compile(layer, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.norm_reuse": "never"})
    check(call, train, layer, one_row())


def test_partially_frozen() -> None:
    """One norm leaves the graph, another stays."""
    model = nn.Sequential(Layer(), Layer(differentiable=True))
    for p in model[0].parameters():
        p.requires_grad_(False)
    call = compiled(model)
    check(call, call, model, rows())


def test_gradients_switched_on_inside() -> None:
    layer = Layer(differentiable=True)

    def train(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return layer(x).sin()

    call = compiled(layer)
    trained = torch.compile(train, backend="dorafx", options={"dorafx.codegen": "eager"})

    def outside(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return trained(x)

    check(call, outside, layer, one_row())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_recomputation(use_reentrant: bool) -> None:
    layer = Layer(differentiable=True)
    call = compiled(layer)

    def train(x: torch.Tensor) -> Any:
        return checkpoint(call, x.clone().requires_grad_(), use_reentrant=use_reentrant)

    check(call, train, layer, one_row())


@pytest.mark.parametrize("scopes", [("modules", "model"), ("model", "modules")], ids="-".join)
def test_scopes(scopes: tuple[str, str]) -> None:
    """Trained through one graph of a model, decoded through another."""
    from integration_support import peft_perceptron
    from reuse_support import one_token

    model = peft_perceptron()
    stock = copy.deepcopy(model)

    def decode() -> None:
        stock.load_state_dict(model.state_dict())
        dorafx.optimize(model, scope=scopes[0], codegen="eager", strict=True)
        with torch.no_grad():
            for _ in range(2):
                assert_close(model(one_token()), stock(one_token()), 1e-5)
        dorafx.restore(model)

    for _ in range(2):
        decode()
        dorafx.optimize(model, scope=scopes[1], codegen="eager", strict=True)
        model(one_token(3)).sin().sum().backward()
        dorafx.restore(model)
        unseen_step(model.parameters())
    decode()


def test_other_parameters_keep_their_norms() -> None:
    kept, trained = Layer(), Layer()
    call = compiled(kept)
    train = torch.compile(trained, backend="dorafx", options={"dorafx.codegen": "eager"})
    with torch.no_grad():
        call(one_row())
    train(rows()).sum().backward()
    F.linear(one_row(), kept.w)
    with torch.no_grad():
        before = rewrite_log().norms.reused
        call(one_row())
        assert rewrite_log().norms.reused == before + 1


class Unseen(torch.optim.Optimizer):
    """Writes through ``data``: no version tells."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        unseen_step(p for group in self.param_groups for p in group["params"])


def test_an_optimizer_steps_without_a_forward_of_ours() -> None:
    """Gradients that came by another way, as from a stock model or another process."""
    layer = Layer()
    call, optimizer = compiled(layer), Unseen(layer.parameters())
    for _ in range(3):
        with torch.no_grad():
            for _ in range(2):
                assert_close(call(one_row()), layer(one_row()), 1e-12)
        for p in layer.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
    assert rewrite_log().norms.reused and rewrite_log().norms.invalidated["the optimizer stepped"] == 2
