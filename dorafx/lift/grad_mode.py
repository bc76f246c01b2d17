"""Whether gradients are recorded where a node stands, as the nodes of its graph switch that."""

from __future__ import annotations

from torch import fx

__all__ = ["GradMode"]


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
