"""The row norm of ``W + s·B·A`` alone, and the memory that it takes; of a quantised ``W`` what the others first do is to form it."""

from __future__ import annotations

from collections.abc import Callable

import torch

import dorafx.ops  # noqa: F401  (registers the operators)

from ..allocations import allocations
from ..implementations import Task
from ..norms import NORMS, Norm
from ..quantized import dense_of, random_packed

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
    weights, sizes = p.get("weights", "dense"), (p["d_out"], p["d_in"])
    weight = task.random(*sizes) if weights == "dense" else None
    left, right = task.random(p["d_out"], p["rank"]), task.random(p["rank"], p["d_in"])
    if weight is None:
        call = _of_quantised(task, weights, left, right)
    else:
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


def _of_quantised(task: Task, kind: str, left: torch.Tensor, right: torch.Tensor) -> Callable[[], torch.Tensor]:
    w = random_packed(kind, left.shape[0], right.shape[1], task.dtype, task.clock.device)
    if task.name == "dorafx":
        operator, layout = torch.ops.dorafx.row_norm_quantized, (w.format, w.shape, w.group, w.dtype)
        return lambda: operator(w.packed, w.scales, w.zeros, left, right, _SCALE, *layout)
    norm, dense = implementation(task), dense_of(w)
    # PEFT brings the weight to the dtype of the activations.
    return lambda: norm(dense().to(task.dtype), left, right, _SCALE)
