"""dorafx: DoRA at the price of LoRA, for any PyTorch program.

``torch.compile(model, backend="dorafx")`` needs no import of this package. Everything else is here.

The examples of the functions below use this layer, one spelling of DoRA among many:

Examples:
    >>> import torch
    >>> import torch.nn.functional as F
    >>> class DoraLinear(torch.nn.Module):
    ...     def __init__(self, d_in, d_out, rank):
    ...         super().__init__()
    ...         self.weight = torch.nn.Parameter(torch.randn(d_out, d_in), requires_grad=False)
    ...         self.lora_A = torch.nn.Parameter(torch.randn(rank, d_in))
    ...         self.lora_B = torch.nn.Parameter(torch.randn(d_out, rank))
    ...         self.magnitude = torch.nn.Parameter(self.weight.norm(dim=1))
    ...
    ...     def forward(self, x):
    ...         norm = (self.weight + self.lora_B @ self.lora_A).norm(dim=1).detach()
    ...         y = F.linear(x, self.weight) + F.linear(F.linear(x, self.lora_A), self.lora_B)
    ...         return self.magnitude / norm * y
    >>> layer, x = DoraLinear(64, 96, rank=4), torch.randn(8, 64)
"""

from __future__ import annotations

import typing

from dorafx.api import VerifyReport, explain, invalidate, optimize, restore, rewrite, verify
from dorafx.errors import DorafxError, DorafxWarning, RewriteMissError
from dorafx.explanation import Explanation
from dorafx.integrations.dynamo_backend import make_known_to_accelerate
from dorafx.log import Record, RewriteLog, rewrite_log
from dorafx.match import pattern
from dorafx.preflight import CheckReport, Finding, check
from dorafx.serving import apply_scales, export_scales

if typing.TYPE_CHECKING:
    from dorafx.integrations.trainer import TrainerCallback as TrainerCallback

__version__ = "0.1.0"

__all__ = [
    "CheckReport",
    "DorafxError",
    "DorafxWarning",
    "Explanation",
    "Finding",
    "Record",
    "RewriteLog",
    "RewriteMissError",
    "VerifyReport",
    "apply_scales",
    "check",
    "explain",
    "export_scales",
    "invalidate",
    "optimize",
    "pattern",
    "restore",
    "rewrite",
    "rewrite_log",
    "verify",
]

_LAZY = {"TrainerCallback": "dorafx.integrations.trainer"}
"""Public names whose modules import another library. They are not in ``__all__``: ``from dorafx import *`` must not import it."""


def __getattr__(name: str) -> typing.Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


make_known_to_accelerate()
