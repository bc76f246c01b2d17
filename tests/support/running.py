"""Runs of a zoo model: in fp64 throughout, under counters, and as a graph given to a code generator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import dorafx.backend  # noqa: F401  (PEFT's polyfills: a collecting backend by itself brings none)
from dorafx.options import Options
from dorafx.pipeline import rewrite_graph


class InDouble(TorchFunctionMode):
    """fp64 also where a model's source says fp32 whatever the model's dtype: norms, softmax, rotary angles. An fp64
    reference that rounds there as the programs under test do would hide part of their error, and be the cause of some."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double

        def widened(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        return func(*tree_map(widened, args), **tree_map(widened, kwargs or {}))


@dataclass
class Run:
    """One forward and backward: logits, loss, and the gradients of what is trained, as they came."""

    logits: torch.Tensor
    loss: float
    gradients: dict[str, torch.Tensor]


def run(
    call: Callable[..., Any], model: torch.nn.Module, inputs: dict[str, torch.Tensor], loss_scale: float = 1.0
) -> Run:
    """``call`` is the model or what was compiled of it. ``loss_scale`` multiplies all gradients."""
    model.zero_grad(set_to_none=True)
    out = call(**inputs)
    (out.loss * loss_scale).backward()
    gradients = {n: p.grad.detach().clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return Run(out.logits.detach().clone(), out.loss.item(), gradients)


def relative_squares(got: Run, exact: Run) -> dict[str, float]:
    """Squared error relative to the squared size, of the logits and of the gradient of each parameter."""
    assert got.gradients.keys() == exact.gradients.keys()
    found = {"logits": (got.logits, exact.logits)}
    found.update((name, (got.gradients[name], wanted)) for name, wanted in exact.gradients.items())
    return {
        what: float((value.double() - wanted).square().sum() / wanted.square().sum())
        for what, (value, wanted) in found.items()
        # A softmax does not see the bias of its keys: of a gradient that is zero in exact arithmetic, fp64 has only rounding.
        if float(wanted.square().sum()) > 1e-24
    }


class Collecting:
    """A backend that keeps each graph it is given, rewritten unless ``rewrite`` is off, and runs the kept one."""

    def __init__(self, rewrite: bool = True, counter: FlopCounterMode | None = None) -> None:
        self.rewrite = rewrite
        self.counter = counter
        self.graphs: list[fx.GraphModule] = []

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        kept = (
            rewrite_graph(gm, Options(strict=True, codegen="eager"), len(self.graphs) + 1).graph if self.rewrite else gm
        )
        self.graphs.append(kept)
        if self.counter is None:
            return kept.forward

        def counted(*args: Any) -> Any:
            # Dynamo runs nothing compiled under a counting mode, so the mode is entered around the graph.
            with self.counter:
                return kept(*args)

        return counted

    def nodes(self) -> Iterator[fx.Node]:
        """Nodes of every graph, bodies of higher-order operators included."""
        for kept in self.graphs:
            for module in kept.modules():
                if isinstance(module, fx.GraphModule):
                    yield from module.graph.nodes


def roots(node: fx.Node) -> set[fx.Node]:
    """The placeholders that a node is computed from."""
    found: set[fx.Node] = set()
    stack, seen = [node], {node}
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
            found.add(current)
        new = [a for a in current.all_input_nodes if a not in seen]
        seen.update(new)
        stack.extend(new)
    return found
