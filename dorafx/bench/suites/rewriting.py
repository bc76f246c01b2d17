"""The pass alone, lift to rewrite, on the graph of a whole model; on the meta device, for it needs no weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dorafx.log import RewriteLog, rewrite_log
from dorafx.options import Options

from ..implementations import Task
from ..models import Size, build
from .model import token_ids

__all__ = ["measure"]


def measure(task: Task) -> dict[str, tuple[str, list[float]]]:
    """Seconds of a pass over the one graph of a training forward, its nodes, and seconds a node: the same at every depth if
    the pass is linear. The graph is the same for every width, so the model is narrow."""
    # Here, not above: every suite is imported with this one, and importing the backend installs the polyfills, which would
    # mend what the others are measured for.
    from dorafx.backend import rewrite_graph_module

    size = Size(**task.parameters["size"])
    model = build(size, True, task.dtype, "meta")
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return gm.forward

    call: Callable[..., Any] = torch.compile(model, backend=keep, dynamic=False, fullgraph=True)
    call(input_ids=token_ids(task, size.tokens).to("meta"))
    (graph,) = graphs
    nodes = len(graph.graph.nodes)

    def once(log: RewriteLog) -> None:
        rewrite_graph_module(graph, Options(strict=True), 1, log=log)

    once(rewrite_log())
    samples = task.clock.samples(lambda: once(RewriteLog()), warm_up=0)
    return {
        "pass": ("s", samples),
        "nodes": ("count", [float(nodes)]),
        "pass a node": ("s", [sample / nodes for sample in samples]),
    }
