"""Hooks registered (and removed) after the first compiled call run as they do in the stock model."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import assert_close, peft_perceptron
from torch import nn

import dorafx

Register = Callable[[nn.Module, Callable[..., None]], Any]


def _scaled(see: Callable[..., None]) -> Callable[..., torch.Tensor]:
    def hook(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        see(output)
        return output * 2

    return hook


def _scaled_with_kwargs(see: Callable[..., None]) -> Callable[..., torch.Tensor]:
    def hook(module: nn.Module, args: Any, kwargs: Any, output: torch.Tensor) -> torch.Tensor:
        see(args[0])
        return output + 1

    return hook


def _pre(see: Callable[..., None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any) -> Any:
        see(args[0])
        return (args[0] * 2,)

    return hook


HOOKS: dict[str, Register] = {
    "forward": lambda m, see: m.register_forward_hook(_scaled(see)),
    "prepended": lambda m, see: m.register_forward_hook(_scaled(see), prepend=True),
    "with kwargs": lambda m, see: m.register_forward_hook(_scaled_with_kwargs(see), with_kwargs=True),
    "always called": lambda m, see: m.register_forward_hook(_scaled(see), always_call=True),
    "forward pre": lambda m, see: m.register_forward_pre_hook(_pre(see)),
    "backward": lambda m, see: m.register_full_backward_hook(lambda m, gi, go: see(go[0])),
    "backward pre": lambda m, see: m.register_full_backward_pre_hook(lambda m, go: see(go[0])),
    "global": lambda m, see: nn.modules.module.register_module_forward_hook(
        lambda module, args, output: see(output) if module is m else None
    ),
}
LAYER = "base_model.model.first"
PLACES = {
    "layer": LAYER,
    "lora_A": f"{LAYER}.lora_A.default",
    "base_layer": f"{LAYER}.base_layer",
}


def _check(how: str, hook: str, place: str, codegen: str) -> None:
    stock = peft_perceptron().train()
    model = copy.deepcopy(stock)
    compiled = model
    if how == "backend":
        compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": codegen})
    else:
        dorafx.optimize(model, codegen=codegen, scope=how)
    x = torch.randn(3, 24)
    runs: list[tuple[Any, Any, list[torch.Tensor]]] = [(stock, stock, []), (model, compiled, [])]

    def compare(what: str) -> None:
        outputs, gradients = [], []
        for owner, function, _ in runs:
            owner.zero_grad()
            y = function(x)
            y.sin().sum().backward()
            outputs.append(y)
            gradients.append([p.grad for p in owner.parameters() if p.grad is not None])
        assert_close(outputs[1], outputs[0], 1e-5, what)
        for ours, theirs in zip(gradients[1], gradients[0], strict=True):
            assert_close(ours, theirs, 1e-4, what)
        (_, _, wanted), (_, _, seen) = runs
        assert len(seen) == len(wanted), what
        for ours, theirs in zip(seen, wanted, strict=True):
            assert_close(ours, theirs, 1e-4, what)

    compare("before")
    compare("again")
    handles = [
        HOOKS[hook](owner.get_submodule(PLACES[place]), lambda t, seen=seen: seen.append(t.detach().clone()))
        for owner, _, seen in runs
    ]
    try:
        compare("with the hook")
        compare("with the hook, again")
        assert runs[0][2], "the hook never ran"
    finally:
        for handle in handles:
            handle.remove()
    compare("without it")
    dorafx.restore(model)
    compare("restored")


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("how", ["modules", "model"])
def test_late_hook_of_a_layer(how: str, hook: str) -> None:
    _check(how, hook, "layer", "eager")


@pytest.mark.parametrize("place", ["lora_A", "base_layer"])
@pytest.mark.parametrize("how", ["modules", "backend"])
def test_late_hook_inside_of_a_layer(how: str, place: str) -> None:
    _check(how, "forward", place, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("how", ["modules", "model", "backend"])
def test_late_hooks_under_inductor(how: str, hook: str, place: str) -> None:
    _check(how, hook, place, "inductor")


@pytest.mark.parametrize("how", ["modules", "model"])
def test_forward_replaced_afterwards(how: str) -> None:
    model = peft_perceptron()
    dorafx.optimize(model, codegen="eager", scope=how)
    x = torch.randn(3, 24)
    expected = model(x)
    layer = model.get_submodule(LAYER)
    original = layer.forward
    layer.forward = lambda x: original(x) * 2
    changed = model(x)
    assert (changed - expected).abs().max() > 1e-3
    del layer.forward
    assert_close(model(x), expected, 1e-5)
