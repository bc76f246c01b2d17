"""A Llama-shaped PEFT model: prefill and training step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..implementations import Task, build_model
from ..models import VOCABULARY, Size

__all__ = ["TrainingStep", "measure", "token_ids"]


def token_ids(task: Task, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (1, tokens), generator=generator).to(task.clock.device)


class TrainingStep:
    """Forward and backward of as many micro-batches as the task has, then a step of AdamW."""

    def __init__(self, task: Task, model: Any, call: Callable[..., Any], ids: torch.Tensor) -> None:
        self.micro_batches, self.call, self.ids = task.micro_batches, call, ids
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self) -> None:
        for _ in range(self.micro_batches):
            self.call(input_ids=self.ids, labels=self.ids).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> list[torch.Tensor]:
        """The optimizer's tensors."""
        return [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]


def measure(task: Task) -> dict[str, tuple[str, list[float]]]:
    """Seconds of a prefill without gradients, and of a training step."""
    size = Size(**task.parameters["size"])
    model = build_model(task, size)
    call = task.compiled(model)
    ids = token_ids(task, size.tokens)
    model.eval()

    @torch.no_grad()
    def prefill() -> Any:
        return call(input_ids=ids)

    figures = {"prefill": ("s", task.clock.samples(prefill))}
    if task.name == "merged":  # nothing to train
        return figures
    model.train()
    return {**figures, "training step": ("s", task.clock.samples(TrainingStep(task, model, call, ids)))}
