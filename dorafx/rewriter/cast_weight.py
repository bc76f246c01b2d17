"""Base products by a weight that was cast up for them, as PEFT's with a dropout in front of fp32 adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import fx

from dorafx._compat.distributed import placements
from dorafx.kernels import dies
from dorafx.lift import Gemm, Mat, tensor_of
from dorafx.lift.algebra import Chain
from dorafx.lift.quantized import is_torchao

from .shapes import sizes_of

if TYPE_CHECKING:
    from .emit import Emitter

__all__ = ["base_product"]


def base_product(emit: Emitter, core: Chain, gemm: Gemm) -> fx.Node:
    """A product that the graph has; made anew of the uncast weight where that spares the backward a dense copy of it."""
    copy = emit.copied[gemm.node]
    weight = _uncast_weight(emit, core, gemm)
    out, x, cast = (tensor_of(node) for node in (gemm.node, gemm.lhs, gemm.rhs))
    if weight is None or out is None or x is None or cast is None:
        return copy
    last = core[-1]
    assert isinstance(last, Mat)
    tensor = emit.tensor(weight)
    d_out = tensor.shape[0 if last.transposed else 1]
    if sizes_of(out.shape) != sizes_of((*x.shape[:-1], d_out)):
        return copy
    lhs = emit.operand(gemm.lhs)
    if out.dtype == tensor.dtype:
        # Autocast undoes the cast: the copy is the weight's own values.
        target = torch.nn.functional.linear if last.transposed else torch.matmul
        made = emit.graph.call_function(target, (lhs, weight))
        made.meta = dict(copy.meta)  # not by running it: the region's autocast is not on here
        return made
    if out.dtype == x.dtype == cast.dtype and out.requires_grad:
        weight = weight if last.transposed else emit.method("t", weight)
        return emit.call(torch.ops.dorafx.cast_linear.default, lhs, weight)
    return copy


def _uncast_weight(emit: Emitter, core: Chain, gemm: Gemm) -> fx.Node | None:
    """The weight, if it is a frozen input of the graph that the product reads in a higher precision than its own."""
    last = core[-1]
    if gemm.bias is not None or gemm.convolution is not None or not isinstance(last, Mat) or last.atom.detached:
        return None
    node, lift = emit.lift.atom_of(last.atom).node, emit.lift
    weight, cast = tensor_of(node) if node is not None else None, tensor_of(gemm.rhs)
    if node is None or node.op not in ("placeholder", "get_attr") or weight is None or cast is None:
        return None
    if weight.dim() != 2 or weight.requires_grad or is_torchao(weight) or placements(weight) is not None:
        return None
    if not weight.is_floating_point() or weight.dtype.itemsize >= cast.dtype.itemsize:
        return None
    assert emit.site is not None
    if not lift.written.isdisjoint((node, gemm.lhs)) or not dies(gemm.node, emit.site, emit.order):
        return None
    return emit.operand(node)
