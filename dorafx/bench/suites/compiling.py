"""A cold compilation, with caches that are empty, and what of it is dorafx's."""

from __future__ import annotations

import contextlib
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dorafx import _compat

from ..implementations import Task, build_model
from ..models import Size
from .model import TrainingStep, token_ids

__all__ = ["measure"]


def measure(task: Task) -> dict[str, tuple[str, list[float]]]:
    """Seconds of compilation (the first prefill and the first training step, less what they take afterwards), graphs and
    graph breaks; for dorafx the seconds and the share of its own pass, from lift to rewrite."""
    size = Size(**task.parameters["size"])
    model = build_model(task, size)
    ids = token_ids(task, size.tokens)
    before = _compat.graph_statistics()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        os.environ["TRITON_CACHE_DIR"] = os.path.join(folder, "triton")
        _compat.load_inductor()
        call = task.compiled(model)

        @torch.no_grad()
        def prefill() -> Any:
            return call(input_ids=ids)

        # Only for dorafx: importing its backend installs the polyfills, which would mend what the others are measured for.
        with contextlib.ExitStack() as timed:
            spent = timed.enter_context(_timed_pass()) if task.name == "dorafx" else []
            model.eval()
            seconds = _first_over_steady(task, prefill)
            model.train()
            seconds += _first_over_steady(task, TrainingStep(task, model, call, ids))
    graphs, breaks = (now - then for now, then in zip(_compat.graph_statistics(), before))
    figures = {
        "compilation": ("s", [seconds]),
        "graphs": ("count", [float(graphs)]),
        "graph breaks": ("count", [float(breaks)]),
    }
    if spent:
        figures["dorafx's pass"] = ("s", [sum(spent)])
        figures["share of the pass"] = ("share", [sum(spent) / seconds])
    return figures


def _first_over_steady(task: Task, step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    task.clock.synchronise()
    first = time.perf_counter() - start
    # Never negative nor zero, however noisy the machine: a share is taken of it.
    return max(first - statistics.median(task.clock.samples(step, warm_up=0)), 1e-9)


@contextlib.contextmanager
def _timed_pass() -> Iterator[list[float]]:
    """Seconds of every call of the backend's rewriting station inside."""
    backend: Any = importlib.import_module("dorafx.backend")
    station = backend.rewrite_or_fall_back
    spent: list[float] = []

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return station(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    backend.rewrite_or_fall_back = timed
    try:
        yield spent
    finally:
        backend.rewrite_or_fall_back = station
