"""``zero_rows="finite"`` on stock PEFT layers: rows of zeros as real checkpoints have them (padded vocabulary, pruned rows), which stock PEFT
makes NaN or infinite. Outputs of such a row are the base's, and the other outputs and gradients stock's where these are numbers."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import dorafx

ROWS = [2, 5]


class Embedded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Embedding(40, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class Around(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def case(kind: str) -> tuple[Any, torch.Tensor]:
    """A model with zero rows ``ROWS``, their magnitudes as PEFT initialises them (zero) or not, and an input."""
    torch.manual_seed(0)
    made: dict[str, tuple[nn.Module, torch.Tensor]] = {
        "linear": (Around(nn.Linear(32, 24)), torch.randn(6, 32)),
        "dropout": (Around(nn.Linear(32, 24)), torch.randn(6, 32)),
        "embedding": (Embedded(), torch.arange(12).reshape(3, 4)),
        "conv1d": (Around(nn.Conv1d(6, 24, 3)), torch.randn(2, 6, 9)),
        "conv2d": (Around(nn.Conv2d(6, 24, 3)), torch.randn(2, 6, 9, 9)),
    }
    base, x = made[kind]
    weight: Any = base.layer.weight
    with torch.no_grad():
        (weight.T if kind == "embedding" else weight)[ROWS] = 0
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["layer"], use_dora=True, lora_dropout=0.25 * (kind == "dropout")
    )
    model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name and "magnitude" not in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
                if "_B" in name:
                    p[ROWS] = 0
            elif "magnitude" in name:
                p.mul_(1 + 0.2 * torch.rand(p.shape, generator=generator))
                p.reshape(-1)[ROWS[1]] = 0.7  # the other is 0, as PEFT initialises it
    return model, x


def outputs_first(kind: str, y: torch.Tensor) -> torch.Tensor:
    return y.movedim(1, 0) if kind.startswith("conv") else y.movedim(-1, 0)


def run(model: Any, x: torch.Tensor, kind: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    torch.manual_seed(3)
    y = model(x)
    y.square().sum().backward()
    return outputs_first(kind, y.detach()), {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.default_cases("eager-linear", "eager-embedding", "eager-conv2d")
@pytest.mark.parametrize("kind", ["linear", "dropout", "embedding", "conv1d", "conv2d"])
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_layers(codegen: str, kind: str) -> None:
    torch._dynamo.reset()
    dorafx.rewrite_log().clear()
    model, x = case(kind)
    stock, pruned = copy.deepcopy(model), copy.deepcopy(model)
    others = [i for i in range(24) if i not in ROWS]
    with torch.no_grad():  # the same layer without a zero row: its other rows are the reference
        for name, p in pruned.named_parameters():
            if "base_layer.weight" in name:
                (p.T if kind == "embedding" else p)[ROWS] = 1.0
    dorafx.optimize(model, codegen=codegen, zero_rows="finite", strict=True)
    assert not outputs_first(kind, stock.train()(x))[ROWS].isfinite().all()
    y, grads = run(model.train(), x, kind)
    expected, _ = run(pruned.train(), x, kind)
    assert y.isfinite().all() and all(g.isfinite().all() for g in grads.values())
    bias = getattr(model.base_model.model.layer.base_layer, "bias", None)
    zero = y[ROWS].reshape(2, -1)
    assert torch.equal(zero, torch.zeros_like(zero) if bias is None else bias[ROWS, None].expand_as(zero))
    if kind != "dropout" or codegen == "eager":  # Inductor draws other numbers than eager
        torch.testing.assert_close(y[others], expected[others], rtol=1e-4, atol=1e-5)
    magnitude = next(g for n, g in grads.items() if "magnitude" in n).reshape(-1)
    assert not magnitude[ROWS].any() and magnitude[others].all()
    with torch.no_grad():
        assert model.eval()(x).isfinite().all()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        loss = model.train()(x).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in model.parameters())
    assert {r.pattern for r in dorafx.rewrite_log().rewrites} & {"linear", "linear_dropout", "embedding", "convolution"}
    dorafx.restore(model)
    assert not outputs_first(kind, model(x)).isfinite().all()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_a_quantised_base() -> None:
    from quantized_support import Block

    torch._dynamo.reset()
    base = Block()
    with torch.no_grad():
        base.up.weight[ROWS] = 0
    model: Any = quantized_block(base)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "up.lora_B" in name:
                p[ROWS] = 0
    x = torch.randn(3, 64)
    assert not model.base_model.model.up(x).isfinite().all()
    dorafx.optimize(model, codegen="eager", zero_rows="finite")
    y = model.train()(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    assert "nf4" in {r.dtype for r in dorafx.rewrite_log().rewrites}


def quantized_block(base: Any) -> Any:
    """PEFT's DoRA on the same block in NF4."""
    from quantized_support import bitsandbytes_layer

    base.up, base.down = (bitsandbytes_layer(m, "nf4", torch.float32, False) for m in (base.up, base.down))
    config = LoraConfig(r=4, target_modules=["up", "down"], use_dora=True, init_lora_weights=False)
    return get_peft_model(base, config)
