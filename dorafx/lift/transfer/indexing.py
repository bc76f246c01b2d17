"""Indexing that only adds axes or takes everything: ``v[None]``, ``v[:, None]``, ``w[...]``."""

from __future__ import annotations

from typing import Any

from torch import fx

from dorafx.graphs.operators import arguments, first_argument
from dorafx.graphs.tensors import tensor_of

from ..lifter import Lifter, transfer
from ..values import Value
from .layout import view


@transfer("getitem")
def getitem(lift: Lifter, node: fx.Node) -> Value | None:
    source, index = node.args[0], node.args[1]
    if isinstance(source, fx.Node) and lift.name_of(source) == "weight_norm_interface" and index == 0:
        return lift.values.get(source)
    # The axes keep their order, so the result is a view with additional axes of size 1.
    return view(lift, node) if takes_everything(index) else None


def takes_everything(index: Any) -> bool:
    """Whether an index only adds axes."""
    items: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    return all(i is None or i is Ellipsis or i == slice(None) for i in items)


@transfer("slice")
def whole_slice(lift: Lifter, node: fx.Node) -> Value | None:
    before, after = tensor_of(first_argument(node)), tensor_of(node)
    if before is None or after is None or arguments(node, "input", "dim", "start", "end", "step").get("step", 1) != 1:
        return None
    return view(lift, node) if tuple(map(str, before.shape)) == tuple(map(str, after.shape)) else None
