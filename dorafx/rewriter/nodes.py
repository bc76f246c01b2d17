"""New nodes in a copy of a graph, with the provenance and the fake values that a tracer would have given them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import fx

from dorafx._compat.autocast import enter_autocast, exit_autocast
from dorafx._compat.autograd import below_autocast
from dorafx._compat.tensors import fake_mode_of
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Atom, Lifter
from dorafx.lift.quantized import is_torchao
from dorafx.match import Reason, ReasonKind

from .fake_values import FakeValues


class CannotEmit(Exception):
    """A part of the plan cannot be carried out; the message is the reason that is logged. The graph copy is thrown away.

    Attributes:
        kind: of the reason.
        site: the original node whose replacement failed.
    """

    def __init__(self, text: str, kind: ReasonKind = ReasonKind.NOT_EMITTED) -> None:
        super().__init__(text)
        self.kind = kind
        self.site: fx.Node | None = None

    @property
    def reason(self) -> Reason:
        """Why the site is left alone."""
        return Reason(str(self), self.site, kind=self.kind)


@functools.cache  # FakeValues tells functions by identity
def tensor_method(name: str) -> Callable[..., Any]:
    """Calls the method of the tensor's own class: ``torch.Tensor.dequantize`` is not what a torchao weight has."""
    return lambda tensor, *args, **kwargs: getattr(tensor, name)(*args, **kwargs)


@contextmanager
def gradients_as_of(value: Any) -> Iterator[None]:
    """Record gradients where they are recorded for a value of the graph, also if the graph is called with them switched off and switches
    them on itself."""
    off = not torch.is_grad_enabled() or torch.is_inference_mode_enabled()
    if off and getattr(value, "requires_grad", False):
        with torch.inference_mode(False), torch.enable_grad():
            yield
    else:
        yield


class NodeEmitter:
    """Makes nodes at a site of a copied graph, and reads the original's there.

    Args:
        lift: the terms of the original graph.
        graph: the copy.
        copied: original node -> its node in the copy; a rewritten node maps to its replacement.
    """

    def __init__(self, lift: Lifter, graph: fx.Graph, copied: dict[fx.Node, fx.Node]) -> None:
        self.lift = lift
        self.graph = graph
        self.copied = copied
        self.order = {node: i for i, node in enumerate(lift.graph.nodes)}
        self.site: fx.Node | None = None
        self._fake_values = FakeValues()
        self._unrounded: FakeValues | None = None
        """In :meth:`unrounded` what takes the place of the above, which knows of no context."""

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self._created(self.graph.call_function(target, args, kwargs), target)

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        return self._created(self.graph.call_method(name, args, kwargs), tensor_method(name))

    def _created(self, node: fx.Node, target: Callable[..., Any]) -> fx.Node:
        """Give a new node the provenance of the site and a fake value, as a tracer would have."""
        assert self.site is not None
        for key in ("nn_module_stack", "stack_trace", "source_fn_stack"):
            if key in self.site.meta:
                node.meta[key] = self.site.meta[key]
        slot = "example_value" if "example_value" in self.site.meta else "val"
        value = self.site.meta.get(slot)
        mode = fake_mode_of(value)
        if mode is not None:
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta.get(slot))
            with gradients_as_of(value), nullcontext() if self._unrounded is None else below_autocast():
                node.meta[slot] = (self._unrounded or self._fake_values)(target, args, kwargs, mode)
        return node

    @contextmanager
    def unrounded(self) -> Iterator[None]:
        """Make nodes in a region of their own, in which autocast is off."""
        tensor = tensor_of(self.site)
        assert tensor is not None
        entered = self.graph.call_function(enter_autocast, (tensor.device.type, None, False, None))
        self._unrounded = FakeValues()
        try:
            yield
        finally:
            self._unrounded = None
        self.graph.call_function(exit_autocast, (entered,))

    def operand(self, node: fx.Node, detached: bool = False) -> fx.Node:
        """The copy of an original node, for reading at the site."""
        assert self.site is not None
        if node in self.lift.written:
            what = f"{node.name} is written in place, so it cannot be read again"
            raise CannotEmit(what, ReasonKind.WRITTEN_IN_PLACE)
        if self.order[node] >= self.order[self.site]:
            raise CannotEmit(f"{node.name} is computed after {self.site.name}")
        copy = self.copied[node]
        return self.method("detach", copy) if detached else copy

    def atom(self, atom: Atom) -> fx.Node:
        info = self.lift.atom_of(atom)
        if info.node is None or info.kind == "channels":
            raise CannotEmit("a factor of the product is no value of the graph")
        node = self.operand(info.node, atom.detached)
        if is_torchao(tensor_of(info.node)):
            node = self.method("dequantize", node)
        return self.method("flatten", node, 1) if info.kind == "filter" else node

    def tensor(self, node: fx.Node) -> torch.Tensor:
        value = tensor_of(node)
        if value is None:
            raise CannotEmit(f"{node.name} carries no shape")
        return value

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        return node if self.tensor(node).dtype == dtype else self.method("to", node, dtype)
