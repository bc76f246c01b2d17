"""Norms and sums of squares along one axis of a matrix."""

from __future__ import annotations

from typing import Any, Literal

from torch import fx

from ..algebra import Poly
from ..lifter import Lifter, tensor_of, transfer
from ..targets import arguments
from ..values import AtomInfo, MatrixValue, Value, VectorValue


def _reduced_side(ndim: int, dim: Any) -> Literal["row", "col"] | None:
    """Which vector a reduction of a 2-D tensor gives: one entry a row (dim 1 is summed) or a column."""
    if isinstance(dim, (tuple, list)):
        if len(dim) != 1:
            return None
        dim = dim[0]
    if ndim != 2 or not isinstance(dim, int):
        return None
    return "row" if dim % 2 == 1 else "col"


def _reduction(
    lift: Lifter, node: fx.Node, kind: Literal["norm", "sumsq"], arg: Any, dim: Any, keepdim: bool
) -> Value | None:
    tensor = tensor_of(arg)
    value = lift.value(arg)
    if tensor is None or not isinstance(value, MatrixValue):
        return None
    if value.squared != (kind == "sumsq"):
        return None
    side = _reduced_side(tensor.dim(), dim)
    if side is None:
        return None
    info = AtomInfo(
        kind, lift.requires_grad(value.expr), lift.is_parameter_term(value.expr), expr=value.expr, side=side
    )
    atom = lift.intern(info)
    if kind == "norm":
        lift.atom_of(atom).sites.append(node)
    axis = -1 if not keepdim or side == "col" else -2
    return VectorValue(Poly.var(atom), axis)


@transfer("norm", "linalg_norm", "vector_norm")
def norm(lift: Lifter, node: fx.Node) -> Value | None:
    order_name = "p" if "p" in node.kwargs else "ord"
    args = arguments(node, "input", order_name, "dim", "keepdim")
    order = args.get(order_name)
    if order not in (None, 2, 2.0, "fro") or isinstance(order, bool):
        return None
    return _reduction(
        lift,
        node,
        "norm",
        args.get("input", args.get("x", args.get("A"))),
        args.get("dim"),
        bool(args.get("keepdim", False)),
    )


@transfer("sum")
def sum_of_squares(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "dim", "keepdim")
    return _reduction(lift, node, "sumsq", args.get("input"), args.get("dim"), bool(args.get("keepdim", False)))
