"""Whether gradients are recorded where a node stands, as the nodes of its graph switch that."""

from __future__ import annotations

from torch import fx

from .targets import canonical_name

__all__ = ["GradMode", "switches_gradients_on"]


def switches_gradients_on(gm: fx.GraphModule) -> bool:
    """Whether a graph, or one inside it, has gradients recorded somewhere, whatever the mode in which it is called."""
    graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
    return any(canonical_name(n) == "set_grad_enabled" and n.args[0] is True for graph in graphs for n in graph.nodes)


class GradMode:
    """Follows a graph from its beginning, where gradients are recorded."""

    def __init__(self) -> None:
        self.records = True
        self._before_inference: list[bool] = []

    def follow(self, node: fx.Node, name: str | None) -> bool:
        """Keep up with the next node, whose canonical name is given; returns whether it switches the mode."""
        if name == "set_grad_enabled":
            self.records = bool(node.args[0])
        elif name == "enter_inference_mode":
            self._before_inference.append(self.records)
            self.records = self.records and not node.args[0]
        elif name == "exit_inference_mode":
            self.records = self._before_inference.pop() if self._before_inference else True
        else:
            return False
        return True
