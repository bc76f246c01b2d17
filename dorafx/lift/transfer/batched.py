"""Batches of matrices: a sum over a stack, and one matrix repeated for each entry of a batch."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from dorafx.graphs.operators import arguments, canonical_name, first_argument
from dorafx.graphs.tensors import tensor_of

from ..lifter import Lifter, Reading, transfer
from ..values import MatrixValue, Value
from .arithmetic import Operand, added, same_shape
from .products import product_of


@transfer("stack")
def stack(lift: Lifter, node: fx.Node) -> Value | None:
    """There is no term for the stack itself; it is noted for a sum over it."""
    args = arguments(node, "tensors", "dim")
    tensors = args.get("tensors")
    if not isinstance(tensors, (list, tuple)) or args.get("dim", 0) != 0 or args.get("out") is not None:
        return None
    total: Operand | None = None
    for argument in tensors:
        value, tensor = lift.matrix(argument), tensor_of(argument)
        if value is None or tensor is None:
            return None
        part = Operand(value, tuple(tensor.shape), None)
        total = part if total is None else part._replace(value=added(total, part, 1.0))
    if total is not None and isinstance(total.value, MatrixValue):
        lift.stacked[node] = (lift.recorded(total.value), len(tensors))
    return None


@transfer("sum", "mean", reading=Reading.STACK)
def over_the_stack(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "dim", "keepdim")
    source, dim = args.get("input"), args.get("dim")
    known, tensor = lift.aside(lift.stacked, source), tensor_of(source)
    dims = list(dim) if isinstance(dim, (list, tuple)) else [dim]
    first = tensor is not None and dims in ([0], [-tensor.dim()])
    if known is None or not first or args.get("keepdim") or args.get("dtype") is not None:
        return None
    value, count = known
    is_mean = canonical_name(node) == "mean"
    return replace(value, expr=value.expr.scaled(1.0 / count)) if is_mean else value


@transfer("expand", reading=Reading.STACK)
def repeated(lift: Lifter, node: fx.Node) -> Value | None:
    """There is no term for the batch itself; the repeated matrix is noted for operators that read it."""
    source, after = first_argument(node), tensor_of(node)
    before, value = tensor_of(source), lift.matrix(source)
    if before is not None and after is not None and value is not None and after.dim() == 3 and before.dim() in (2, 3):
        one = before.dim() == 2 or str(before.shape[0]) == "1"
        if one and same_shape(tuple(before.shape[-2:]), tuple(after.shape[-2:])):
            lift.repeated[node] = lift.recorded(value)
    return None


@transfer("bmm")
def bmm(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "mat2")
    product = product_of(lift, node, args.get("input"), args.get("mat2"), False)
    return MatrixValue(product) if product is not None else None


@transfer("baddbmm")
def baddbmm(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "batch1", "batch2")
    beta, alpha = args.get("beta", 1), args.get("alpha", 1)
    total, out = tensor_of(args.get("input")), tensor_of(node)
    if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)) or total is None or out is None:
        return None
    value = lift.matrix(args.get("input")) if same_shape(tuple(total.shape), tuple(out.shape)) else None
    product = product_of(lift, node, args.get("batch1"), args.get("batch2"), False, node)
    if value is None or product is None:
        return None
    return MatrixValue(value.expr.scaled(float(beta)) + product.scaled(float(alpha)))
