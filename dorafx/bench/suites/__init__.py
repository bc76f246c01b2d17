"""One module for each suite. Its ``measure(task)`` runs in a process of its own and returns metric -> unit and samples."""

from __future__ import annotations

from collections.abc import Callable

from ..implementations import Figures, Task
from . import compiling, compose, decode, generate, host, layer, memory, model, norm, rewriting

__all__ = ["MEASURES"]

MEASURES: dict[str, Callable[[Task], Figures]] = {
    "norm": norm.measure,
    "compose": compose.measure,
    "layer": layer.measure,
    "model": model.measure,
    "decode": decode.measure,
    "generate": generate.measure,
    "memory": memory.measure,
    "compile": compiling.measure,
    "host": host.measure,
    "pass": rewriting.measure,
    # Only for ``dorafx bench gpu``:
    "regime": model.regime,
    "overhead": decode.overhead,
}
