"""Hooks registered (and removed) after the first compiled call run as they do in the stock model."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import assert_close, peft_perceptron
from peft import LoraConfig, get_peft_model
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


def _pre_with_kwargs(see: Callable[..., None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: Any, kwargs: Any) -> Any:
        see(args[0])
        return (args[0] * 2,), kwargs

    return hook


HOOKS: dict[str, Register] = {
    "forward": lambda m, see: m.register_forward_hook(_scaled(see)),
    "prepended": lambda m, see: m.register_forward_hook(_scaled(see), prepend=True),
    "with kwargs": lambda m, see: m.register_forward_hook(_scaled_with_kwargs(see), with_kwargs=True),
    "always called": lambda m, see: m.register_forward_hook(_scaled(see), always_call=True),
    "forward pre": lambda m, see: m.register_forward_pre_hook(_pre(see)),
    "forward pre with kwargs": lambda m, see: m.register_forward_pre_hook(_pre_with_kwargs(see), with_kwargs=True),
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


def _keeping(seen: list[torch.Tensor]) -> Callable[[torch.Tensor], None]:
    # A closure: Dynamo 2.11 forgets what is appended to a default argument.
    def see(t: torch.Tensor) -> None:
        seen.append(t.detach().clone())

    return see


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
    handles = [HOOKS[hook](owner.get_submodule(PLACES[place]), _keeping(seen)) for owner, _, seen in runs]
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


SLOW = pytest.mark.slow
QUICK = {("modules", "forward"), ("modules", "backward"), ("model", "forward pre with kwargs"), ("model", "global")}


@pytest.mark.parametrize(
    ("how", "hook"),
    [
        pytest.param(how, hook, marks=() if (how, hook) in QUICK else SLOW)
        for how in ("modules", "model", "backend")
        for hook in HOOKS
    ],
)
def test_late_hook_of_a_layer(how: str, hook: str) -> None:
    _check(how, hook, "layer", "eager")


@pytest.mark.parametrize(
    ("how", "place"),
    [("backend", "lora_A"), pytest.param("modules", "base_layer", marks=SLOW), ("model", "base_layer")],
)
def test_late_hook_inside_of_a_layer(how: str, place: str) -> None:
    _check(how, "forward", place, "eager")


@pytest.mark.slow
@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("how", ["modules", "model", "backend"])
def test_late_hooks_under_inductor(how: str, hook: str) -> None:
    _check(how, hook, "layer", "inductor")


@pytest.mark.slow
@pytest.mark.parametrize("place", ["lora_A", "base_layer"])
@pytest.mark.parametrize("how", ["modules", "model", "backend"])
def test_late_hooks_inside_of_a_layer_under_inductor(how: str, place: str) -> None:
    _check(how, "forward", place, "inductor")


class Stack(nn.Module):
    """Layers of one shape, which one graph serves in the scope of modules."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return x


def _stack() -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(
        Stack(), LoraConfig(r=2, target_modules=["0", "1", "2"], use_dora=True, init_lora_weights=False)
    )
    model.add_adapter("other", LoraConfig(r=2, target_modules=["0", "1", "2"], use_dora=True, init_lora_weights=False))
    return model


def _compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@pytest.mark.default_cases("modules")
@pytest.mark.parametrize("how", ["modules", "model"])
def test_hooks_of_layers_that_share_a_graph(how: str) -> None:
    """A hook of one layer is not one of another; what another adapter has does not count until it is the active one; other
    registrations compile nothing again."""
    stock = _stack()
    model = copy.deepcopy(stock)
    dorafx.optimize(model, codegen="eager", scope=how)
    x = torch.randn(3, 8)
    both = (stock.base_model.model.layers, model.base_model.model.layers)

    def compare(what: str) -> None:
        assert_close(model(x), stock(x), 1e-5, what)

    compare("before")
    before = _compilations()
    x.clone().requires_grad_().register_hook(lambda g: g)
    nn.Linear(2, 2).register_forward_hook(lambda m, args, y: None)
    for layers in both:
        layers[2].lora_A["other"].register_forward_hook(lambda m, args, y: y * 3)
    compare("hooks of others")
    assert _compilations() == before
    for layers in both:
        layers[1].register_forward_hook(lambda m, args, y: y + 1)
    compare("hook of the second")
    compare("hook of the second, again")
    for layers in both:
        layers[0].lora_B["default"].register_forward_hook(lambda m, args, y: y * 2)
    compare("hook of the first, too")
    compiled = _compilations()
    compare("hook of the first, too, again")
    assert _compilations() == compiled
    for m in (stock, model):
        m.set_adapter("other")
    compare("the other adapter")
    for m in (stock, model):
        m.set_adapter("default")
    compare("back again")


class Closure(Stack):
    """Its ``self`` lies in a cell, as in PEFT's ``PeftModelForCausalLM.forward``."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def through(value: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                value = layer(value).tanh()
            return value

        return through(x)


def test_one_guard_for_the_hooks_of_a_model_in_a_cell() -> None:
    """A comparison for each dict of hooks would cost a decoding step of a small model a quarter of its time."""
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["0", "1", "2"], use_dora=True, init_lora_weights=False)
    model = get_peft_model(Closure(), config).base_model.model
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager"})
    x = torch.randn(3, 8)
    assert_close(compiled(x), model(x), 1e-5)
    (entry,) = torch._C._dynamo.eval_frame._debug_get_cache_entry_list(type(model).forward.__code__)
    guards = str(entry.guard_manager)
    assert "self" in guards and "._forward_hooks" not in guards
    assert "no hook of the modules" in guards
    model.layers[1].lora_A["default"].register_forward_hook(lambda m, args, y: y * 3)
    assert_close(compiled(x), model(x), 1e-5)


def test_the_guard_keeps_no_module_alive() -> None:
    model = _stack()
    dorafx.optimize(model, codegen="eager", scope="modules")
    model(torch.randn(3, 8))
    gone = weakref.ref(model.base_model.model.layers[1])
    del model
    gc.collect()
    assert gone() is None


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
