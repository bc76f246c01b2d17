"""Sums, differences, scalings and elementwise functions of vectors."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..algebra import Expr, Poly
from ..lifter import Lifter, tensor_of, transfer
from ..targets import arguments
from ..values import AtomInfo, MatrixValue, Value, VectorValue


def _same_size(a: Any, b: Any) -> bool:
    """Equal sizes without a guard: ints compare, symbols must be the same expression."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return str(a) == str(b)


def _same_shape(a: Any, b: Any) -> bool:
    s, t = tensor_of(a), tensor_of(b)
    if s is None or t is None or s.dim() != t.dim():
        return False
    return all(_same_size(p, q) for p, q in zip(s.shape, t.shape))


def _is_result_shape(node: fx.Node, arg: Any) -> bool:
    """Whether the argument was not itself broadcast."""
    return _same_shape(node, arg)


def _add(lift: Lifter, node: fx.Node, a: Any, b: Any, sign: float) -> Value | None:
    va, vb = lift.value(a), lift.value(b)
    if va is None or vb is None:
        return None
    if isinstance(va, MatrixValue) and isinstance(vb, MatrixValue):
        if not va.squared and not vb.squared and _same_shape(a, b):
            return MatrixValue(va.expr + vb.expr.scaled(sign))
        if _same_shape(a, node):
            vb = lift.vector(b)
        else:
            va = lift.vector(a)
        if va is None or vb is None or (isinstance(va, VectorValue) and isinstance(vb, VectorValue)):
            return _add_vectors(va, vb, sign)
    if isinstance(va, VectorValue) and isinstance(vb, VectorValue):
        return _add_vectors(va, vb, sign)
    if isinstance(va, MatrixValue):
        return _add_bias(node, a, va, vb, b, sign)
    assert isinstance(vb, MatrixValue)
    added = _add_bias(node, b, MatrixValue(vb.expr.scaled(sign), vb.squared), va, a, 1.0)
    return added


def _add_vectors(va: Value | None, vb: Value | None, sign: float) -> Value | None:
    if not isinstance(va, VectorValue) or not isinstance(vb, VectorValue):
        return None
    if va.axis is not None and vb.axis is not None and va.axis != vb.axis:
        return None
    return VectorValue(va.poly + vb.poly.scaled(sign), va.axis if va.axis is not None else vb.axis)


def _add_bias(node: fx.Node, matrix: Any, m: MatrixValue, v: Value, vector: Any, sign: float) -> Value | None:
    """``matrix + 𝟙·D(vector)`` for a vector along the last axis, or a number 0."""
    if not isinstance(v, VectorValue) or m.squared or not _is_result_shape(node, matrix):
        return None
    if v.poly.constant == 0.0:
        return m
    if v.axis != -1 or not _spans(vector, matrix, -1):
        return None
    return MatrixValue(m.expr + Expr.broadcast(v.poly).scaled(sign))


def _spans(vector: Any, matrix: Any, axis: int) -> bool:
    """Whether a vector has as many entries as the matrix has along the axis (not one that is broadcast)."""
    v, m = tensor_of(vector), tensor_of(matrix)
    return v is not None and m is not None and _same_size(v.numel(), m.shape[axis])


@transfer("add")
def add(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "other")
    alpha = args.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return None
    return _add(lift, node, args.get("input"), args.get("other"), float(alpha))


@transfer("sub")
def sub(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "other")
    alpha = args.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        return None
    return _add(lift, node, args.get("input"), args.get("other"), -float(alpha))


@transfer("rsub")
def rsub(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "other")
    if args.get("alpha", 1) != 1:
        return None
    return _add(lift, node, args.get("other"), args.get("input"), -1.0)


def _mul(lift: Lifter, node: fx.Node, a: Any, b: Any) -> Value | None:
    va, vb = lift.value(a), lift.value(b)
    if va is None or vb is None:
        return None
    if isinstance(va, MatrixValue) and isinstance(vb, MatrixValue):
        if va == vb and not va.squared and _same_shape(a, b):
            return MatrixValue(va.expr, squared=True)
        # A parameter of shape [d, 1] or [1, d] is a matrix until something is scaled by it.
        as_b, as_a = lift.vector(b), lift.vector(a)
        if _is_result_shape(node, a) and as_b is not None:
            vb = as_b
        elif as_a is not None:
            va = as_a
        else:
            return None
    elif isinstance(va, VectorValue) and isinstance(vb, MatrixValue):
        as_b = lift.vector(b)
        if va.axis is not None and as_b is not None and as_b.axis == va.axis:
            vb = as_b
    elif isinstance(va, MatrixValue) and isinstance(vb, VectorValue):
        as_a = lift.vector(a)
        if vb.axis is not None and as_a is not None and as_a.axis == vb.axis:
            va = as_a
    if isinstance(va, VectorValue) and isinstance(vb, VectorValue):
        if va.axis is not None and vb.axis is not None and va.axis != vb.axis:
            return None
        return VectorValue(va.poly * vb.poly, va.axis if va.axis is not None else vb.axis)
    if isinstance(va, VectorValue):
        assert isinstance(vb, MatrixValue)
        return _scale(node, b, vb, a, va)
    assert isinstance(va, MatrixValue) and isinstance(vb, VectorValue)
    return _scale(node, a, va, b, vb)


def _scale(node: fx.Node, matrix: Any, m: MatrixValue, vector: Any, v: VectorValue) -> Value | None:
    if m.squared or not _is_result_shape(node, matrix):
        return None
    constant = v.poly.constant
    if v.axis is None or constant is not None:
        return MatrixValue(m.expr.scaled(constant) if constant is not None else m.expr.times_scalar(v.poly))
    shape = tensor_of(matrix)
    if shape is None:
        return None
    if v.axis == -1 and _spans(vector, matrix, -1):
        return MatrixValue(m.expr.right_diag(v.poly))
    if v.axis == -2 and shape.dim() == 2 and _spans(vector, matrix, -2):
        return MatrixValue(m.expr.left_diag(v.poly))
    return None


@transfer("mul")
def mul(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "other")
    return _mul(lift, node, args.get("input"), args.get("other"))


def _reciprocal(lift: Lifter, v: VectorValue) -> VectorValue | None:
    if not v.poly.items:
        return None
    inverse = v.poly.reciprocal()
    if inverse is None:
        info = AtomInfo("reciprocal", lift.requires_grad(v.poly), lift.is_parameter_term(v.poly), poly=v.poly)
        inverse = Poly.var(lift.intern(info))
    return VectorValue(inverse, v.axis)


@transfer("div")
def div(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "other")
    if args.get("rounding_mode") is not None:
        return None
    a, b = args.get("input"), args.get("other")
    divisor = lift.vector(b)
    inverse = _reciprocal(lift, divisor) if divisor is not None else None
    if inverse is None:
        return None
    va = lift.value(a)
    if isinstance(va, MatrixValue) and not _is_result_shape(node, a):
        va = lift.vector(a)
    if isinstance(va, MatrixValue):
        as_a = lift.vector(a)
        if inverse.axis is not None and as_a is not None and as_a.axis == inverse.axis:
            va = as_a
    if isinstance(va, VectorValue):
        if va.axis is not None and inverse.axis is not None and va.axis != inverse.axis:
            return None
        return VectorValue(va.poly * inverse.poly, va.axis if va.axis is not None else inverse.axis)
    if isinstance(va, MatrixValue):
        return _scale(node, a, va, b, inverse)
    return None


@transfer("neg")
def neg(lift: Lifter, node: fx.Node) -> Value | None:
    value = lift.value(node.args[0])
    if isinstance(value, VectorValue):
        return VectorValue(value.poly.scaled(-1.0), value.axis)
    if isinstance(value, MatrixValue) and not value.squared:
        return MatrixValue(value.expr.scaled(-1.0))
    return None


@transfer("reciprocal")
def reciprocal(lift: Lifter, node: fx.Node) -> Value | None:
    value = lift.vector(node.args[0])
    return _reciprocal(lift, value) if value is not None else None


@transfer("square")
def square(lift: Lifter, node: fx.Node) -> Value | None:
    return _power(lift, node, node.args[0], 2)


@transfer("pow")
def power(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "exponent")
    return _power(lift, node, args.get("input"), args.get("exponent"))


def _power(lift: Lifter, node: fx.Node, base: Any, exponent: Any) -> Value | None:
    if not isinstance(exponent, (int, float)):
        return None
    value = lift.value(base)
    if isinstance(value, MatrixValue):
        return MatrixValue(value.expr, squared=True) if exponent == 2 and not value.squared else None
    if isinstance(value, VectorValue):
        if exponent == 0.5:
            return root(lift, value, node)
        if exponent == -0.5:
            rooted = root(lift, value, node)
            return _reciprocal(lift, rooted) if rooted is not None else None
        if exponent in (1, 2, 3) and len(value.poly.items) <= 2:
            poly = value.poly
            for _ in range(int(exponent) - 1):
                poly = poly * value.poly
            return VectorValue(poly, value.axis)
        if exponent == -1:
            return _reciprocal(lift, value)
    return None


def root(lift: Lifter, value: VectorValue, node: fx.Node) -> VectorValue | None:
    """``sqrt(Σ w² + eps)`` is a norm; any other square root is not known."""
    eps = 0.0
    sumsq = None
    for mono, c in value.poly.items:
        if not mono:
            eps = c
        elif c == 1.0 and len(mono) == 1 and mono[0][1] == 1 and sumsq is None:
            sumsq = mono[0][0]
        else:
            return None
    if sumsq is None or eps < 0:
        return None
    info = lift.atom_of(sumsq)
    if info.kind != "sumsq":
        return None
    norm = AtomInfo("norm", info.requires_grad, info.parameter, expr=info.expr, side=info.side, eps=eps)
    atom = lift.intern(norm)
    lift.atom_of(atom).sites.append(node)
    poly = Poly.var(atom)
    if sumsq.detached:
        poly = poly.detached(frozenset())
    return VectorValue(poly, value.axis)


@transfer("sqrt")
def sqrt(lift: Lifter, node: fx.Node) -> Value | None:
    value = lift.value(node.args[0])
    return root(lift, value, node) if isinstance(value, VectorValue) else None


@transfer("rsqrt")
def rsqrt(lift: Lifter, node: fx.Node) -> Value | None:
    value = lift.value(node.args[0])
    rooted = root(lift, value, node) if isinstance(value, VectorValue) else None
    return _reciprocal(lift, rooted) if rooted is not None else None


@transfer("clamp", "clamp_min")
def clamp(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "min", "max")
    low = args.get("min")
    value = lift.value(args.get("input"))
    if args.get("max") is not None or not isinstance(low, (int, float)) or not isinstance(value, VectorValue):
        return None
    info = AtomInfo(
        "clamp_min", lift.requires_grad(value.poly), lift.is_parameter_term(value.poly), eps=float(low), poly=value.poly
    )
    return VectorValue(Poly.var(lift.intern(info)), value.axis)
