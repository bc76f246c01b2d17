"""The host's time for a decoding step: a model so small that its device, one core, has almost nothing to compute."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from dorafx.log import NormCounters
from dorafx.options import Options
from dorafx.pipeline import rewrite_graph
from dorafx.runtime import NormStore, with_prologue

from ..implementations import Figures, Task, build_model
from ..models import Size
from ..steps import Step, time_steps
from .model import captured_graph, token_ids


def measure(task: Task) -> Figures:
    """Seconds of one token without a cache and without gradients, on one thread. For dorafx with the whole model as one graph also the
    seconds to take its norms from the store, for all and for each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measured(task)
    finally:
        torch.set_num_threads(threads)


def _measured(task: Task) -> Figures:
    size, scope = Size(**task.parameters["size"]), task.parameters["scope"]
    model = build_model(task, size).eval()
    call = dataclasses.replace(task, scope=scope).compiled(model)
    ids = token_ids(task, size.tokens)

    @torch.no_grad()
    def token() -> Any:
        return call(input_ids=ids, use_cache=False)

    figures = time_steps(task, [Step("one token", token, warm_up=5)])
    if task.name == "dorafx" and scope == "model":
        figures.update(_kept_norms(task, model, ids))
    return figures


def _kept_norms(task: Task, model: Any, ids: torch.Tensor) -> Figures:
    """The time of the model's norm prologue, with an empty function in place of its graph."""
    with torch.no_grad():
        graph, args = captured_graph(model, input_ids=ids, use_cache=False)
        norms = rewrite_graph(graph, Options(strict=True), prologue=True).norms
        take = with_prologue(lambda *args: None, norms, "auto", True, NormStore(NormCounters()))
        samples = task.clock.samples(lambda: take(*args), warm_up=3)
    return {"kept norms": ("s", samples), "a kept norm": ("s", [sample / len(norms) for sample in samples])}
