"""Sums, differences, products and quotients, with NumPy's broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import fx

from dorafx.graphs.operators import arguments
from dorafx.graphs.tensors import tensor_of

from ..algebra import ONES, Diag, Expr, Mat, Poly
from ..lifter import Lifter, transfer
from ..values import AtomInfo, MatrixValue, Value, VectorValue

Shape = tuple[Any, ...]


class Operand(NamedTuple):
    """An argument of an elementwise operator, or an intermediate value of one that computes several steps."""

    value: Value | None
    shape: Shape | None
    """The tensor's shape; ``()`` for a number, None if unknown."""
    vector: VectorValue | None
    """The argument as a vector, if it can be read as one: a parameter of shape [d, 1] is a matrix until something is scaled by it."""
    expanded: bool = False
    """Whether ``vector`` is what an ``expand`` expanded; the tensor itself is then no vector."""
    filters: Callable[[], Expr | None] = lambda: None
    """Gives the argument as a convolution's weight, if it may be one."""
    repeated: Callable[[Poly, int], Poly] | None = None
    """See :meth:`Lifter.repeat_each`."""


def operand(lift: Lifter, arg: Any) -> Operand:
    """An argument of a node."""
    tensor = tensor_of(arg)
    # Anything but a tensor is a number, or a symbol for one.
    shape = tuple(tensor.shape) if tensor is not None else ()
    expanded = lift.aside(lift.expanded, arg)
    if expanded is not None:
        return Operand(lift.value(arg), shape, expanded, True, repeated=lift.repeat_each)
    vector = lift.vector(arg)
    return Operand(
        lift.value(arg), shape, vector, filters=lambda: lift.laid_out(arg, "filter"), repeated=lift.repeat_each
    )


def same_shape(s: Shape | None, t: Shape | None) -> bool:
    """Whether shapes are equal, without a guard: integers are compared, symbols must be the same expression."""
    if s is None or t is None or len(s) != len(t):
        return False
    return all(same_size(p, q) for p, q in zip(s, t))


def same_size(a: Any, b: Any) -> bool:
    """Whether sizes are equal, without a guard."""
    return a == b if isinstance(a, int) and isinstance(b, int) else str(a) == str(b)


def _broadcast(s: Shape | None, t: Shape | None) -> Shape | None:
    """The shape of an elementwise result; None if symbolic sizes leave it open."""
    if s is None or t is None:
        return None
    if len(s) < len(t):
        s, t = t, s
    t = (1,) * (len(s) - len(t)) + t
    out = []
    for p, q in zip(s, t):
        if same_size(p, q) or (isinstance(q, int) and q == 1):
            out.append(p)
        elif isinstance(p, int) and p == 1:
            out.append(q)
        else:
            return None
    return tuple(out)


def _spans(vector: Operand, matrix: Operand, axis: int) -> bool:
    """Whether a vector has as many entries as the matrix along the axis, so that it is not broadcast."""
    v, m = vector.shape, matrix.shape
    return v is not None and m is not None and len(v) >= -axis and len(m) >= -axis and same_size(v[axis], m[axis])


def _intermediate(value: Value | None, a: Operand, b: Operand) -> Operand:
    """The result of ``a`` and ``b`` as an operand of the next step of the same node."""
    return Operand(value, _broadcast(a.shape, b.shape), value if isinstance(value, VectorValue) else None)


def added(a: Operand, b: Operand, sign: float) -> Value | None:
    """``a + sign·b``; None if there is no term for it."""
    va, vb = a.value, b.value
    if va is None or vb is None:
        return None
    shape = _broadcast(a.shape, b.shape)
    if isinstance(va, MatrixValue) and isinstance(vb, MatrixValue):
        if va.layout != vb.layout and same_shape(a.shape, b.shape):
            va, vb = _in_one_layout(a, va, b, vb)
        if not va.squared and not vb.squared and va.layout == vb.layout and same_shape(a.shape, b.shape):
            return replace(va, expr=va.expr + vb.expr.scaled(sign))
        if same_shape(a.shape, shape):
            vb = b.vector
        else:
            va = a.vector
        if va is None or vb is None or (isinstance(va, VectorValue) and isinstance(vb, VectorValue)):
            return _added_vectors(a, va, b, vb, sign)
    if isinstance(va, VectorValue) and isinstance(vb, VectorValue):
        return _added_vectors(a, va, b, vb, sign)
    if isinstance(va, MatrixValue):
        return _biased(shape, a, va, b, vb, sign)
    assert isinstance(vb, MatrixValue)
    return _biased(shape, b, replace(vb, expr=vb.expr.scaled(sign)), a, va, 1.0)


def _added_vectors(a: Operand, va: Value | None, b: Operand, vb: Value | None, sign: float) -> Value | None:
    if not isinstance(va, VectorValue) or not isinstance(vb, VectorValue):
        return None
    if va.axis is not None and vb.axis is not None and va.axis != vb.axis:
        return None
    row = None
    if (va.row is not None or vb.row is not None) and same_shape(a.shape, b.shape):
        one, other = (Expr.broadcast(v.poly) if v.row is None else v.row for v in (va, vb))
        row = one + other.scaled(sign)
    return VectorValue(va.poly + vb.poly.scaled(sign), va.axis if va.axis is not None else vb.axis, row)


def _scaled_row(a: Operand, va: VectorValue, b: Operand, vb: VectorValue) -> Expr | None:
    """``va ⊙ vb`` as a matrix of one row, if one of them is a row and the other is a vector along it or a scalar."""
    row, v = (va.row, vb) if va.row is not None else (vb.row, va)
    if row is None or v.row is not None:
        return None
    if v.axis is None:
        return row.times_scalar(v.poly)
    return row.right_diag(v.poly) if same_shape(a.shape, b.shape) else None


def _biased(
    shape: Shape | None, matrix: Operand, m: MatrixValue, vector: Operand, v: Value, sign: float
) -> Value | None:
    """``matrix + 𝟙·D(vector)`` for a vector along the last axis, or a number 0."""
    if not isinstance(v, VectorValue) or m.squared or not same_shape(shape, matrix.shape):
        return None
    if not v.poly.items:  # the vector is 0, but what vanished from it may have a gradient, or be NaN
        return replace(m, expr=m.expr.without(v.poly.vanished))
    if _vector_side(m, matrix, vector, v) != "columns":
        return None
    return replace(m, expr=m.expr + Expr.broadcast(v.poly).scaled(sign))


def _vector_side(m: MatrixValue, matrix: Operand, vector: Operand, v: VectorValue) -> Literal["rows", "columns"] | None:
    """Whether a vector has one entry for each column of the matrix, or for each row. A vector of a single entry, with any number of
    axes, counts as either if the matrix has one column, or one row."""
    axes: dict[Literal["rows", "columns"], int | None] = {
        "columns": _column_axis(m, matrix),
        "rows": _row_axis(m, matrix),
    }
    if v.axis is None or vector.shape is None or matrix.shape is None:
        return None
    for side, axis in axes.items():
        if axis is not None and v.axis == axis and _spans(vector, matrix, axis):
            return side
    if all(isinstance(size, int) and size == 1 for size in vector.shape):
        for side, axis in axes.items():
            if axis is not None and str(matrix.shape[axis]) == "1":
                return side
    return None


def _column_axis(m: MatrixValue, matrix: Operand) -> int | None:
    """The axis of a matrix's columns; None if there are several."""
    if m.layout == "last":
        return -1
    return 1 - len(matrix.shape) if m.layout == "channels" and matrix.shape is not None else None


def _row_axis(m: MatrixValue, matrix: Operand) -> int | None:
    """The axis of a matrix's rows; None if there are several."""
    if matrix.shape is None or m.layout == "channels" or (m.layout == "last" and len(matrix.shape) != 2):
        return None
    return -len(matrix.shape)


def _in_one_layout(a: Operand, va: MatrixValue, b: Operand, vb: MatrixValue) -> tuple[MatrixValue, MatrixValue]:
    """Read an operand as filters, if the other one is in that layout and nothing speaks against it."""
    filters = a.filters() if vb.layout == "filter" else b.filters() if va.layout == "filter" else None
    if filters is None:
        return va, vb
    known = MatrixValue(filters, layout="filter")
    return (known, vb) if vb.layout == "filter" else (va, known)


def multiplied(a: Operand, b: Operand) -> Value | None:
    """``a ⊙ b``; None if there is no term for it."""
    va, vb = a.value, b.value
    if va is None or vb is None:
        return None
    shape = _broadcast(a.shape, b.shape)
    if isinstance(va, MatrixValue) and isinstance(vb, MatrixValue):
        if va == vb and not va.squared and same_shape(a.shape, b.shape):
            return replace(va, squared=True)
        if same_shape(shape, a.shape) and b.vector is not None:
            vb = b.vector
        elif a.vector is not None:
            va = a.vector
            if b.vector is not None and not same_shape(shape, b.shape):  # a column and a row
                vb = b.vector
        else:
            return None
    elif isinstance(va, VectorValue) and isinstance(vb, MatrixValue):
        vb = _along(va, b) or vb
    elif isinstance(va, MatrixValue) and isinstance(vb, VectorValue):
        va = _along(vb, a) or va
    if isinstance(va, VectorValue) and isinstance(vb, VectorValue):
        if va.axis is not None and vb.axis is not None and va.axis != vb.axis:
            return _outer(shape, a, va, b, vb)
        row = _scaled_row(a, va, b, vb)
        return VectorValue(va.poly * vb.poly, va.axis if va.axis is not None else vb.axis, row)
    if isinstance(va, VectorValue):
        assert isinstance(vb, MatrixValue)
        return _scaled(shape, b, vb, a, va)
    assert isinstance(va, MatrixValue) and isinstance(vb, VectorValue)
    return _scaled(shape, a, va, b, vb)


def _along(v: VectorValue, other: Operand) -> VectorValue | None:
    """A matrix operand as a vector, if it can be read as one along the same axis as ``v``."""
    if v.axis is None or other.vector is None or other.expanded:
        return None
    return other.vector if other.vector.axis == v.axis else None


def _outer(shape: Shape | None, a: Operand, va: VectorValue, b: Operand, vb: VectorValue) -> Value | None:
    """A column times a row: ``D(column)·𝟙·D(row)``."""
    if shape is None or len(shape) != 2 or {va.axis, vb.axis} != {-1, -2} or a.expanded or b.expanded:
        return None
    column, row = (va, vb) if va.axis == -2 else (vb, va)
    return outer_product(column.poly, row.poly)


def outer_product(column: Poly, row: Poly) -> Value | None:
    """``D(column)·𝟙·D(row)``, a product of rank one, for monomials; sums would give several products."""
    if not column.is_monomial or not row.is_monomial or column.constant is not None or row.constant is not None:
        return None
    ((left, c),), ((right, k),) = column.items, row.items
    return MatrixValue(Expr.chain((Diag(left), Mat(ONES), Diag(right)), c * k))


def _scaled(shape: Shape | None, matrix: Operand, m: MatrixValue, vector: Operand, v: VectorValue) -> Value | None:
    if m.squared or not same_shape(shape, matrix.shape):
        return None
    constant = v.poly.constant
    if v.axis is None or constant is not None:
        return replace(m, expr=m.expr.scaled(constant) if constant is not None else m.expr.times_scalar(v.poly))
    side = _vector_side(m, matrix, vector, v)
    if side is None:
        columns = _along_input_channels(m, matrix, vector, v)
        return replace(m, expr=m.expr.right_diag(columns)) if columns is not None else None
    return replace(m, expr=m.expr.right_diag(v.poly) if side == "columns" else m.expr.left_diag(v.poly))


def _along_input_channels(m: MatrixValue, matrix: Operand, vector: Operand, v: VectorValue) -> Poly | None:
    """A vector with one entry for each input channel of filters, as one along their columns."""
    if m.layout != "filter" or v.axis is None or matrix.shape is None or vector.shape is None or len(matrix.shape) < 3:
        return None
    axis, positions = 1 - len(matrix.shape), matrix.shape[2:]
    repeated = matrix.repeated or vector.repeated
    one = str(matrix.shape[1]) == "1" and all(isinstance(size, int) and size == 1 for size in vector.shape)
    if repeated is None or not all(isinstance(size, int) for size in positions):
        return None
    if not one and (v.axis != axis or not _spans(vector, matrix, axis)):
        return None
    return repeated(v.poly, math.prod(positions))


def inverse_of(lift: Lifter, v: VectorValue) -> VectorValue | None:
    """``1/v``: a monomial for a monomial, an indeterminate of its own for a sum."""
    if not v.poly.items or v.poly.vanished:
        return None
    inverse = v.poly.reciprocal()
    if inverse is None:
        info = AtomInfo("reciprocal", lift.requires_grad(v.poly), lift.weights.is_parameter_term(v.poly), poly=v.poly)
        inverse = Poly.var(lift.intern(info))
    return VectorValue(inverse, v.axis)


def divided(lift: Lifter, a: Operand, b: Operand) -> Value | None:
    """``a / b`` for a vector or scalar ``b``; None if there is no term for it."""
    inverse = inverse_of(lift, b.vector) if b.vector is not None else None
    if inverse is None:
        return None
    shape = _broadcast(a.shape, b.shape)
    va = a.value
    if isinstance(va, MatrixValue) and not same_shape(shape, a.shape):
        va = a.vector
    if isinstance(va, MatrixValue):
        va = _along(inverse, a) or va
    if isinstance(va, VectorValue):
        if b.expanded or a.expanded or (va.axis is not None and inverse.axis is not None and va.axis != inverse.axis):
            return None
        row = _scaled_row(a, va, b, inverse)
        return VectorValue(va.poly * inverse.poly, va.axis if va.axis is not None else inverse.axis, row)
    return _scaled(shape, a, va, b, inverse) if isinstance(va, MatrixValue) else None


@transfer("add", "sub")
def add(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "other", "alpha")
    alpha = args.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return None
    sign = 1.0 if lift.name_of(node) == "add" else -1.0
    return added(operand(lift, args.get("input")), operand(lift, args.get("other")), sign * float(alpha))


@transfer("rsub")
def rsub(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "other", "alpha")
    if args.get("alpha", 1) != 1:
        return None
    return added(operand(lift, args.get("other")), operand(lift, args.get("input")), -1.0)


@transfer("mul")
def mul(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "other")
    return multiplied(operand(lift, args.get("input")), operand(lift, args.get("other")))


@transfer("div")
def div(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "other")
    if args.get("rounding_mode") is not None:
        return None
    return divided(lift, operand(lift, args.get("input")), operand(lift, args.get("other")))


@transfer("addcmul", "addcdiv")
def add_product(lift: Lifter, node: fx.Node) -> Value | None:
    """``input + value · t₁ ⊙ t₂``, or over ``t₂``."""
    args = arguments(node, "input", "tensor1", "tensor2", "value")
    first, second = operand(lift, args.get("tensor1")), operand(lift, args.get("tensor2"))
    value = args.get("value", 1)
    if not isinstance(value, (int, float)):
        return None
    product = multiplied(first, second) if lift.name_of(node) == "addcmul" else divided(lift, first, second)
    if product is None or value == 0:
        return None
    return added(operand(lift, args.get("input")), _intermediate(product, first, second), float(value))


@transfer("lerp")
def lerp(lift: Lifter, node: fx.Node) -> Value | None:
    """``start + weight ⊙ (end - start)``."""
    args = arguments(node, "input", "end", "weight")
    start, end, weight = (operand(lift, args.get(name)) for name in ("input", "end", "weight"))
    difference = _intermediate(added(end, start, -1.0), end, start)
    if difference.value is None:
        return None
    weighted = multiplied(weight, difference)
    return added(start, _intermediate(weighted, weight, difference), 1.0) if weighted is not None else None
