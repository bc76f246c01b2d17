"""HF accelerate: prepared models, started by ``accelerate launch`` or by torchrun."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from distributed_support import EAGER, STEPS, Training, batch, loss_of, model, named, reference, run_checks, whole
from torch.utils.data import DataLoader

import dorafx


def train(compiled: bool) -> dict[str, Any]:
    """
    Args:
        compiled: ``torch.compile`` what accelerate prepared; otherwise ``dorafx.optimize`` the model before that.
    """
    wanted = reference()
    accelerator = Accelerator(cpu=True)
    adapted = model()
    if not compiled:
        dorafx.optimize(adapted, codegen="eager")
    # accelerate deals batches out in turn: half a batch for each of two processes.
    rows = DataLoader([row for step in range(STEPS) for row in batch(step)], batch_size=2, shuffle=False)
    optimizer = torch.optim.AdamW([p for _, p in named(adapted)], lr=0.02, fused=True)
    call, optimizer, rows = accelerator.prepare(adapted, optimizer, rows)
    kind = type(call).__name__
    if compiled:
        call = torch.compile(call, backend="dorafx", options=EAGER)
    training = Training()
    for x in rows:
        optimizer.zero_grad()
        loss = loss_of(call(x))
        training.losses.append(loss.item())
        accelerator.backward(loss)
        training.gradients = training.gradients or {n: whole(p.grad) for n, p in named(adapted) if p.grad is not None}
        optimizer.step()
    training.parameters = {n: whole(p) for n, p in named(adapted)}
    return {**training.against(wanted), "processes": accelerator.num_processes, "kind": kind}


if __name__ == "__main__":
    Accelerator(cpu=True)  # it starts the process group
    run_checks({"optimized before": lambda: train(False), "compiled after": lambda: train(True)})
