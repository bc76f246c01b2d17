"""Indexing that only adds axes or takes everything: ``v[None]``, ``v[:, None]``, ``w[...]``."""

from __future__ import annotations

from collections.abc import Sequence
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
    tensor = tensor_of(source)
    if tensor is not None and _takes_all_of(index, tensor.shape):
        return view(lift, node)
    return None


def _takes_all_of(index: Any, shape: Sequence[Any]) -> bool:
    """Whether an index adds axes, or drops those of one element, and nothing else: ``n[:, 0]`` of ``[d, 1]``."""
    items: tuple[Any, ...] = index if isinstance(index, tuple) else (index,)
    if any(not isinstance(i, (int, slice)) and i is not None and i is not Ellipsis for i in items):
        return False
    before, _, after = _around_ellipsis([i for i in items if i is not None])
    places = [*zip(before, shape), *zip(reversed(after), reversed(shape))]
    if len(before) + len(after) > len(shape):
        return False
    return all(i == slice(None) or (type(i) is int and i in (0, -1) and type(n) is int and n == 1) for i, n in places)


def _around_ellipsis(items: list[Any]) -> tuple[list[Any], bool, list[Any]]:
    """The items before and behind an ellipsis; all are before it where there is none."""
    at = next((k for k, item in enumerate(items) if item is Ellipsis), None)
    return (items, False, []) if at is None else (items[:at], True, items[at + 1 :])


@transfer("select")
def select(lift: Lifter, node: fx.Node) -> Value | None:
    """The only element of an axis."""
    args, before = arguments(node, "input", "dim", "index"), tensor_of(first_argument(node))
    dim, index = args.get("dim"), args.get("index")
    if before is None or not isinstance(dim, int) or not isinstance(index, int) or index not in (0, -1):
        return None
    size = before.shape[dim]
    return view(lift, node) if type(size) is int and size == 1 else None


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
