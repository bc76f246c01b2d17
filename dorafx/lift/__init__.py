"""Lift: FX nodes to terms of a small algebra."""

from . import transfer as _transfer  # noqa: F401  (fills the table of transfer functions)
from .algebra import Atom, Diag, Expr, Mat, Poly
from .lifter import Lifter, tensor_of
from .values import AtomInfo, Gemm, MatrixValue, Value, VectorValue

__all__ = [
    "Atom",
    "AtomInfo",
    "Diag",
    "Expr",
    "Gemm",
    "Lifter",
    "Mat",
    "MatrixValue",
    "Poly",
    "Value",
    "VectorValue",
    "tensor_of",
]
