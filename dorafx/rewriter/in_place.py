"""Compositions written over the base product, in graphs that are run as they stand and record no gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dorafx.graphs.operators import canonical_name
from dorafx.graphs.shapes import sizes_of
from dorafx.graphs.tensors import tensor_of

# Operators whose result is a fresh tensor, so that a write to it is seen by nobody else.
_FRESH = frozenset({"linear", "matmul", "addmm", "conv"})
_VIEWS = frozenset({"flatten", "movedim", "reshape", "reshape_as"})
_FORMS = {
    torch.ops.dorafx.compose.default: torch.ops.dorafx.compose_.default,
    torch.ops.dorafx.compose_delta.default: torch.ops.dorafx.compose_delta_.default,
}


def reuse_buffers(gm: fx.GraphModule) -> int:
    """Let each composition overwrite its first operand where that is a product that nobody else reads.

    Args:
        gm: changed in place. Gradients must not be recorded when it is run, for which the caller looks.

    Returns:
        How many compositions were changed.
    """
    if any(canonical_name(node) in ("set_grad_enabled", "enter_inference_mode") for node in gm.graph.nodes):
        return 0
    count = 0
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in _FORMS:
            continue
        target: Any = _FORMS[node.target]
        operand = node.args[0]
        dtype = next(a for a in node.args if isinstance(a, torch.dtype))
        tensor, out = tensor_of(operand), tensor_of(node)
        if (
            tensor is None
            or out is None
            or tensor.dtype != dtype
            or sizes_of(tensor.shape) != sizes_of(out.shape)
            or not _belongs_to(operand, node)
        ):
            continue
        with gm.graph.inserting_before(node):
            # After the dtype come the kernel, which has no part in this, and what else there is.
            place = node.args.index(dtype)
            gm.graph.call_function(target, (*node.args[:place], *node.args[place + 2 :]))
        node.replace_all_uses_with(operand)
        gm.graph.erase_node(node)
        count += 1
    if count:
        gm.graph.lint()
        gm.recompile()
    return count


def _belongs_to(operand: fx.Node, reader: fx.Node) -> bool:
    """Whether an operand, or what it is a view of, is a product that ``reader`` alone reads, once."""
    if list(operand.users) != [reader] or reader.args.count(operand) != 1:
        return False
    if operand.op == "call_method" and operand.target in _VIEWS:
        source = operand.args[0]
        return isinstance(source, fx.Node) and _belongs_to(source, operand)
    return canonical_name(operand) in _FRESH
