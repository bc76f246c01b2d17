"""NeMo Automodel's ``LinearLoRA`` with ``use_dora``."""

from __future__ import annotations

import sys
import types
from typing import Any

import torch
from package_support import measured, randomised, report
from torch import nn

# Triton kernels of plain LoRA, which newer versions of Triton refuse at import; a layer with DoRA calls none of them.
_kernels = types.ModuleType("nemo_automodel.components._peft.lora_kernel")
for _name in ("lora_da_dx_update_wrapper", "lora_db_update_wrapper", "lora_forward_wrapper"):
    setattr(_kernels, _name, None)
sys.modules[_kernels.__name__] = _kernels

from nemo_automodel.components._peft.lora import LinearLoRA, patch_linear_module  # noqa: E402


def _layer(bias: bool = True, **arguments: Any) -> Any:
    def measure() -> dict[str, Any]:
        layer = randomised(LinearLoRA(nn.Linear(24, 32, bias=bias), dim=4, alpha=8, use_dora=True, **arguments))
        layer.weight.requires_grad_(False)
        return measured(layer, layer, torch.randn(3, 5, 24))

    return measure


def _patched() -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24))
    for layer in (model[0], model[2]):
        patch_linear_module(layer, dim=4, alpha=8, use_dora=True)
        layer.weight.requires_grad_(False)
    randomised(model)
    return measured(model, model, torch.randn(3, 5, 24))


ROWS = {
    "LinearLoRA": _layer(),
    "LinearLoRA without bias": _layer(bias=False),
    "LinearLoRA, dropout before the factors": _layer(dropout=0.3, dropout_position="pre"),
    "LinearLoRA, dropout after the factors": _layer(dropout=0.3, dropout_position="post"),
    "a model patched by patch_linear_module": _patched,
}

if __name__ == "__main__":
    report(ROWS)
