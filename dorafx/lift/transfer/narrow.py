"""Matrices of a single row or column, which are vectors by their shape. One that is flattened and reshaped back is the same matrix, and
a flattened row is still the row."""

from __future__ import annotations

from torch import fx

from dorafx.graphs.operators import first_argument
from dorafx.graphs.tensors import tensor_of

from ..algebra import Expr, Poly
from ..lifter import Lifter, Reading, transfer
from ..values import MatrixValue, Value, VectorValue
from .arithmetic import same_shape, same_size


@transfer("view", reading=Reading.MATRIX)
def matrix_again(lift: Lifter, node: fx.Node) -> Value | None:
    """A vector that is reshaped to the matrix that it stands for."""
    source, after = first_argument(node), tensor_of(node)
    before, value = tensor_of(source), lift.vector(source)
    if value is None or before is None or after is None or after.dim() != 2 or before.dtype != after.dtype:
        return None
    for atom in value.poly.atoms() if value.poly.is_monomial else ():
        whole = tensor_of(lift.atom_of(atom).node)
        if value.poly == Poly.var(atom) and whole is not None and same_shape(tuple(whole.shape), tuple(after.shape)):
            return MatrixValue(Expr.mat(atom))
    return None


@transfer("view", reading=Reading.ROW)
def row(lift: Lifter, node: fx.Node) -> Value | None:
    """A flattened matrix of one row: a vector that is still the row."""
    source, after = first_argument(node), tensor_of(node)
    value, before, vector = lift.matrix(source), tensor_of(source), lift.atom_value(node)
    if value is None or before is None or after is None or after.dim() != 1 or before.dtype != after.dtype:
        return None
    if not isinstance(vector, VectorValue) or not same_size(before.shape[-1], after.shape[0]):
        return None
    return VectorValue(vector.poly, vector.axis, value.expr)
