"""Reshapes, transposes, casts, detach: operators that keep the value."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dorafx.graphs.operators import drops_nothing, first_argument, permuted_axes
from dorafx.graphs.tensors import tensor_of

from ..algebra import Expr
from ..lifter import Lifter, transfer
from ..values import FLOAT_DTYPES, MatrixValue, Value, VectorValue, holds_product, loses_accuracy, vector_axis
from .filters import channels_first, multiplies_weights, swapped, swapped_axes


@transfer("view")
def view(lift: Lifter, node: fx.Node) -> Value | None:
    """A reshape that keeps the last axis of a matrix, or that moves a vector to another axis."""
    before, after = tensor_of(first_argument(node)), tensor_of(node)
    if before is None or after is None or before.dtype != after.dtype:  # view(dtype) reinterprets bits
        return None
    value = lift.value(first_argument(node))
    if after.dim() == 0:
        return value if isinstance(value, VectorValue) else None
    if tuple(map(str, before.shape)) == tuple(map(str, after.shape)):
        return value
    if isinstance(value, MatrixValue) and value.layout in ("channels", "inputs"):
        return channels_first(lift, first_argument(node), after)
    # The rows of a matrix are regrouped; its columns stay.
    kept = isinstance(value, MatrixValue) and value.layout == "last" and after.dim() >= 2
    if kept and str(before.shape[-1]) == str(after.shape[-1]):
        return value
    filters = _filter_view(lift, first_argument(node), value, before, after)
    if filters is not None:
        return filters
    vector = lift.vector(first_argument(node))
    if vector is None:
        return None
    if vector.axis is None:  # a scalar with axes of size 1
        return vector
    axis = vector_axis(after.shape)
    return VectorValue(vector.poly, axis) if axis is not None else None


def _filter_view(
    lift: Lifter, arg: Any, value: Value | None, before: torch.Tensor, after: torch.Tensor
) -> MatrixValue | None:
    """A convolution's weight ``[rows, ...]`` as a matrix ``[rows, cols]``, and back."""
    if not before.dim() or not after.dim() or str(before.shape[0]) != str(after.shape[0]):
        return None
    # One filter that is a product is a matrix of one row, and no vector.
    if vector_axis(before.shape) is not None and not holds_product(value):
        return None
    if before.dim() >= 3 and after.dim() >= 3 and isinstance(value, MatrixValue) and value.layout == "filter":
        return value
    if before.dim() >= 3 and after.dim() == 2:
        if isinstance(value, MatrixValue) and value.layout == "filter" and value.squared:
            return replace(value, layout="last") if multiplies_weights(lift, value.expr) else None
        expr = lift.laid_out(arg, "filter")
        return MatrixValue(expr) if expr is not None else None
    if before.dim() != 2 or after.dim() < 3 or not isinstance(value, MatrixValue) or value.squared:
        return None
    # Only for weights: activations that are split into heads have this shape too.
    return MatrixValue(value.expr, layout="filter") if multiplies_weights(lift, value.expr) else None


@transfer("expand")
def expand(lift: Lifter, node: fx.Node) -> Value | None:
    before, after = tensor_of(first_argument(node)), tensor_of(node)
    if before is None or after is None:
        return None
    if tuple(map(str, before.shape)) == tuple(map(str, after.shape)):
        return lift.value(first_argument(node))
    vector = lift.vector(first_argument(node))
    if vector is None or vector.axis is None or str(before.shape[vector.axis]) != str(after.shape[vector.axis]):
        return None
    if after.dim() >= 2:
        # Elementwise operators still read it as the vector, others as a matrix.
        lift.expanded[node] = lift.recorded(VectorValue(vector.poly, vector.axis))
    return MatrixValue(Expr.broadcast(vector.poly)) if vector.axis == -1 and after.dim() >= 2 else None


def _transposed(lift: Lifter, arg: Any) -> Value | None:
    tensor = tensor_of(arg)
    value = lift.value(arg)
    if tensor is None or tensor.dim() != 2:
        return value if tensor is not None and tensor.dim() == 1 else None
    if isinstance(value, MatrixValue):
        return replace(value, expr=value.expr.transposed()) if value.layout == "last" else None
    if isinstance(value, VectorValue) and value.axis is not None:
        return VectorValue(value.poly, -3 - value.axis)
    return None


@transfer("t")
def t(lift: Lifter, node: fx.Node) -> Value | None:
    tensor = tensor_of(first_argument(node))
    return _transposed(lift, first_argument(node)) if tensor is not None and tensor.dim() <= 2 else None


@transfer("transpose")
def transpose(lift: Lifter, node: fx.Node) -> Value | None:
    tensor = tensor_of(first_argument(node))
    dims = swapped_axes(node)
    if tensor is None or dims is None:
        return None
    if tensor.dim() > 2:
        return swapped(lift, node) or _moved_vector(lift, node, tensor, dims)
    if tensor.dim() != 2:
        return None
    if dims[0] % 2 == dims[1] % 2:
        return lift.value(first_argument(node))
    return _transposed(lift, first_argument(node))


def _moved_vector(lift: Lifter, node: fx.Node, tensor: torch.Tensor, dims: tuple[int, int]) -> Value | None:
    """A vector along one of several axes, after two axes were exchanged."""
    vector = lift.value(first_argument(node))
    if not isinstance(vector, VectorValue) or vector.axis is None:
        return None
    first, second = (d % tensor.dim() - tensor.dim() for d in dims)
    return VectorValue(vector.poly, {first: second, second: first}.get(vector.axis, vector.axis))


@transfer("permute")
def permute(lift: Lifter, node: fx.Node) -> Value | None:
    tensor = tensor_of(first_argument(node))
    if tensor is None or tensor.dim() != 2:
        return swapped(lift, node) if tensor is not None else None
    if [d % 2 for d in permuted_axes(node)] == [1, 0]:
        return _transposed(lift, first_argument(node))
    return lift.value(first_argument(node))


@transfer("getattr")
def attribute(lift: Lifter, node: fx.Node) -> Value | None:
    name = node.args[1]
    tensor = tensor_of(first_argument(node))
    if tensor is None:
        return None
    if name in ("T", "mT", "H", "mH") and tensor.dim() <= 2:
        return _transposed(lift, first_argument(node))
    if name == "data":
        value = lift.value(first_argument(node))
        return lift.detach(value) if value is not None else None
    return None


@transfer("cast")
def cast(lift: Lifter, node: fx.Node) -> Value | None:
    """A cast between floating dtypes on one device keeps the term, unless it rounds (see :meth:`Lifter.rounded`)."""
    before, after = tensor_of(first_argument(node)), tensor_of(node)
    if before is None or after is None or before.device != after.device:
        return None
    if before.dtype not in FLOAT_DTYPES or after.dtype not in FLOAT_DTYPES:
        return None
    value = lift.value(first_argument(node))
    if value is None or not loses_accuracy(before.dtype, after.dtype):
        return value
    if isinstance(value, MatrixValue) and value.layout != "filter" and not lift.holds_rows(value):
        return None  # what is rounded is a value as it lies in memory
    return lift.rounded(node, value, after.dtype)


@transfer("identity")
def identity(lift: Lifter, node: fx.Node) -> Value | None:
    return lift.value(first_argument(node))


@transfer("detach", "data")
def detach(lift: Lifter, node: fx.Node) -> Value | None:
    value = lift.value(first_argument(node))
    return lift.detach(value) if value is not None else None


@transfer("dropout")
def dropout(lift: Lifter, node: fx.Node) -> Value | None:
    """A dropout that drops nothing is the identity; any other is an atom of its own (its own mask)."""
    if drops_nothing(node) and isinstance(tensor_of(node), torch.Tensor):
        return lift.value(first_argument(node))
    return None
