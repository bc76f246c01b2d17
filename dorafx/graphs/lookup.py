"""Identifies operators that are not in the table of names, as far as torch itself can tell.

Tracers choose the names: what is a method in one release of torch is an operator in the next (``.T`` became ``numpy_T``). So an unknown
operator is looked up by the name that torch gives it. If its result shares its argument's memory, it is identified by how the result
lies in that memory, which is all there is to know of a view.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

from dorafx._compat import operators
from dorafx._compat.autograd import differentiates_by_itself
from dorafx._compat.tensors import size_hint, storage_id, version_of
from dorafx.graphs.tensors import tensor_of


class View(NamedTuple):
    """How a result lies in the memory of the one tensor that an operator takes.

    ``name``: ``"identity"``, ``"detach"``, ``"data"`` (detached, and autograd does not see writes to it), ``"t"`` (of a matrix),
    ``"permute"`` or ``"view"`` (another shape, elements in the same order).
    ``order``: for ``"permute"``, the argument's axes in the order of the result's.
    """

    name: str
    order: tuple[int, ...] = ()


def name_in_torch(target: Any) -> str | None:
    """The name under which torch itself defines a function, a property of tensors or a packet of overloads. None for anything that
    torch does not generate from its operators: a Python function of the same name may be something else (``torch.masked.sum``)."""
    packet = operators.packet_name(target)
    if packet is not None:
        return packet
    if isinstance(target, types.MethodWrapperType):  # of a property of tensors, as ``Tensor.T.__get__``
        target = target.__self__
    owner = getattr(target, "__objclass__", None)
    if owner is None and isinstance(target, types.BuiltinFunctionType):
        owner = target.__self__ if isinstance(target.__self__, type) else target
    home = getattr(owner, "__module__", None) or getattr(owner, "__name__", None)
    return target.__name__ if isinstance(home, str) and home.partition(".")[0] == "torch" else None


def view_of(node: fx.Node) -> View | None:
    """How the result of an operator lies in the memory of its only tensor argument; None if it does anything but create views."""
    view = _view_by_memory(node)
    gradients = _makes_views(node) if view is not None else None
    if view is None or gradients is None:
        return None
    if gradients == "kept":
        return view
    return View(gradients) if view.name == "identity" else None


def _operand(node: fx.Node) -> torch.Tensor | None:
    inputs = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or len(inputs) != 1:
        return None
    if sum(argument is inputs[0] for argument in (*node.args, *node.kwargs.values())) != 1:
        return None
    return tensor_of(inputs[0])


def _view_by_memory(node: fx.Node) -> View | None:
    source, result = _operand(node), tensor_of(node)
    if source is None or result is None or source.dtype != result.dtype or source.layout != result.layout:
        return None
    if source.layout is not torch.strided or type(source) is not type(result):
        return None
    if storage_id(source) != storage_id(result):
        return None
    if source.is_conj() != result.is_conj() or source.is_neg() != result.is_neg():
        return None
    if str(source.storage_offset()) != str(result.storage_offset()):
        return None
    before, after = _axes(source), _axes(result)
    if before == after:
        return View("identity")
    if len(before) == len(after):
        if len(before) == 2 and before == after[::-1]:
            return View("t")
        order = _order(before, after)
        if order is not None:
            return View("permute", order)
    same_order = source.is_contiguous() and result.is_contiguous() and str(source.numel()) == str(result.numel())
    if same_order or _long(before) == _long(after):
        return View("view")
    return None


def _axes(tensor: torch.Tensor) -> list[tuple[str, str]]:
    """Length and stride of each axis; only the length if it is 1, because the stride then means nothing."""
    return [(str(n), "" if str(n) == "1" else str(s)) for n, s in zip(tensor.shape, tensor.stride())]


def _long(axes: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [axis for axis in axes if axis[0] != "1"]


def _order(before: list[tuple[str, str]], after: list[tuple[str, str]]) -> tuple[int, ...] | None:
    left = list(range(len(before)))
    order = []
    for axis in after:
        position = next((i for i in left if before[i] == axis), None)
        if position is None:
            return None
        left.remove(position)
        order.append(position)
    return tuple(order)


def _makes_views(node: fx.Node) -> str | None:
    """What an operator does to gradients, found by running it on a tensor without data: ``"kept"``, ``"detach"`` or ``"data"``. None if it
    calls anything but views that have autograd's own formulas (a custom formula may define any gradient)."""
    source = tensor_of(node.all_input_nodes[0])
    assert source is not None
    try:
        shape = tuple(int(size_hint(n)) for n in source.shape)
        strides = tuple(int(size_hint(s)) for s in source.stride())
        arguments = tuple(_HERE if isinstance(a, fx.Node) else a for a in node.args)
        keywords = tuple((k, _HERE if isinstance(a, fx.Node) else a) for k, a in node.kwargs.items())
        target: Any = getattr(torch.Tensor, node.target) if node.op == "call_method" else node.target  # type: ignore[arg-type]
        return _runs_views(target, arguments, keywords, shape, strides, source.dtype)
    except Exception:
        return None  # a size without a hint, an argument that cannot be hashed, an operator that needs data


_HERE = "<the tensor>"


@functools.lru_cache(maxsize=1024)
def _runs_views(
    target: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: tuple[tuple[str, Any], ...],
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
) -> str | None:
    calls: list[Any] = []
    with torch.enable_grad(), torch.inference_mode(False), operators.recorded_calls(calls):
        tensor = torch.empty_strided(shape, strides, dtype=dtype, device="meta", requires_grad=dtype.is_floating_point)
        calls.clear()
        result = target(
            *(tensor if a is _HERE else a for a in arguments), **{k: tensor if a is _HERE else a for k, a in keywords}
        )
    if not all(operators.views(call) and not operators.writes(call) for call in calls):
        return None
    if not isinstance(result, torch.Tensor) or not (calls or result is tensor):
        return None  # the wrappers of torch.func's transforms call nothing
    if not tensor.requires_grad:
        return "kept"
    if result.requires_grad:
        return "kept" if differentiates_by_itself(result) else None
    version = version_of(tensor)
    torch.autograd.graph.increment_version(result)
    return "detach" if version_of(tensor) != version else "data"
