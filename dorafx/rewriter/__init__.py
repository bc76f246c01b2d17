"""Rewrite: a new graph from a plan."""

from .apply import apply_plan
from .copying import copy_graph_module
from .emit import CannotEmit, Emitter

__all__ = ["CannotEmit", "Emitter", "apply_plan", "copy_graph_module"]
