"""Matrices with a side of one, which are vectors by their shape: one that was flattened and brought back is the matrix that it was."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ..algebra import Expr, Poly
from ..lifter import TRANSFER, Lifter, tensor_of
from ..values import MatrixValue, Value, VectorValue
from .arithmetic import same_shape


def _restoring(otherwise: Callable[[Lifter, fx.Node], Value | None]) -> Callable[[Lifter, fx.Node], Value | None]:
    def view(lift: Lifter, node: fx.Node) -> Value | None:
        value, after = otherwise(lift, node), tensor_of(node)
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


TRANSFER["view"] = _restoring(TRANSFER["view"])
