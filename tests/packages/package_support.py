"""What the workers share: run a layer of somebody's package as it is and through dorafx, and say what became of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from torch import nn

import dorafx

CODEGENS = ("eager", "inductor")


def measured(model: nn.Module, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> dict[str, Any]:
    """Run ``call(x)`` as it stands and compiled with dorafx, in training with all gradients and in inference.

    Returns:
        ``result``: what the log says of it, the same with every codegen and in both modes, or the different answers;
        ``error``: the largest difference of outputs and gradients, relative to the largest entry of each.
    """
    torch._inductor.config.fallback_random = True  # the random numbers of eager PyTorch
    said, worst = [], 0.0
    for codegen in CODEGENS:
        for training in (True, False):
            expected = _observed(model, call, x, training)
            torch._dynamo.reset()
            dorafx.rewrite_log().clear()
            compiled = torch.compile(call, backend="dorafx", options={"dorafx.codegen": codegen})
            for _ in range(2):  # the second call reuses norms
                worst = max(worst, _difference(_observed(model, compiled, x, training), expected))
            said.append(_said())
    return {"result": said[0] if len(set(said)) == 1 else " / ".join(said), "error": worst}


def report(rows: dict[str, Callable[[], dict[str, Any]]]) -> None:
    """Measure every row and write the results to the file that the command line names."""
    found = {}
    for name, measure in rows.items():
        torch.manual_seed(0)
        found[name] = measure()
    Path(sys.argv[1]).write_text(json.dumps(found, indent=1))


def randomised(model: nn.Module) -> nn.Module:
    """Draw whatever starts at zero, or the adapter would have no effect."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and not parameter.any():
                parameter.normal_(std=0.1)
    return model


def _observed(
    model: nn.Module, call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, training: bool
) -> dict[str, torch.Tensor]:
    model.train(training)
    torch.manual_seed(1)  # for dropout
    x = x.detach().clone().requires_grad_(training)
    model.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(training):
        output = call(x)
    found = {"output": output.detach()}
    if training:
        output.sin().sum().backward()
        found["input"] = x.grad
        found.update((n, p.grad) for n, p in model.named_parameters() if p.grad is not None)
    return found


def _difference(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    assert got.keys() == wanted.keys(), sorted(got.keys() ^ wanted.keys())
    return max(float((got[n] - t).abs().max() / t.abs().max().clamp_min(1e-6)) for n, t in wanted.items())


def _said() -> str:
    log = dorafx.rewrite_log()
    parts = [f"{r.pattern}{f': {r.reason}' if r.reason else ''}" for r in log.rewrites]
    parts += [f"miss: {r.reason}" for r in log.misses]
    return "; ".join(sorted(set(parts))) or "no record"
