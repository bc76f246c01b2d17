"""Powers, roots, bounds and constants."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx

from dorafx.graphs.operators import arguments, first_argument
from dorafx.graphs.tensors import tensor_of

from ..algebra import Poly
from ..lifter import Lifter, transfer
from ..values import FLOAT_DTYPES, AtomInfo, MatrixValue, Value, VectorValue, vector_axis
from .arithmetic import inverse_of


@transfer("neg")
def neg(lift: Lifter, node: fx.Node) -> Value | None:
    value = lift.value(first_argument(node))
    if isinstance(value, VectorValue):
        return VectorValue(value.poly.scaled(-1.0), value.axis)
    if isinstance(value, MatrixValue) and not value.squared:
        return replace(value, expr=value.expr.scaled(-1.0))
    return None


@transfer("abs")
def absolute(lift: Lifter, node: fx.Node) -> Value | None:
    """There is no term for it. But its square, and the square's derivatives, are those of the argument."""
    value = lift.matrix(first_argument(node))
    if value is not None:
        lift.absolute[node] = lift.recorded(value)
    return None


@transfer("reciprocal")
def reciprocal(lift: Lifter, node: fx.Node) -> Value | None:
    value = lift.vector(first_argument(node))
    return inverse_of(lift, value) if value is not None else None


@transfer("square")
def square(lift: Lifter, node: fx.Node) -> Value | None:
    return _power(lift, node, first_argument(node), 2)


@transfer("pow")
def power(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "exponent")
    return _power(lift, node, args.get("input"), args.get("exponent"))


@transfer("float_power")
def float_power(lift: Lifter, node: fx.Node) -> Value | None:
    """The squares of a matrix, or the roots of their sums, in fp64, of which every fp32 number is one."""
    args = arguments(node, "input", "exponent")
    tensor, value = tensor_of(args.get("input")), lift.value(args.get("input"))
    if tensor is None or tensor.dtype not in FLOAT_DTYPES:
        return None
    if not isinstance(value, MatrixValue) and args.get("exponent") not in (0.5, -0.5):
        return None
    return _power(lift, node, args["input"], args.get("exponent"))


def _power(lift: Lifter, node: fx.Node, base: Any, exponent: Any) -> Value | None:
    if not isinstance(exponent, (int, float)):
        return None
    value = lift.aside(lift.absolute, base) or lift.value(base)
    if isinstance(value, MatrixValue):
        return replace(value, squared=True) if exponent == 2 and not value.squared else None
    if isinstance(value, VectorValue):
        if exponent == 0.5:
            return root(lift, value, node)
        if exponent == -0.5:
            rooted = root(lift, value, node)
            return inverse_of(lift, rooted) if rooted is not None else None
        if exponent in (1, 2, 3) and len(value.poly.items) <= 2:
            poly = value.poly
            for _ in range(int(exponent) - 1):
                poly = poly * value.poly
            return VectorValue(poly, value.axis)
        if exponent == -1:
            return inverse_of(lift, value)
    return None


def root(lift: Lifter, value: VectorValue, node: fx.Node) -> VectorValue | None:
    """``sqrt(c·Σ w² + eps) = √c · sqrt(Σ w² + eps/c)`` is a norm; any other square root is unknown."""
    eps, scale = 0.0, 1.0
    sumsq = None
    if value.poly.vanished:
        return None
    for mono, c in value.poly.items:
        if not mono:
            eps = c
        elif c > 0 and len(mono) == 1 and mono[0][1] == 1 and sumsq is None:
            sumsq, scale = mono[0][0], c
        else:
            return None
    if sumsq is None or eps < 0:
        return None
    info = lift.atom_of(sumsq)
    if info.kind != "sumsq":
        return None
    norm = AtomInfo(
        "norm",
        info.requires_grad,
        info.parameter,
        expr=info.expr,
        side=info.side,
        span=info.span,
        eps=eps / scale,
        double=info.double,
        rooted=not eps and info.requires_grad,
    )
    atom = lift.intern(norm)
    lift.atom_of(atom).sites.append(node)
    poly = Poly.var(atom).scaled(scale**0.5)
    if sumsq.detached:
        poly = poly.detached(frozenset())
    return VectorValue(poly, value.axis)


@transfer("sqrt")
def sqrt(lift: Lifter, node: fx.Node) -> Value | None:
    value = lift.value(first_argument(node))
    return root(lift, value, node) if isinstance(value, VectorValue) else None


@transfer("rsqrt")
def rsqrt(lift: Lifter, node: fx.Node) -> Value | None:
    value = lift.value(first_argument(node))
    rooted = root(lift, value, node) if isinstance(value, VectorValue) else None
    return inverse_of(lift, rooted) if rooted is not None else None


def at_least(
    lift: Lifter, value: VectorValue, low: float, kind: Literal["clamp_min", "maximum"] = "clamp_min"
) -> VectorValue:
    """``max(value, low)`` by element; the gradients of the two kinds differ where value and bound are equal."""
    info = AtomInfo(
        kind, lift.requires_grad(value.poly), lift.weights.is_parameter_term(value.poly), eps=low, poly=value.poly
    )
    return VectorValue(Poly.var(lift.intern(info)), value.axis)


@transfer("clamp", "clamp_min")
def clamp(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "min", "max")
    low = args.get("min")
    value = lift.value(args.get("input"))
    if args.get("max") is not None or not isinstance(low, (int, float)) or not isinstance(value, VectorValue):
        return None
    return at_least(lift, value, float(low))


@transfer("maximum")
def maximum(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "other")
    for value, bound in ((args.get("input"), args.get("other")), (args.get("other"), args.get("input"))):
        v, b = lift.value(value), lift.value(bound)
        if not isinstance(v, VectorValue) or not isinstance(b, VectorValue) or v.poly.constant is not None:
            continue
        low = b.poly.constant
        if low is not None and (b.axis is None or b.axis == v.axis):
            return at_least(lift, v, low, "maximum")
    return None


@transfer(
    "full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones", "tensor"
)
def constant(lift: Lifter, node: fx.Node) -> Value | None:
    """A scalar, or a vector whose entries are all one number."""
    tensor = tensor_of(node)
    axis = vector_axis(tensor.shape) if tensor is not None and tensor.dtype in FLOAT_DTYPES else None
    if tensor is None or axis is None:
        return None
    name = lift.name_of(node)
    number: Any = 0 if "zeros" in name else 1
    if "full" in name:
        number = arguments(node, "first", "fill_value").get("fill_value")
        if name == "new_full":
            number = arguments(node, "self", "size", "fill_value").get("fill_value")
    elif name == "tensor":
        number = node.args[0] if node.args else node.kwargs.get("data")
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        return None
    if not _is_exact(float(number), tensor):
        return None
    return VectorValue(Poly.const(float(number)), axis if tensor.dim() else None)


def _is_exact(number: float, tensor: Any) -> bool:
    """Whether the dtype holds the number exactly. If not, the tensor stays an indeterminate: 0.1 in bf16 is not 0.1."""
    return float(torch.tensor(number, dtype=tensor.dtype)) == number
