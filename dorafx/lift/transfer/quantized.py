"""Dequantisation of a tensor subclass."""

from __future__ import annotations

from torch import fx

from dorafx.graphs.tensors import tensor_of

from ..lifter import Lifter, transfer
from ..quantized import is_torchao
from ..values import Value


@transfer("dequantize")
def dequantize(lift: Lifter, node: fx.Node) -> Value | None:
    """A torchao weight multiplies like its dequantised value, so both are one indeterminate. Any other dequantisation is an
    indeterminate of its own."""
    source = node.args[0] if node.args else None
    before, after = tensor_of(source), tensor_of(node)
    if before is None or after is None or not is_torchao(before) or len(node.args) > 1 or node.kwargs:
        return None
    return lift.value(source) if before.dtype == after.dtype else None
