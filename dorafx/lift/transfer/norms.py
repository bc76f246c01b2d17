"""Norms and sums of squares along one axis of a matrix."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx

from dorafx.graphs.operators import arguments
from dorafx.graphs.tensors import tensor_of

from ..algebra import Poly
from ..lifter import Lifter, transfer
from ..values import FLOAT_DTYPES, MatrixValue, Value, VectorValue, loses_accuracy
from .arithmetic import inverse_of
from .elementwise import at_least
from .filters import by_input_channel


def _reduced_side(ndim: int, dim: Any) -> Literal["row", "col"] | None:
    """What a reduction of a 2-D tensor gives: one entry for each row (dim 1 is reduced), or one for each column."""
    if isinstance(dim, (tuple, list)):
        if len(dim) != 1:
            return None
        dim = dim[0]
    if ndim != 2 or not isinstance(dim, int):
        return None
    return "row" if dim % 2 == 1 else "col"


def _all_but_first(ndim: int, dim: Any) -> bool:
    if not isinstance(dim, (tuple, list)) or not all(isinstance(d, int) for d in dim):
        return False
    return sorted(d % ndim for d in dim) == list(range(1, ndim))


def _reduction(
    lift: Lifter, node: fx.Node, kind: Literal["norm", "sumsq"], arg: Any, dim: Any, keepdim: bool
) -> Value | None:
    tensor, out = tensor_of(arg), tensor_of(node)
    value = lift.value(arg)
    if tensor is None or not isinstance(value, MatrixValue):
        return None
    if out is None or out.dtype not in FLOAT_DTYPES or node.kwargs.get("dtype") not in (None, *FLOAT_DTYPES):
        return None  # for example, it is summed in integers
    if loses_accuracy(tensor.dtype, out.dtype):
        return None  # it is rounded before it is squared or summed
    if value.squared != (kind == "sumsq"):
        return None
    side = _reduced_side(tensor.dim(), dim)
    axis = -1 if not keepdim or side == "col" else -2
    span = 1
    channels = by_input_channel(lift, value, tensor, dim)
    if channels is not None:
        expr, side, span, kept = channels
        value, axis = replace(value, expr=expr), kept if keepdim else -1
    elif tensor.dim() > 2 and _all_but_first(tensor.dim(), dim):
        filters = value.expr if value.layout == "filter" else lift.as_filters(value.expr, tensor)
        if filters is None:
            return None
        value, side, axis = replace(value, expr=filters), "row", -tensor.dim() if keepdim else -1
    elif value.layout != "last":
        return None
    if side is None:
        return None
    atom = lift.norm_atom(kind, value.expr, side, out.dtype == torch.float64, span)
    if kind == "norm":
        lift.atom_of(atom).sites.append(node)
    return VectorValue(Poly.var(atom), axis)


@transfer("norm", "linalg_norm", "vector_norm")
def norm(lift: Lifter, node: fx.Node) -> Value | None:
    order_name = "p" if "p" in node.kwargs else "ord"
    args = arguments(node, "input", order_name, "dim", "keepdim")
    order = args.get(order_name)
    if order not in (None, 2, 2.0, "fro") or isinstance(order, bool):
        return None
    dim = args.get("dim")
    if lift.name_of(node) == "linalg_norm" and order == 2 and isinstance(dim, (tuple, list)) and len(dim) == 2:
        return None  # the largest singular value
    return _reduction(
        lift,
        node,
        "norm",
        args.get("input", args.get("x", args.get("A"))),
        args.get("dim"),
        bool(args.get("keepdim", False)),
    )


@transfer("mean")
def mean_of_squares(lift: Lifter, node: fx.Node) -> Value | None:
    """``Σ w² / d`` along axes of d elements."""
    args = arguments(node, "input", "dim", "keepdim")
    dim, tensor = args.get("dim"), tensor_of(args.get("input"))
    sums = _reduction(lift, node, "sumsq", args.get("input"), dim, bool(args.get("keepdim", False)))
    if sums is None or tensor is None or args.get("dtype") is not None:
        return None
    axes: Any = dim if isinstance(dim, (tuple, list)) else [dim]
    assert isinstance(sums, VectorValue)
    sizes = [tensor.shape[axis] for axis in axes]
    if not all(isinstance(size, int) and size for size in sizes):
        return None
    return VectorValue(sums.poly.scaled(1.0 / math.prod(sizes)), sums.axis)


@transfer("normalize")
def normalize(lift: Lifter, node: fx.Node) -> Value | None:
    """``w / max(‖w‖, eps)`` along an axis."""
    args = arguments(node, "input", "p", "dim", "eps", "out")
    eps = args.get("eps", 1e-12)
    value = lift.matrix(args.get("input"))
    if args.get("p", 2.0) != 2 or args.get("out") is not None or not isinstance(eps, (int, float)) or value is None:
        return None
    return _over_its_norm(lift, args.get("input"), value, args.get("dim", 1), float(eps), None)


@transfer("weight_norm", "weight_norm_interface")
def weight_norm(lift: Lifter, node: fx.Node) -> Value | None:
    """``g · v / ‖v‖``, the norm over all axes but ``dim``."""
    args = arguments(node, "v", "g", "dim")
    value, gain, dim = lift.matrix(args.get("v")), lift.vector(args.get("g")), args.get("dim", 0)
    if value is None or gain is None or not isinstance(dim, int) or isinstance(dim, bool) or dim not in (0, 1):
        return None  # dim -1 means the norm of the whole tensor
    if gain.axis not in (None, -2 if dim == 0 else -1):
        return None
    return _over_its_norm(lift, args.get("v"), value, 1 - dim, None, gain.poly)


def _over_its_norm(
    lift: Lifter, arg: Any, value: MatrixValue, dim: Any, eps: float | None, gain: Poly | None
) -> Value | None:
    tensor = tensor_of(arg)
    side = _reduced_side(tensor.dim(), dim) if tensor is not None else None
    if side is None:
        return None
    double = tensor is not None and tensor.dtype == torch.float64
    divisor = VectorValue(Poly.var(lift.norm_atom("norm", value.expr, side, double)), -1)
    if eps is not None:
        divisor = at_least(lift, divisor, eps)
    inverse = inverse_of(lift, divisor)
    assert inverse is not None
    scale = inverse.poly if gain is None else inverse.poly * gain
    return MatrixValue(value.expr.left_diag(scale) if side == "row" else value.expr.right_diag(scale))


@transfer("diagonal")
def diagonal(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "offset", "dim1", "dim2")
    axes = {args.get("dim1", 0), args.get("dim2", 1)}
    if args.get("offset", 0) != 0 or axes not in ({0, 1}, {0, -1}, {-2, 1}, {-2, -1}):
        return None
    return diagonal_of_gram(lift, node, args.get("input"))


def diagonal_of_gram(lift: Lifter, node: fx.Node, product: Any) -> Value | None:
    """The diagonal of ``W · Wᵀ``: the sum of squares of each row."""
    out, whole = tensor_of(node), lift.matrix(product)
    if whole is None or lift.name_of(product) != "matmul" or out is None or out.dim() != 1:
        return None
    args = arguments(product, "input", "other")
    first, second = args.get("input"), args.get("other", args.get("mat2"))
    left, right = lift.matrix(first), lift.matrix(second)
    if left is None or right is None or right.expr != left.expr.transposed():
        return None
    factors = lift.operand(first), lift.operand(second, weight=True)
    if factors[0] is None or factors[1] is None or whole.expr != factors[0] @ factors[1]:
        return None
    tensor = tensor_of(args["input"])
    if tensor is None or tensor.dtype != out.dtype:
        return None  # autocast
    return VectorValue(Poly.var(lift.norm_atom("sumsq", left.expr, "row", out.dtype == torch.float64)), -1)


@transfer("sum")
def sum_of_squares(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "dim", "keepdim")
    return _reduction(lift, node, "sumsq", args.get("input"), args.get("dim"), bool(args.get("keepdim", False)))
