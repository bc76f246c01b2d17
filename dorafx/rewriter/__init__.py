"""Rewrite: a new graph from a plan, and a norm prologue beside it."""

from .apply import apply_plan
from .copying import copy_graph_module
from .emit import CannotEmit, Emitter
from .in_place import reuse_buffers
from .prologue import HoistedNorm, hoist_norms, norms_inside
from .region import draw
from .results import own_results

__all__ = [
    "CannotEmit",
    "Emitter",
    "HoistedNorm",
    "apply_plan",
    "copy_graph_module",
    "draw",
    "hoist_norms",
    "norms_inside",
    "own_results",
    "reuse_buffers",
]
