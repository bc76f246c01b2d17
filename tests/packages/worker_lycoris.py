"""Layers of LyCORIS with ``weight_decompose``: linear layers and convolutions, norms by output and by input channel."""

from __future__ import annotations

from typing import Any

import torch
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from package_support import measured, randomised, report
from torch import nn


class Adapted(nn.Module):
    def __init__(self, kind: Any, base: nn.Module, **arguments: Any) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.adapter = kind("adapter", self.base, lora_dim=2, alpha=1, weight_decompose=True, **arguments)
        self.adapter.apply_to()
        randomised(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x)


def _row(kind: Any, base: str, **arguments: Any) -> Any:
    def measure() -> dict[str, Any]:
        bases = {
            "linear": lambda: (nn.Linear(48, 64), torch.randn(3, 5, 48)),
            "conv1d": lambda: (nn.Conv1d(24, 32, 3, padding=1), torch.randn(2, 24, 9)),
            "conv2d": lambda: (nn.Conv2d(24, 32, 3, stride=2, padding=1), torch.randn(2, 24, 9, 7)),
            "conv3d": lambda: (nn.Conv3d(24, 32, 3), torch.randn(2, 24, 5, 5, 5)),
        }
        layer, x = bases[base]()
        model = Adapted(kind, layer, **arguments)
        return measured(model, model, x)

    return measure


ROWS = {}
for base in ("linear", "conv1d", "conv2d", "conv3d"):
    for name, kind in (("LoCon", LoConModule), ("LoHa", LohaModule), ("LoKr", LokrModule)):
        for on_out in (True, False):
            ROWS[f"{name} {base}, norm by {'output' if on_out else 'input'}"] = _row(kind, base, wd_on_out=on_out)
ROWS["LoCon conv2d, Tucker core"] = _row(LoConModule, "conv2d", use_tucker=True)
ROWS["LoCon linear, multiplier 0.7, scalar"] = _row(LoConModule, "linear", multiplier=0.7, use_scalar=True)
ROWS["LoCon linear, rank dropout"] = _row(LoConModule, "linear", rank_dropout=0.3)

if __name__ == "__main__":
    report(ROWS)
