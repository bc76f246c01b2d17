"""Lower what a rewrite emitted to aten operators, for programs that hold nothing else: exported ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from dorafx._compat.operators import is_higher_order, is_overload
from dorafx._compat.tensors import under
from dorafx.graphs.copying import copy_graph_module
from dorafx.graphs.shapes import of_mode
from dorafx.graphs.tensors import tensor_of
from dorafx.ops.batched import row_norm_batched_unrolled
from dorafx.ops.norm import row_norm_unrolled
from dorafx.ops.quantized import dequantize_unrolled, row_norm_quantized_unrolled
from dorafx.ops.register import DECOMPOSITIONS

_ALL_DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    **DECOMPOSITIONS,
    torch.ops.dorafx.row_norm.default: row_norm_unrolled,
    torch.ops.dorafx.row_norm_batched.default: row_norm_batched_unrolled,
    torch.ops.dorafx.row_norm_quantized.default: row_norm_quantized_unrolled,
    torch.ops.dorafx.dequantize.default: dequantize_unrolled,
}


def lower_to_aten(gm: fx.GraphModule) -> None:
    """Replace Tensor methods and torch functions by the aten operators that they call, also in the bodies of higher-order operators,
    and leave the rest as it is.

    Args:
        gm: changed in place. Its nodes carry fake values (``meta["val"]``), as those of exported programs do.
    """
    for module in gm.modules():
        nodes = list(module.graph.nodes) if isinstance(module, fx.GraphModule) else []
        calls = [
            n for n in nodes if n.op == "call_method" or (n.op == "call_function" and _is_torch_function(n.target))
        ]
        if not calls or not isinstance(module, fx.GraphModule):
            continue
        for node in calls:
            _lower(module.graph, node)
        module.graph.lint()
        module.recompile()


def _is_torch_function(target: Any) -> bool:
    return (
        not is_higher_order(target)
        and not is_overload(target)
        and (getattr(target, "__module__", None) or "torch").split(".")[0] == "torch"
    )


def dorafx_operators(gm: fx.GraphModule) -> list[str]:
    """The names of dorafx's operators that a graph and the bodies of its higher-order operators call."""
    graphs = (module.graph for module in gm.modules() if isinstance(module, fx.GraphModule))
    targets = {n.target for graph in graphs for n in graph.nodes if n.op == "call_function"}
    return sorted(str(t) for t in targets if is_overload(t) and t.namespace == "dorafx")


def without_dorafx_operators(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy with dorafx's operators written out in aten, also in the bodies of higher-order operators.

    Args:
        gm: not changed. Its nodes carry fake values, as :func:`lower_to_aten` needs them.
    """
    new, _ = copy_graph_module(gm)
    for name, child in list(new.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(new, name, without_dorafx_operators(child))
    for node in list(new.graph.nodes):
        if node.op == "call_function" and node.target in _ALL_DECOMPOSITIONS:
            _lower(new.graph, node, _ALL_DECOMPOSITIONS[node.target])
    new.graph.lint()
    new.recompile()
    return new


def _lower(graph: fx.Graph, node: fx.Node, function: Callable[..., Any] | None = None) -> None:
    """Replace a node by what it calls, or by what ``function`` calls in its place."""
    inputs = [n for n in node.all_input_nodes if tensor_of(n) is not None]

    def call(*values: torch.Tensor) -> Any:
        value_of = dict(zip(inputs, values))
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        target = function or node.target
        assert callable(target)
        return target(*args, **kwargs)

    fake_values = [tensor_of(n) for n in inputs]
    mode = next((m for m in (getattr(value, "fake_mode", None) for value in fake_values) if m is not None), None)
    slots = [slot for slot in ("example_value", "val") if slot in node.meta] or ["val"]
    with under(mode):
        values = [of_mode(value, mode) for value in fake_values]
        traced = make_fx(call, pre_dispatch=True)(*values)
    copies: dict[fx.Node, Any] = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), inputs))
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op == "placeholder":
                continue
            if inner.op == "output":
                result = copies[inner.args[0]]
                break
            copies[inner] = graph.node_copy(inner, copies.__getitem__)
            copies[inner].meta = {**node.meta, **{slot: inner.meta.get("val") for slot in slots}}
    node.replace_all_uses_with(result)
    graph.erase_node(node)
