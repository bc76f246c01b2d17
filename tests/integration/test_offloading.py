"""Offloading by accelerate's and diffusers' hooks, on the CPU: attached before ``optimize``, after the first call, and taken off again."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_support import assert_close, peft_perceptron
from torch import nn

import dorafx
from dorafx.runtime import norm_store

accelerate = pytest.importorskip("accelerate")
hooks = pytest.importorskip("accelerate.hooks")

CPU = torch.device("cpu")
FIRST = "base_model.model.first"


class Scaled(hooks.ModelHook):  # type: ignore[misc]
    """A hook of somebody's own, which sees a module before and after."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return tuple(a * 2 for a in args), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return output + 1


def _twice(model: nn.Module, folder: Path) -> None:
    for append in (False, True):
        hooks.add_hook_to_module(model.get_submodule(FIRST), Scaled(), append=append)


def _weights_map(model: nn.Module, folder: Path) -> None:
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    hooks.attach_align_device_hook(
        model, execution_device=CPU, offload=True, weights_map=weights, preload_module_classes=["Linear"]
    )


# An adapter layer reads the weight of its base layer outside of that one's forward, so stock PEFT needs ``preload_module_classes``.
ATTACH: dict[str, Callable[[nn.Module, Path], Any]] = {
    "cpu_offload": lambda m, _: accelerate.cpu_offload(m, execution_device=CPU, preload_module_classes=["Linear"]),
    "cpu_offload with buffers": lambda m, _: accelerate.cpu_offload(
        m, execution_device=CPU, offload_buffers=True, preload_module_classes=["Linear"]
    ),
    "disk_offload": lambda m, folder: accelerate.disk_offload(
        m, str(folder), execution_device=CPU, preload_module_classes=["Linear"]
    ),
    "dispatch_model": lambda m, _: accelerate.dispatch_model(m, {"": "cpu"}, force_hooks=True),
    "align": lambda m, _: hooks.attach_align_device_hook(m, execution_device=CPU),
    "align, offload": _weights_map,
    "with a hook to call": lambda m, _: accelerate.cpu_offload_with_hook(m, execution_device=CPU),
    "hooks of one's own": _twice,
}


def switched_on(model: Any, how: str, codegen: str = "eager") -> Any:
    if how == "backend":
        return torch.compile(model, backend="dorafx", options={"dorafx.codegen": codegen})
    return dorafx.optimize(model, codegen=codegen, scope=how)


def results(owner: Any, call: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of many tokens and of one, and one more with the gradients of x and of what is trained and not offloaded."""
    with torch.no_grad():
        found = [call(x), call(x[:1]), call(x[:1])]
    x = x.clone().requires_grad_()
    parameters = [p for p in owner.parameters() if p.requires_grad and p.device.type == "cpu"]
    y = call(x)
    return [*found, y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *parameters], allow_unused=True)]


def compare(found: list[Any], wanted: list[Any], what: str) -> None:
    assert len(found) == len(wanted), what
    for one, other in zip(found, wanted, strict=True):
        assert (one is None) == (other is None), what
        if other is not None:
            assert_close(one, other, 1e-4, what)


QUICK = {
    ("modules", "cpu_offload", "warm"),
    ("backend", "align, offload", "before"),
    ("modules", "disk_offload", "after"),
}


@pytest.mark.parametrize(
    ("how", "kind", "when"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in (
            (h, k, w) for h in ("modules", "model", "backend") for k in ATTACH for w in ("before", "after", "warm")
        )
    ],
)
def test_accelerate(how: str, kind: str, when: str, tmp_path: Path) -> None:
    """``before``: hooks, then dorafx; ``after``: dorafx, then hooks; ``warm``: a call between the two."""
    stock = peft_perceptron().eval()
    model = copy.deepcopy(stock)
    x = torch.randn(3, 24)
    call: Any = None
    if when != "before":
        call = switched_on(model, how)
        if when == "warm":
            compare(results(model, call, x), results(stock, stock, x), "before the hooks")
    for name, each in (("stock", stock), ("model", model)):
        ATTACH[kind](each, tmp_path / name)
    if call is None:
        call = switched_on(model, how)
    for i in range(2):
        compare(results(model, call, x), results(stock, stock, x), f"with hooks, call {i}")
    for each in (stock, model):
        hooks.remove_hook_from_submodules(each)
    compare(results(model, call, x), results(stock, stock, x), "without hooks")
    dorafx.restore(model)
    compare(results(model, model, x), results(stock, stock, x), "restored")


def test_weights_that_come_and_go_leave_few_norms(tmp_path: Path) -> None:
    norm_store().clear()
    model = dorafx.optimize(peft_perceptron().eval(), codegen="eager", scope="modules")
    ATTACH["cpu_offload"](model, tmp_path)
    with torch.no_grad():
        for _ in range(2):
            for _ in range(30):
                model(torch.randn(1, 24))
            gc.collect()  # what is gone is gone when it is collected
    assert len(norm_store()) < 80  # those of tensors that are gone are removed at 64


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cpu_offload", "dispatch_model", "hooks of one's own"])
@pytest.mark.parametrize("how", ["modules", "backend"])
def test_accelerate_under_inductor(how: str, kind: str, tmp_path: Path) -> None:
    stock = peft_perceptron().eval()
    model = copy.deepcopy(stock)
    call = switched_on(model, how, "inductor")
    x = torch.randn(3, 24)
    compare(results(model, call, x), results(stock, stock, x), "before the hooks")
    for name, each in (("stock", stock), ("model", model)):
        ATTACH[kind](each, tmp_path / name)
    compare(results(model, call, x), results(stock, stock, x), "with hooks")
    for each in (stock, model):
        hooks.remove_hook_from_submodules(each)
    compare(results(model, call, x), results(stock, stock, x), "without hooks")


def test_what_stock_cannot_offload_fails_alike() -> None:
    """Hooks of each linear alone: the adapter layer finds the base weight on the meta device."""
    stock = peft_perceptron().eval()
    model = dorafx.optimize(copy.deepcopy(stock), codegen="eager", scope="modules")
    messages = []
    for each in (stock, model):
        accelerate.cpu_offload(each, execution_device=CPU)
        with pytest.raises((RuntimeError, NotImplementedError)) as raised, torch.no_grad():
            each(torch.randn(3, 24))
        messages.append(str(raised.value))
    assert messages[0] and "meta" in messages[0]


@pytest.mark.parametrize(
    ("how", "when"),
    [
        ("modules", "after"),
        *(
            pytest.param(h, w, marks=pytest.mark.slow)
            for h in ("modules", "model", "backend")
            for w in ("before", "after", "warm")
            if (h, w) != ("modules", "after")
        ),
    ],
)
@pytest.mark.parametrize("kind", ["leaf_level", pytest.param("block_level", marks=pytest.mark.slow)])
def test_group_offloading_of_diffusers(kind: str, how: str, when: str) -> None:
    offloading = pytest.importorskip("diffusers.hooks")
    stock = peft_perceptron().eval()
    model = copy.deepcopy(stock)
    more = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    x = torch.randn(3, 24)
    call: Any = switched_on(model, how) if when != "before" else None
    if when == "warm":
        compare(results(model, call, x), results(stock, stock, x), "before")
    for each in (stock, model):
        offloading.apply_group_offloading(each, onload_device=CPU, offload_device=CPU, offload_type=kind, **more)
    if call is None:
        call = switched_on(model, how)
    for _ in range(2):
        compare(results(model, call, x), results(stock, stock, x), "offloaded")
