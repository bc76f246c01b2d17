"""Rewrite: a new graph from a plan, and a norm prologue beside it."""

from .apply import apply_plan
from .emit import Emitter
from .hoist import HoistedNorm, NormKey, hoist_norms, norms_inside
from .in_place import reuse_buffers
from .nodes import CannotEmit
from .results import replace_view_results
from .zero_rows import ZeroRows, guard_zero_norms

__all__ = [
    "CannotEmit",
    "Emitter",
    "HoistedNorm",
    "NormKey",
    "ZeroRows",
    "apply_plan",
    "guard_zero_norms",
    "hoist_norms",
    "norms_inside",
    "replace_view_results",
    "reuse_buffers",
]
