"""The pass alone, from lift to rewrite, on the graph of a whole model; on the meta device, as it needs no weights."""

from __future__ import annotations

from dorafx import capture
from dorafx.log import RewriteLog, rewrite_log
from dorafx.options import Options
from dorafx.pipeline import rewrite_graph

from ..implementations import Figures, Task
from ..models import Size, build
from .model import captured_graph, token_ids


def measure(task: Task) -> Figures:
    """Seconds of a pass over the graph of a training forward, the number of nodes, and seconds for each node, which do not depend on
    the depth if the pass is linear. The graph is the same for every width, so the model is narrow."""
    # Not at import: all suites are imported together, and the anchors of the others are measured without the polyfills.
    capture.install()
    size = Size(**task.parameters["size"])
    model = build(size, True, task.dtype, "meta")
    graph, _ = captured_graph(model, input_ids=token_ids(task, size.tokens).to("meta"))
    nodes = len(graph.graph.nodes)

    def rewrite(log: RewriteLog) -> None:
        rewrite_graph(graph, Options(strict=True), 1, log=log)

    rewrite(rewrite_log())
    samples = task.clock.samples(lambda: rewrite(RewriteLog()), warm_up=0)
    return {
        "pass": ("s", samples),
        "nodes": ("count", [float(nodes)]),
        "pass a node": ("s", [sample / nodes for sample in samples]),
    }
