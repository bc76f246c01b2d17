"""Calls that are all warmed up first, and then timed one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .implementations import Figures, Task


@dataclass(frozen=True)
class Step:
    """One figure: its name, the timed call, an untimed call before each of them, and the number of warm-up calls."""

    name: str
    call: Callable[[], Any]
    before: Callable[[], Any] | None = None
    warm_up: int = 2


def time_steps(task: Task, steps: Sequence[Step]) -> Figures:
    """Warm up all steps, wait until no other process uses the device, then time them in order."""
    for step in steps:
        for _ in range(step.warm_up):
            if step.before is not None:
                step.before()
            step.call()
    task.clock.synchronise()
    if task.clock.cuda:
        torch.cuda.empty_cache()  # other processes share the device's memory
    task.alone()
    figures: Figures = {}
    for step in steps:
        measured = task.clock.figures(step.name, step.call, step.before, warm_up=0)
        task.done(measured)
        figures.update(measured)
    return figures
