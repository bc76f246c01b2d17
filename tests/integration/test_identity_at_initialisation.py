"""At its initialisation DoRA is the frozen model, and an exact one: its outputs are the frozen model's to the bit, as stock PEFT's are in
fp32, whatever the layer, its bias, its size and its layout."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

import dorafx

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    # From 65536 elements of a weight the factored norm would be taken.
    "linear": (lambda: nn.Linear(512, 320), (2, 9, 512)),
    "small linear": (lambda: nn.Linear(64, 48), (9, 64)),
    "wide linear": (lambda: nn.Linear(2048, 48), (3, 2048)),
    "linear without a bias": (lambda: nn.Linear(512, 320, bias=False), (2, 9, 512)),
    "stored transposed": (lambda: Conv1D(320, 512), (2, 9, 512)),
    "convolution": (lambda: nn.Conv2d(48, 160, 3, padding=1), (2, 48, 6, 6)),
    "pointwise convolution": (lambda: nn.Conv2d(256, 320, 1, bias=False), (2, 256, 3, 3)),
    "one-dimensional convolution": (lambda: nn.Conv1d(96, 256, 3), (2, 96, 8)),
    "embedding": (lambda: nn.Embedding(512, 256), ()),
}


def _models(name: str, dtype: torch.dtype, bias: Any = "none") -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The frozen model, the same with a new adapter, and an input."""
    torch.manual_seed(1)
    make, shape = LAYERS[name]
    base = nn.Sequential(make())
    if isinstance(base[0], Conv1D):
        nn.init.normal_(base[0].bias)  # it begins with zeros
    base = base.to(dtype)
    x = torch.randn(shape).to(dtype) if shape else torch.randint(0, 512, (3, 7))
    config = LoraConfig(target_modules=["0"], use_dora=True, r=4, bias=bias, fan_in_fan_out=name == "stored transposed")
    return base, get_peft_model(copy.deepcopy(base), config), x


def _outputs(model: nn.Module, how: str, codegen: str, x: torch.Tensor) -> list[torch.Tensor]:
    """In training, and in evaluation twice: the second time the norm is one that was kept."""
    call: Any = model
    if how == "backend":
        call = torch.compile(model, backend="dorafx", options={"dorafx.codegen": codegen, "dorafx.strict": True})
    else:
        dorafx.optimize(model, codegen=codegen, strict=True)
    outputs = [call(x).detach()]
    model.eval()
    with torch.no_grad():
        outputs += [call(x), call(x)]
    assert dorafx.rewrite_log().rewrites
    return outputs


@pytest.mark.parametrize("how", ["optimize", "backend"])
@pytest.mark.parametrize("name", LAYERS)
def test_outputs_are_the_frozen_models(name: str, how: str) -> None:
    base, model, x = _models(name, torch.float32)
    exact = base(x).detach()
    for out in _outputs(model, how, "eager", x):
        torch.testing.assert_close(out, exact, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["linear", "linear without a bias", "stored transposed", "embedding"])
def test_outputs_are_the_frozen_models_through_inductor(name: str) -> None:
    """Not of convolutions: Inductor takes other algorithms for them, in every program."""
    base, model, x = _models(name, torch.float32)
    exact = base(x).detach()
    for out in _outputs(model, "optimize", "inductor", x):
        torch.testing.assert_close(out, exact, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "codegen"),
    [
        ("linear", "eager"),
        ("stored transposed", "eager"),
        ("convolution", "eager"),
        ("linear", "inductor"),
        ("stored transposed", "inductor"),
    ],
)
def test_with_trained_biases(name: str, codegen: str) -> None:
    base, model, x = _models(name, torch.float32, "all")
    stock = copy.deepcopy(model)
    for out in _outputs(model, "optimize", codegen, x):
        torch.testing.assert_close(out, base(x).detach(), rtol=0, atol=0)
    for each in (model, stock):
        each.train()
        each(x).square().sum().backward()
    gradients = {n: p.grad for n, p in stock.named_parameters() if p.requires_grad}
    assert sum(n.endswith("bias") for n in gradients) == 1
    for n, p in model.named_parameters():
        if n in gradients:
            torch.testing.assert_close(p.grad, gradients[n], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "stored transposed", "convolution"])
def test_half_precision_is_as_near_as_stock(name: str) -> None:
    base, model, x = _models(name, torch.bfloat16)
    exact = base(x).detach()
    stock = (copy.deepcopy(model)(x) - exact).abs().max()
    for out in _outputs(model, "optimize", "eager", x):
        assert (out - exact).abs().max() <= stock
