"""One DoRA linear of PEFT's."""

from __future__ import annotations

import torch

from ..implementations import Figures, Task, build_layer


def measure(task: Task) -> Figures:
    """Seconds of a forward without gradients, and of a training step: forward and backward to the input and the adapter."""
    layer = build_layer(task)
    call = task.compiled(layer)
    x = task.random(1, task.parameters["tokens"], task.parameters["d_in"])
    layer.eval()

    @torch.no_grad()
    def forward() -> torch.Tensor:
        return call(x)  # type: ignore[no-any-return]

    figures = task.clock.figures("forward", forward, cold=True)
    if task.name == "merged":  # nothing to train
        return figures
    layer.train()
    inputs = [x.requires_grad_(), *(p for p in layer.parameters() if p.requires_grad)]

    def step() -> tuple[torch.Tensor, ...]:
        y = call(x)
        return torch.autograd.grad(y, inputs, torch.ones_like(y))

    return {**figures, **task.clock.figures("training step", step, cold=True)}
