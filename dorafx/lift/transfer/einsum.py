"""``einsum``: products of matrices, squared sums and scalings, by the letters of the equation."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..algebra import Expr, Poly
from ..lifter import Lifter, tensor_of, transfer
from ..values import AtomInfo, MatrixValue, Value, VectorValue
from .arithmetic import outer_product

_ELLIPSIS = "*"


@transfer("einsum")
def einsum(lift: Lifter, node: fx.Node) -> Value | None:
    equation, operands = node.args[0], node.args[1:]
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "->" not in equation:
        return None
    inputs, _, result = equation.replace(" ", "").replace("...", _ELLIPSIS).partition("->")
    subscripts = inputs.split(",")
    tensors = [tensor_of(o) for o in operands]
    if len(subscripts) != len(operands) or any(t is None for t in tensors):
        return None
    if any(len(set(s)) != len(s) for s in (*subscripts, result)):
        return None  # a diagonal
    if len(operands) == 2:
        special = _squared_sum(lift, subscripts, result, operands) or _vectors(lift, subscripts, result, operands)
        if special is not None:
            return special
    return _chain(lift, subscripts, result, operands)


def _squared_sum(lift: Lifter, subscripts: list[str], result: str, operands: tuple[Any, ...]) -> Value | None:
    """``oi,oi->o``: the squared norms of rows; ``oi,oi->i`` of columns."""
    left, right = (lift.matrix(o) for o in operands)
    if subscripts[0] != subscripts[1] or len(subscripts[0]) != 2 or _ELLIPSIS in subscripts[0] or len(result) != 1:
        return None
    if left is None or left != right or result not in subscripts[0]:
        return None
    side = "row" if result == subscripts[0][0] else "col"
    grad, parameter = lift.requires_grad(left.expr), lift.is_parameter_term(left.expr)
    info = AtomInfo("sumsq", grad, parameter, expr=left.expr, side="row" if side == "row" else "col")
    return VectorValue(Poly.var(lift.intern(info)), -1)


def _vectors(lift: Lifter, subscripts: list[str], result: str, operands: tuple[Any, ...]) -> Value | None:
    """``o,i->oi``: a product of rank one; ``oi,o->oi`` and ``oi,i->oi``: a matrix scaled."""
    if len(result) < 2:
        return None
    first, second = (lift.value(o) for o in operands)
    if all(len(s) == 1 for s in subscripts) and _ELLIPSIS not in result:
        by_letter = dict(zip(subscripts, (first, second)))
        column, row = (by_letter.get(letter) for letter in result)
        if isinstance(column, VectorValue) and isinstance(row, VectorValue):
            return outer_product(column.poly, row.poly)
        return None
    matrix, vector, letters, along = (first, second, *subscripts)
    if isinstance(first, VectorValue):
        matrix, vector, letters, along = second, first, subscripts[1], subscripts[0]
    if not isinstance(matrix, MatrixValue) or matrix.squared or not isinstance(vector, VectorValue):
        return None
    if letters != result or len(along) != 1 or along == _ELLIPSIS:
        return None
    if along == letters[-1]:
        return MatrixValue(matrix.expr.right_diag(vector.poly))
    if len(letters) == 2 and letters[0] != _ELLIPSIS and along == letters[0]:
        return MatrixValue(matrix.expr.left_diag(vector.poly))
    return None


def _chain(lift: Lifter, subscripts: list[str], result: str, operands: tuple[Any, ...]) -> Value | None:
    """A product of matrices, found as a path: each operand leads from one letter to another, a letter that two operands
    share is summed over, and the path leads from the result's rows to its columns. All leading letters together are rows."""
    if len(result) < 2:
        return None
    rows, column = result[:-1], result[-1]
    ends = []
    for letters in subscripts:
        if len(letters) < 2:
            return None
        # Only the operand that brings the result's leading letters may have more than two.
        head = letters[:-1] if letters[:-1] == rows or len(letters) == 2 else None
        if head is None or (head == _ELLIPSIS and head != rows):
            return None
        ends.append((head, letters[-1]))
    counts: dict[str, int] = {}
    for start, end in ends:
        counts[start] = counts.get(start, 0) + 1
        counts[end] = counts.get(end, 0) + 1
    if counts.get(rows) != 1 or counts.get(column) != 1 or rows == column:
        return None
    if any(count != 2 for letter, count in counts.items() if letter not in (rows, column)):
        return None
    product: Expr | None = None
    at, left = rows, list(range(len(operands)))
    while left:
        step = next(((i, ends[i][0] == at) for i in left if at in ends[i]), None)
        if step is None:
            return None
        index, forward = step
        left.remove(index)
        factor = lift.operand(operands[index], weight=product is not None)
        if factor is None:
            return None
        factor = factor if forward else factor.transposed()
        product = factor if product is None else product @ factor
        at = ends[index][1] if forward else ends[index][0]
    return MatrixValue(product) if product is not None and at == column else None
