"""Results that are no views where the original's are none, in graphs that are run as they stand.

A caller may do less to a view in place: nothing, if it was made with gradients switched off and they are on again; and never
``detach_()``. Graphs that AOT autograd compiles need none of this: their results are views of no tensor that the caller has.
"""

from __future__ import annotations

import torch
from torch import fx

from dorafx._compat.distributed import placements
from dorafx.graphs.tensors import tensor_of
from dorafx.graphs.writes import nodes_in, written_arguments
from dorafx.ops import layout

from .memory import is_view


def replace_view_results(original: fx.GraphModule, gm: fx.GraphModule) -> int:
    """Let no result of a graph be a view of another tensor where the original's is none.

    Args:
        original: the graph before the rewrite.
        gm: the rewritten graph, with the same results; changed in place.

    Returns:
        How many results were replaced.
    """
    replaced: set[fx.Node] = set()
    originals, results = (graph.find_nodes(op="output")[0].args[0] for graph in (original.graph, gm.graph))
    if not isinstance(originals, (tuple, list)) or not isinstance(results, (tuple, list)):
        originals, results = (originals,), (results,)
    for original_result, result in zip(originals, results):
        if not isinstance(original_result, fx.Node) or not isinstance(result, fx.Node) or result in replaced:
            continue
        if _is_view(original_result) or not _is_view(result):
            continue
        tensor = tensor_of(result)
        if tensor is None or placements(tensor) is not None:
            continue
        replaced.add(result)
        readers = list(result.users)
        with gm.graph.inserting_after(result):
            replacement = _non_view(gm.graph, result, tensor)
        replacement.meta.update(result.meta)
        for reader in readers:
            reader.replace_input_with(result, replacement)
    if replaced:
        gm.graph.lint()
        gm.recompile()
    return len(replaced)


def _is_view(node: fx.Node) -> bool:
    if node.op == "call_method" and node.target in _VIEWS:
        return True  # whatever memory its fake value has: that is from before copies and compositions in place
    written = [n for argument in written_arguments(node) for n in nodes_in(argument)]
    # What a write in place returns is its operand.
    return any(map(_is_view, written)) if written else is_view(node)


# What the rewrite emits.
_VIEWS = frozenset(
    {"as_strided", "detach", "flatten", "movedim", "permute", "reshape", "reshape_as", "t", "unflatten", "unsqueeze"}
)


def _non_view(graph: fx.Graph, result: fx.Node, tensor: torch.Tensor) -> fx.Node:
    if list(map(str, tensor.stride())) != list(map(str, layout.strides(tensor.shape))):
        # ``_unsafe_view`` to the same size would give axes of one element other strides.
        return graph.call_method("clone", (result,))
    # The same memory, but no view to autograd.
    size = graph.call_method("size", (result,))
    with graph.inserting_after(size):
        return graph.call_function(torch.ops.aten._unsafe_view.default, (result, size))
