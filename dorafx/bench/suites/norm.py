"""The row norm of ``W + s·B·A`` alone, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Callable

import torch

import dorafx.ops  # noqa: F401  (registers the operators)

from ..allocations import allocations
from ..implementations import Task
from ..norms import NORMS, Norm

__all__ = ["implementation", "measure"]

_SCALE = 2.0


def implementation(task: Task) -> Norm:
    """The norm that a name stands for."""
    if task.name == "dorafx":
        return torch.ops.dorafx.row_norm
    return task.compiled(NORMS[task.name.removesuffix("-inductor")])


def measure(task: Task) -> dict[str, tuple[str, list[float]]]:
    """Seconds of a call; bytes of its largest allocation, and of all its temporaries at once."""
    p = task.parameters
    weight, left, right = (
        task.random(p["d_out"], p["d_in"]),
        task.random(p["d_out"], p["rank"]),
        task.random(p["rank"], p["d_in"]),
    )
    norm = implementation(task)

    def call() -> torch.Tensor:
        return norm(weight, left, right, _SCALE)

    step: Callable[[], torch.Tensor] = torch.no_grad()(call)
    samples = task.clock.samples(step, cold=True)
    memory = allocations(step, task.clock.device)
    return {
        "time": ("s", samples),
        "largest allocation": ("B", [memory.largest]),
        "temporaries": ("B", [memory.peak]),
    }
