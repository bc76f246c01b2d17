"""Whether gradients are recorded at a node, given the nodes of its graph that switch modes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx

from .operators import canonical_name


def switches_gradients_on(gm: fx.GraphModule) -> bool:
    """Whether a graph, or one inside it, enables gradients somewhere, whatever the mode in which it is called."""
    graphs = (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))
    return any(not _SWITCHED_ON.isdisjoint(_switches(graph)) for graph in graphs)


def _switches(graph: fx.Graph) -> set[tuple[str | None, bool]]:
    """How a graph switches modes: the operators, with the mode that each sets."""
    return {
        (canonical_name(node), node.args[0]) for node in graph.nodes if node.args and isinstance(node.args[0], bool)
    }


# ``inference_mode(False)`` enables gradients, even inside ``no_grad``.
_LEAVES_INFERENCE = ("enter_inference_mode", False)
_SWITCHED_ON = frozenset((("set_grad_enabled", True), _LEAVES_INFERENCE))


class GradMode:
    """Follows the modes of a graph from its first node on.

    A graph that enables gradients starts in the current mode: Dynamo calls a backend in the mode in which the graph will be called. Any
    other graph records nothing when it is called with gradients disabled, so it is followed as if gradients were enabled, unless
    ``of_caller`` asks for the current mode in any case.
    """

    def __init__(self, graph: fx.Graph, of_caller: bool = False) -> None:
        switches = _switches(graph)
        self._began_enabled = torch.is_grad_enabled()
        self._leaves_inference = _LEAVES_INFERENCE in switches
        switches_on = not _SWITCHED_ON.isdisjoint(switches)
        self.may_record = self._began_enabled or switches_on
        """Whether gradients are recorded anywhere, if the graph is called in the current mode."""
        followed = of_caller or switches_on
        self._enabled = not followed or self._began_enabled
        self._inference = followed and torch.is_inference_mode_enabled()
        self._outside: list[tuple[bool, bool]] = []

    @property
    def records(self) -> bool:
        """Whether gradients are recorded at the last node that was followed."""
        return self._enabled and not self._inference

    @property
    def inference(self) -> bool:
        """Whether inference mode is, or may be, on at the last node that was followed. Dynamo switches it off while it compiles, so a
        graph that leaves inference mode may have started in it."""
        return self._inference or (self._leaves_inference and not self._outside and not self._began_enabled)

    def follow(self, node: fx.Node, name: str | None) -> bool:
        """Follow the next node, which has this canonical name; returns whether it switches the mode."""
        if name == "set_grad_enabled":
            self._enabled = bool(node.args[0])
        elif name == "enter_inference_mode":
            # Unlike this, ``set_grad_enabled(True)`` does not enable gradients inside ``inference_mode()``.
            self._outside.append((self._enabled, self._inference))
            self._inference = bool(node.args[0])
            self._enabled = not self._inference
        elif name == "exit_inference_mode":
            self._enabled, self._inference = self._outside.pop() if self._outside else (True, False)
        else:
            return False
        return True

    @contextmanager
    def entered(self) -> Iterator[None]:
        """A context in which the thread has the mode at the last node that was followed."""
        with torch.inference_mode(self._inference), torch.set_grad_enabled(self._enabled):
            yield


def modes_of_bodies(graph: fx.Graph) -> dict[str, GradMode]:
    """The modes in which the higher-order operators of a graph run their bodies, by the bodies' names; one walk over the graph."""
    mode = GradMode(graph, of_caller=True)
    modes: dict[str, GradMode] = {}
    for node in graph.nodes:
        mode.follow(node, canonical_name(node))
        for argument in node.all_input_nodes:
            if argument.op == "get_attr" and argument.target not in modes:
                modes[str(argument.target)] = copy.copy(mode)
    return modes
