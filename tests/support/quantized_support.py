"""Stock PEFT DoRA on quantised bases, of random weights, quantised for real on the CPU by the libraries themselves."""

from __future__ import annotations

from typing import Any

import peft
import torch
from torch import nn

__all__ = ["FORMATS", "Block", "bitsandbytes_layer", "quantized", "steps", "torchao_config"]

FORMATS = {
    "nf4": "nf4",
    "nf4 double": "nf4",
    "fp4": "fp4",
    "torchao int8": "affine",
    "torchao intx": "affine",
    "hqq 4 bit": "hqq4",
    "hqq 4 bit columns": "hqq4",
    "hqq 8 bit": "hqq8",
}
"""Kind of base -> the format in dorafx's log."""


class Block(nn.Module):
    """Two linears, wide enough for groups of 32 or 64."""

    def __init__(self, d_in: int = 64, d_hidden: int = 128, bias: bool = True) -> None:
        super().__init__()
        self.up = nn.Linear(d_in, d_hidden, bias=bias)
        self.down = nn.Linear(d_hidden, d_in, bias=bias)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.relu(self.up(x)))


def bitsandbytes_layer(linear: nn.Linear, kind: str, dtype: torch.dtype, repack: bool) -> nn.Module:
    """A linear of bitsandbytes. ``repack``: as on a CPU with AVX512-BF16, where evaluation lays 4-bit weights out anew."""
    import bitsandbytes as bnb

    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    made: Any
    if kind.startswith("bnb 8 bit"):
        threshold = 6.0 if kind.endswith("outliers") else 0.0  # 6.0 is what transformers sets
        made = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=threshold)
    else:
        made = bnb.nn.Linear4bit(
            *sizes, compute_dtype=dtype, quant_type=kind[:3], compress_statistics=kind.endswith("double")
        )
        # On a CPU with AVX512-BF16 evaluation brings the weight into another layout (see test_repacked_weights).
        made.support_avx512bf16_for_cpu = repack
    made.load_state_dict(linear.state_dict())
    if dtype != torch.float32 and not kind.startswith("bnb 8 bit"):
        made.to(dtype)  # before it is quantised: what it is dequantised to
    return made.to("cpu")  # type: ignore[no-any-return]


def _hqq(linear: nn.Linear, kind: str, dtype: torch.dtype) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=int(kind.split()[1]), group_size=32, axis=0 if kind.endswith("columns") else 1)
    return HQQLinear(linear, config, compute_dtype=dtype, device="cpu")  # type: ignore[no-any-return]


def torchao_config(kind: str) -> Any:
    from torchao.quantization import (
        Float8WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        IntxWeightOnlyConfig,
    )
    from torchao.quantization.granularity import PerGroup, PerTensor

    return {
        "torchao int8": lambda: Int8WeightOnlyConfig(),
        "torchao intx": lambda: IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "torchao int8, one scale": lambda: Int8WeightOnlyConfig(granularity=PerTensor()),
        "torchao fp8": lambda: Float8WeightOnlyConfig(),
        "torchao int8, activations too": lambda: Int8DynamicActivationInt8WeightConfig(),
        "torchao intx, activations too": lambda: Int8DynamicActivationIntxWeightConfig(
            weight_dtype=torch.int4, weight_granularity=PerGroup(32)
        ),
    }[kind]()


def quantized(
    kind: str,
    dtype: torch.dtype = torch.float32,
    repack: bool = False,
    block: dict[str, Any] | None = None,
    **lora: Any,
) -> Any:
    """A PEFT model of :class:`Block`, whose linears are quantised; equal for equal arguments."""
    torch.manual_seed(0)
    model = Block(**(block or {})).to(dtype)
    if kind.startswith("torchao"):
        from torchao.quantization import quantize_

        quantize_(model, torchao_config(kind))
    else:
        for name, linear in list(model.named_children()):
            make = (
                _hqq(linear, kind, dtype) if kind.startswith("hqq") else bitsandbytes_layer(linear, kind, dtype, repack)
            )
            setattr(model, name, make)
        model.is_loaded_in_8bit = kind.startswith("bnb 8 bit")  # type: ignore[assignment]
        model.is_loaded_in_4bit = kind[:3] in ("nf4", "fp4")  # type: ignore[assignment]
    config = {"r": 4, "use_dora": True, "init_lora_weights": False, "target_modules": ["up", "down"], **lora}
    return peft.get_peft_model(model, peft.LoraConfig(**config))


def steps(model: Any, call: Any, x: torch.Tensor, train: bool) -> list[torch.Tensor]:
    """The output and, when training, the gradients of everything that is trained and of x."""
    torch.manual_seed(1)
    x = x.detach().requires_grad_(train)
    with torch.set_grad_enabled(train):
        y = call(x)
        if not train:
            return [y]
        return [
            y,
            *torch.autograd.grad(y.float().sin().sum(), [x, *(p for p in model.parameters() if p.requires_grad)]),
        ]
