"""A cold compilation, with empty caches, and dorafx's share of it."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch

from dorafx._compat.dynamo import graph_statistics
from dorafx._compat.inductor import load_inductor
from dorafx.log import rewrite_log

from ..implementations import Figures, Task, build_model
from ..models import Size
from .model import TrainingStep, token_ids


def measure(task: Task) -> Figures:
    """Seconds of compilation (the first prefill and training step, minus the time that they take later), graphs and graph breaks; for
    dorafx the seconds and the share of its own pass, from lift to rewrite."""
    size = Size(**task.parameters["size"])
    model = build_model(task, size)
    ids = token_ids(task, size.tokens)
    before = graph_statistics()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
        load_inductor()
        call = task.compiled(model)

        @torch.no_grad()
        def prefill() -> Any:
            return call(input_ids=ids)

        model.eval()
        seconds = _first_over_steady(task, prefill)
        model.train()
        seconds += _first_over_steady(task, TrainingStep(task, model, call, ids))
    graphs, breaks = (end - start for end, start in zip(graph_statistics(), before))
    figures = {
        "compilation": ("s", [seconds]),
        "graphs": ("count", [float(graphs)]),
        "graph breaks": ("count", [float(breaks)]),
    }
    if task.name == "dorafx":
        pass_seconds = sum(rewrite_log().seconds.values())
        figures["dorafx's pass"] = ("s", [pass_seconds])
        figures["share of the pass"] = ("share", [pass_seconds / seconds])
    return figures


def _first_over_steady(task: Task, step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    task.clock.synchronise()
    first = time.perf_counter() - start
    # Positive even on a noisy machine, as it is a divisor.
    return max(first - statistics.median(task.clock.samples(step, warm_up=0)), 1e-9)
