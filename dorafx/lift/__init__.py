"""Lifts FX nodes to terms of a small algebra."""

from . import transfer as _transfer  # noqa: F401  (fills the table of transfer functions)
from .algebra import Atom, Diag, Expr, Mat, Poly
from .leaves import leaves_of
from .lifter import Lifter
from .quantized import PackedWeight, packed_weight
from .show import Notation, show, term_of
from .values import AtomInfo, Gemm, MatrixValue, Value, VectorValue, holds_product

__all__ = [
    "Atom",
    "AtomInfo",
    "Diag",
    "Expr",
    "Gemm",
    "Lifter",
    "Mat",
    "MatrixValue",
    "Notation",
    "PackedWeight",
    "Poly",
    "Value",
    "VectorValue",
    "holds_product",
    "leaves_of",
    "packed_weight",
    "show",
    "term_of",
]
