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
        self._enabled = True
        self._inference = False
        self._outside: list[tuple[bool, bool]] = []

    @property
    def records(self) -> bool:
        """Whether gradients are recorded at the node that was followed last."""
        return self._enabled and not self._inference

    def follow(self, node: fx.Node, name: str | None) -> bool:
        """Keep up with the next node, whose canonical name is given; returns whether it switches the mode."""
        if name == "set_grad_enabled":
            self._enabled = bool(node.args[0])
        elif name == "enter_inference_mode":
            # ``inference_mode(False)`` enables gradients, also below ``no_grad``; ``set_grad_enabled(True)`` does not below
            # ``inference_mode()``.
            self._outside.append((self._enabled, self._inference))
            self._inference = bool(node.args[0])
            self._enabled = not self._inference
        elif name == "exit_inference_mode":
            self._enabled, self._inference = self._outside.pop() if self._outside else (True, False)
        else:
            return False
        return True
