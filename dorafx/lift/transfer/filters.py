"""Filters that are made or moved as tensors of more than two axes: deltas by ``einsum``, and filters with the input channels first.

``einsum("or,rikl->oikl", B, A)`` is the product of B with A flattened behind its first axis. A filter ``[rows, channels, *kernel]``
whose first two axes change places lies as activations do, ``[batch, columns, ...]``: its transpose, in the layout "channels".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import fx

from dorafx.graphs.operators import arguments, canonical_name, first_argument, permuted_axes
from dorafx.graphs.tensors import tensor_of

from ..algebra import Expr, Mat, Poly
from ..lifter import Lifter
from ..values import MatrixValue

_ELLIPSIS = "*"
_COLUMNS = "#"


def swapped(lift: Lifter, node: fx.Node) -> MatrixValue | None:
    """Filters whose first two axes changed places, or that have them where they were again."""
    value, order = lift.value(first_argument(node)), axes_of(node)
    if order is None:
        return None
    if not isinstance(value, MatrixValue) or value.layout not in ("filter", "channels"):
        return None
    if not swaps_first_axes(order) or lift.is_convolved(value.expr) or not multiplies_weights(lift, value.expr):
        return None
    return replace(value, expr=value.expr.transposed(), layout="channels" if value.layout == "filter" else "filter")


def multiplies_weights(lift: Lifter, expr: Expr) -> bool:
    """Whether all matrices in a term are weights, whatever they are scaled by."""
    return all(
        lift.weights.is_made_of_weights(Expr.mat(factor.atom))
        for (_, chain), _ in expr.items
        for factor in chain
        if isinstance(factor, Mat)
    )


def swaps_first_axes(order: list[int]) -> bool:
    """Whether axes in this order are those of a tensor whose first two changed places, and no others."""
    return len(order) >= 3 and order == [1, 0, *range(2, len(order))]


def as_activations(lift: Lifter, arg: Any) -> Expr | None:
    """A weight as what a convolution takes, where its first two axes changed places: to convolve A so with B is to multiply them."""
    order = axes_of(arg) if isinstance(arg, fx.Node) else None
    if order is None or not swaps_first_axes(order) or arg in lift.written:
        return None
    filters = lift.laid_out(first_argument(arg), "filter")
    if filters is None or lift.is_convolved(filters) or not multiplies_weights(lift, filters):
        return None
    expr = filters.transposed()
    return lift.detached(expr) if arg in lift.unrecorded else expr


def axes_of(node: fx.Node) -> list[int] | None:
    """The axes of the argument of a ``permute`` or ``transpose`` in the order of its result's; None of anything else."""
    tensor, name = tensor_of(node), canonical_name(node)
    if tensor is None or name not in ("permute", "transpose"):
        return None
    order = list(range(tensor.dim()))
    if name == "permute":
        axes = permuted_axes(node)
        return [axis % len(order) for axis in axes] if all(isinstance(axis, int) for axis in axes) else None
    dims = swapped_axes(node)
    if dims is None or not order:
        return None
    first, second = (axis % len(order) for axis in dims)
    order[first], order[second] = second, first
    return order


def swapped_axes(node: fx.Node) -> tuple[int, int] | None:
    """The two axes that a ``transpose`` exchanges, where they are numbers."""
    args = arguments(node, "input", "dim0", "dim1")
    first, second = args.get("dim0", args.get("axis0")), args.get("dim1", args.get("axis1"))
    return (first, second) if isinstance(first, int) and isinstance(second, int) else None


def channels_first(lift: Lifter, arg: Any, after: Any) -> MatrixValue | None:
    """Filters with the input channels first, ``[channels, rows, *kernel]``, flattened behind these."""
    value, before = lift.value(arg), tensor_of(arg)
    if not isinstance(value, MatrixValue) or value.layout != "channels" or before is None or after.dim() != 2:
        return None
    positions = before.shape[2:]
    if lift.is_convolved(value.expr) or str(before.shape[0]) != str(after.shape[0]):
        return None
    if not all(isinstance(size, int) for size in positions):
        return None
    return replace(value, expr=value.expr.transposed(), layout="inputs", positions=math.prod(positions))


def by_input_channel(
    lift: Lifter, value: MatrixValue, tensor: torch.Tensor, dim: Any
) -> tuple[Expr, Literal["row", "col"], int, int] | None:
    """How a reduction over these axes is one of filters by channel: the filters' matrix, which side of it, of how many columns each entry
    is, and along which axis the result lies if it keeps all. None where it is by row, as any matrix is reduced."""
    axes = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
    if not all(isinstance(axis, int) for axis in axes):
        return None
    count = tensor.dim()
    kept = set(range(count)) - {axis % count for axis in axes}
    if len(kept) != 1 or len(axes) != count - 1:
        return None
    (axis,) = kept
    expr = value.expr
    if value.layout == "inputs":
        return (expr, "col", value.positions, -2) if axis == 0 else None
    positions = tensor.shape[2:]
    if count < 3 or axis > 1 or not all(isinstance(size, int) for size in positions):
        return None
    if value.layout == "last":
        filters = lift.as_filters(expr, tensor) if axis == 1 else None
        return (filters, "col", math.prod(positions), 1 - count) if filters is not None else None
    if value.layout == "channels":
        if lift.is_convolved(expr):
            return None
        expr, axis = expr.transposed(), 1 - axis
        return (expr, "col", math.prod(positions), -count) if axis == 1 else (expr, "row", 1, 1 - count)
    return (expr, "col", math.prod(positions), 1 - count) if axis == 1 else None


def filters_by_letters(
    lift: Lifter, subscripts: Sequence[str], result: str, operands: Sequence[Any]
) -> MatrixValue | None:
    """The term of an ``einsum`` that makes filters ``[rows, ...]``: one operand has all letters behind the first, as filters or as the
    rows of a matrix, and the others lead there from the rows. An operand of one letter is a diagonal on the path."""
    rows, columns = result[0], result[1:]
    if rows == _ELLIPSIS or rows in columns or not columns:
        return None
    diagonals: dict[str, Poly] = {}
    edges: list[tuple[str, str, Expr]] = []
    for letters, operand in zip(subscripts, operands):
        if len(letters) == 1 and letters != _ELLIPSIS and letters not in columns:
            vector = lift.vector(operand)
            if vector is None:
                return None
            diagonals[letters] = diagonals[letters] * vector.poly if letters in diagonals else vector.poly
            continue
        edge = _edge(lift, letters, columns, operand)
        if edge is None:
            return None
        edges.append(edge)
    product = _along(rows, edges, diagonals)
    if product is None or not multiplies_weights(lift, product):
        return None
    return MatrixValue(product, layout="filter")


def _edge(lift: Lifter, letters: str, columns: str, operand: Any) -> tuple[str, str, Expr] | None:
    """An operand as a matrix that leads from one letter to another; all letters of the result's columns together are one."""
    tensor = tensor_of(operand)
    if tensor is None or letters in ("", columns):
        return None
    if letters[1:] == columns and letters[0] not in (_ELLIPSIS, *columns) and tensor.dim() > 2:
        expr = lift.laid_out(operand, "filter")
        return (letters[0], _COLUMNS, expr) if expr is not None else None
    expr = lift.operand(operand, weight=True)
    if expr is None:
        return None
    if letters[1:] == columns and letters[0] not in (_ELLIPSIS, *columns):
        return letters[0], _COLUMNS, expr
    if letters[:-1] == columns and letters[-1] not in (_ELLIPSIS, *columns):
        return _COLUMNS, letters[-1], expr
    if len(letters) != 2 or _ELLIPSIS in letters or set(letters) & set(columns) or tensor.dim() != 2:
        return None
    return letters[0], letters[1], expr


def _along(rows: str, edges: list[tuple[str, str, Expr]], diagonals: dict[str, Poly]) -> Expr | None:
    """The product along the path from the rows to the columns, on which each matrix lies once."""
    ends = [letter for start, end, _ in edges for letter in (start, end)]
    inner = set(ends) - {rows, _COLUMNS}
    if ends.count(rows) != 1 or ends.count(_COLUMNS) != 1 or any(ends.count(letter) != 2 for letter in inner):
        return None
    if not set(diagonals) <= {rows, *inner}:
        return None
    at, product, left = rows, None, list(edges)
    while left:
        edge = next((edge for edge in left if at in edge[:2]), None)
        if edge is None:
            return None
        left.remove(edge)
        start, end, expr = edge
        factor = expr if start == at else expr.transposed()
        factor = factor.left_diag(diagonals[at]) if at in diagonals else factor
        product = factor if product is None else product @ factor
        at = end if start == at else start
    return product if at == _COLUMNS else None
