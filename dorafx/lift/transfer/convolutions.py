"""Convolutions: products of patches with flattened filters.

``conv(x, W) = U(x) · W_fᵀ``, where ``U(x)`` has the patches of x that the options (kernel, stride, padding, dilation) select, and
``W_f`` is W with all axes after the first flattened. Neither is ever formed. With a kernel of size 1, stride 1 and no padding the
patches are x itself, so PEFT's ``lora_B(lora_A(x))`` is ``U(x) · A_fᵀ · B_fᵀ``.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import fx

from dorafx.graphs.operators import CONVOLUTIONS, arguments
from dorafx.graphs.tensors import tensor_of

from ..algebra import Expr
from ..lifter import Lifter, transfer
from ..values import Gemm, MatrixValue, Patches, Value
from .filters import as_activations
from .products import computes

_CALLS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


@transfer("conv", "convolution")
def convolution(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, *CONVOLUTIONS[lift.name_of(node)])
    x, weight = tensor_of(args.get("input")), tensor_of(args.get("weight"))
    if x is None or weight is None or weight.dim() not in _CALLS or x.dim() != weight.dim():
        return None
    spatial = weight.dim() - 2
    kernel = tuple(weight.shape[2:])
    stride, padding = _each(args.get("stride", 1), spatial), _each(args.get("padding", 0), spatial)
    dilation = _each(args.get("dilation", 1), spatial)
    groups = args.get("groups", 1)
    if not isinstance(groups, int) or args.get("transposed", False) or None in (stride, padding, dilation):
        return None
    if not all(isinstance(k, int) for k in kernel):
        return None
    activations = as_activations(lift, args["input"]) or lift.laid_out(args["input"], "channels")
    filters = lift.laid_out(args["weight"], "filter")
    if activations is None or filters is None:
        return None
    options = (stride, padding, dilation)
    if groups != 1:
        # Each filter is applied to the channels of its own group, so this is no product with one matrix of patches. But it is linear in
        # the filters, row by row. That suffices for a weight that is a single value; the patches are then specific to that weight.
        if len(filters.items) != 1 or len(filters.items[0][0][1]) != 1:
            return None
        activations = Expr.mat(lift.unfold(activations, (kernel, *options, groups, filters)))
    elif kernel != (1,) * spatial or options != ((1,) * spatial, (0,) * spatial, (1,) * spatial):
        patches = Patches(args["input"], kernel, options)
        activations = Expr.mat(lift.unfold(activations, (kernel, *options), patches))
    product = activations @ filters.transposed()
    bias = args.get("bias")
    if not lift.is_convolved(product):
        return MatrixValue(product, layout="channels") if bias is None and groups == 1 else None  # of weights alone
    call = _CALLS[weight.dim()]
    computes(lift, product, Gemm(node, args["input"], args["weight"], True, bias, call, (*options, groups)))
    if bias is not None:
        vector = lift.vector(bias)
        if vector is None or vector.axis != -1:
            return None
        product = product + Expr.broadcast(vector.poly)
    return MatrixValue(product, layout="channels")


def _each(value: Any, spatial: int) -> tuple[int, ...] | str | None:
    """An option for each spatial axis; a padding may be a string."""
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return (value,) * spatial
    if isinstance(value, (tuple, list)) and all(isinstance(v, int) for v in value):
        return tuple(value) * spatial if len(value) == 1 else tuple(value)
    return None
