"""A Llama-shaped PEFT model: prefill and training step, and in the setting of arXiv:2603.22276 gradients without a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from ..allocations import peak_bytes
from ..implementations import Figures, Task, build_model
from ..models import VOCABULARY, Size
from ..steps import Step, time_steps
from ..work import MICRO_BATCHES


def token_ids(task: Task, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, VOCABULARY, (1, tokens), generator=generator).to(task.clock.device)


def captured_graph(model: Any, **inputs: Any) -> tuple[fx.GraphModule, list[Any]]:
    """Call a model, which must be captured as one graph and runs uncompiled; returns the graph and its inputs."""
    captured: list[tuple[fx.GraphModule, list[Any]]] = []

    def keep(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            captured.append((gm, list(args)))
            return gm.forward(*args)

        return run

    call: Callable[..., Any] = torch.compile(model, backend=keep, dynamic=False, fullgraph=True)
    call(**inputs)
    (only,) = captured
    return only


class TrainingStep:
    """Forward and backward of some micro-batches (as many as the task has, if no number is given), then a step of AdamW."""

    def __init__(
        self, task: Task, model: Any, call: Callable[..., Any], ids: torch.Tensor, micro_batches: int = 0
    ) -> None:
        self.micro_batches = micro_batches or task.micro_batches
        self.loss = _loss(task, call, ids)
        self.optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def __call__(self) -> None:
        self.backward(self.micro_batches)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def backward(self, micro_batches: int) -> None:
        """Accumulate the gradients of some micro-batches."""
        for _ in range(micro_batches):
            self.loss().backward()  # type: ignore[no-untyped-call]

    def state(self) -> list[torch.Tensor]:
        """The optimizer's tensors."""
        return [v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]


def _last(task: Task, ids: torch.Tensor) -> dict[str, Any]:
    """The argument that restricts the logits to the task's last tokens."""
    return {"logits_to_keep": min(task.loss_tokens, ids.shape[1])} if task.loss_tokens else {}


def _loss(task: Task, call: Callable[..., Any], ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    last = _last(task, ids)
    labels = ids[:, -last["logits_to_keep"] :] if last else ids
    return lambda: call(input_ids=ids, labels=labels, **last).loss


def _prefill(task: Task, model: Any, call: Callable[..., Any], ids: torch.Tensor) -> Callable[[], torch.Tensor]:
    last = _last(task, ids)

    @torch.no_grad()
    def prefill() -> torch.Tensor:
        return call(input_ids=ids, **last).logits  # type: ignore[no-any-return]

    return prefill


def measure(task: Task) -> Figures:
    """Seconds of a prefill without gradients, repeated and with adapters that were written just before, and of a training step of one
    batch and of several micro-batches."""
    size = Size(**task.parameters["size"])
    model = build_model(task, size)
    call, ids = task.compiled(model), token_ids(task, size.tokens)
    prefill = _prefill(task, model, call, ids)
    steps = [Step("prefill", prefill, model.eval)]
    if task.name != "merged":  # nothing to write or to train

        def change() -> None:
            model.eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter.mul_(1.001)

        steps.append(Step("first prefill", prefill, change))
        steps.append(Step("training step", TrainingStep(task, model, call, ids), model.train))
        accumulating = TrainingStep(task, model, call, ids, MICRO_BATCHES)
        steps.append(Step(f"step of {MICRO_BATCHES} micro-batches", accumulating, model.train, warm_up=1))
    return time_steps(task, steps)


def regime(task: Task) -> Figures:
    """Seconds of a prefill, of a training step and of the gradients of several micro-batches without an optimizer step; peak bytes of
    all tensors in a training step. Logits are those of the last tokens (arXiv:2603.22276, section 5.1); the prefill's are written to
    the task's file."""
    size = Size(**task.parameters["size"])
    model = build_model(task, size)
    call, ids = task.compiled(model), token_ids(task, size.tokens)
    prefill, training = _prefill(task, model, call, ids), TrainingStep(task, model, call, ids)
    if task.logits is not None:  # before the first optimizer step
        model.eval()
        torch.save(prefill().float().cpu(), task.logits)
    steps = [Step("prefill", prefill, model.eval), Step("training step", training, model.train)]
    if task.gradients:

        def gradients() -> None:
            training.backward(task.gradients)

        def before() -> None:
            model.train()
            training.optimizer.zero_grad()

        steps.append(Step(f"gradients, {task.gradients} micro-batches", gradients, before, warm_up=0))
    figures = time_steps(task, steps)
    model.train()
    training.optimizer.zero_grad()
    module_tensors = [*model.parameters(), *model.buffers()]
    highest = peak_bytes(training, task.clock.device, lambda: [*module_tensors, *training.state()])
    peak: Figures = {"peak": ("B", [float(highest)])}
    task.done(peak)
    return {**figures, **peak}
