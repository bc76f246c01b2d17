"""dorafx: DoRA at the price of LoRA, for any PyTorch program.

``torch.compile(model, backend="dorafx")`` needs no import of this package. Everything else is here.
"""

from dorafx.api import Explanation, VerifyReport, explain, invalidate, optimize, restore, rewrite, verify
from dorafx.errors import DorafxError, DorafxWarning, RewriteMissError
from dorafx.log import Record, RewriteLog, rewrite_log
from dorafx.match import pattern

__version__ = "0.1.0"

__all__ = [
    "DorafxError",
    "DorafxWarning",
    "Explanation",
    "Record",
    "RewriteLog",
    "RewriteMissError",
    "VerifyReport",
    "explain",
    "invalidate",
    "optimize",
    "pattern",
    "restore",
    "rewrite",
    "rewrite_log",
    "verify",
]
