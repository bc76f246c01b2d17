"""Matrices with a side of one, which are vectors by their shape: one that was flattened and brought back is the matrix that it was, and
a row that was flattened is still the row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import fx

from ..algebra import Expr, Poly
from ..lifter import TRANSFER, Lifter, tensor_of
from ..targets import first_argument
from ..values import MatrixValue, Value, VectorValue
from .arithmetic import same_shape, same_size


def _restoring(otherwise: Callable[[Lifter, fx.Node], Value | None]) -> Callable[[Lifter, fx.Node], Value | None]:
    def view(lift: Lifter, node: fx.Node) -> Value | None:
        value, after = otherwise(lift, node), tensor_of(node)
        if value is None and after is not None and after.dim() == 1:
            return _row(lift, node, first_argument(node), after.shape[0])
        if not isinstance(value, VectorValue) or after is None or after.dim() != 2 or not value.poly.is_monomial:
            return value
        for atom in value.poly.atoms():
            whole = tensor_of(lift.atom_of(atom).node)
            if (
                value.poly == Poly.var(atom)
                and whole is not None
                and same_shape(tuple(whole.shape), tuple(after.shape))
            ):
                return MatrixValue(Expr.mat(atom))
        return value

    return view


def _row(lift: Lifter, node: fx.Node, source: Any, size: Any) -> Value | None:
    value, before, made = lift.matrix(source), tensor_of(source), lift.atom_value(node)
    if value is None or before is None or not isinstance(made, VectorValue) or not same_size(before.shape[-1], size):
        return None
    return VectorValue(made.poly, made.axis, value.expr)


TRANSFER["view"] = _restoring(TRANSFER["view"])
