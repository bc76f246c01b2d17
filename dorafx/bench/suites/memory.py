"""The memory of training: bytes that autograd saves, and the peak of a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..allocations import allocations, peak_bytes, saved_bytes
from ..implementations import Figures, Task, build_layer, build_model
from ..models import Size
from .model import TrainingStep, token_ids


def measure(task: Task) -> Figures:
    """Bytes: saved by autograd for the backward (without parameters and buffers); the peak of a training step beyond what was allocated
    before it; and the peak including that: parameters, optimizer, input."""
    standing: Callable[[], list[torch.Tensor]]
    if "size" in task.parameters:
        size = Size(**task.parameters["size"])
        module = build_model(task, size).train()
        call = task.compiled(module)
        ids = token_ids(task, size.tokens)
        training = TrainingStep(task, module, call, ids)
        step: Callable[[], Any] = training
        standing = training.state

        def forward() -> Any:
            return call(input_ids=ids, labels=ids).loss
    else:
        module = build_layer(task).train()
        call = task.compiled(module)
        x = task.random(1, task.parameters["tokens"], task.parameters["d_in"]).requires_grad_()
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]

        def forward() -> Any:
            return call(x)

        def step() -> Any:
            y = call(x)
            return torch.autograd.grad(y, inputs, torch.ones_like(y))

        def standing() -> list[torch.Tensor]:
            return [x]

    for _ in range(2):  # compile, and create the optimizer's state
        step()
    module_tensors = [*module.parameters(), *module.buffers()]
    saved = saved_bytes(forward, module_tensors)
    temporaries = allocations(step, task.clock.device).peak
    peak = peak_bytes(step, task.clock.device, lambda: [*module_tensors, *standing()], temporaries)
    return {
        "saved": ("B", [float(saved)]),
        "temporaries": ("B", [float(temporaries)]),
        "peak": ("B", [float(peak)]),
    }
