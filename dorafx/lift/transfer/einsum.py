"""``einsum``: products of matrices, squared sums and scalings, by the letters of the equation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from dorafx.graphs.tensors import tensor_of

from ..algebra import Expr, Poly
from ..lifter import Lifter, transfer
from ..values import MatrixValue, Value, VectorValue
from .arithmetic import outer_product, same_size
from .filters import filters_by_letters

_ELLIPSIS = "*"


@transfer("einsum")
def einsum(lift: Lifter, node: fx.Node) -> Value | None:
    equation, *rest = node.args or (None,)
    operands: Sequence[Any] = rest
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
    if not _is_of_one_size(subscripts, [tuple(t.shape) for t in tensors if t is not None]):
        return None  # a size of 1 is broadcast
    value, tensor = by_letters(lift, subscripts, result, operands), tensor_of(node)
    if value is None and tensor is not None and tensor.dim() > 2:
        return filters_by_letters(lift, subscripts, result, operands)
    return value


def _is_of_one_size(subscripts: list[str], shapes: list[tuple[Any, ...]]) -> bool:
    """Whether each letter stands for one size, whichever operand has it."""
    sizes: dict[str, Any] = {}
    for letters, shape in zip(subscripts, shapes):
        before, ellipsis, after = letters.partition(_ELLIPSIS)
        known = [*zip(before, shape), *(zip(after[::-1], shape[::-1]) if ellipsis else ())]
        if any(not same_size(sizes.setdefault(letter, size), size) for letter, size in known):
            return False
    return True


def by_letters(lift: Lifter, subscripts: list[str], result: str, operands: Sequence[Any]) -> Value | None:
    """The term of an ``einsum``, from the subscripts of each operand and of the result; an ellipsis counts as one letter."""
    if len(operands) == 2:
        special = _squared_sum(lift, subscripts, result, operands) or _vectors(lift, subscripts, result, operands)
        if special is not None:
            return special
    return _chain(lift, subscripts, result, operands)


def _squared_sum(lift: Lifter, subscripts: list[str], result: str, operands: Sequence[Any]) -> Value | None:
    """``oi,oi->o``: the squared norms of rows; ``oi,oi->i`` of columns."""
    left, right = (lift.matrix(o) for o in operands)
    if subscripts[0] != subscripts[1] or len(subscripts[0]) != 2 or _ELLIPSIS in subscripts[0] or len(result) != 1:
        return None
    if left is None or left != right or result not in subscripts[0]:
        return None
    tensor = tensor_of(operands[0])
    double = tensor is not None and tensor.dtype == torch.float64
    atom = lift.norm_atom("sumsq", left.expr, "row" if result == subscripts[0][0] else "col", double)
    return VectorValue(Poly.var(atom), -1)


def _vectors(lift: Lifter, subscripts: list[str], result: str, operands: Sequence[Any]) -> Value | None:
    """``o,i->oi``: a product of rank one."""
    if len(result) < 2:
        return None
    first, second = (lift.value(o) for o in operands)
    if all(len(s) == 1 for s in subscripts) and _ELLIPSIS not in result:
        by_letter = dict(zip(subscripts, (first, second)))
        column, row = (by_letter.get(letter) for letter in result)
        if isinstance(column, VectorValue) and isinstance(row, VectorValue):
            return outer_product(column.poly, row.poly)
    return None


def _chain(lift: Lifter, subscripts: list[str], result: str, operands: Sequence[Any]) -> Value | None:
    """A product of matrices, found as a path. Each operand leads from one letter to another, and a letter that two operands share is
    summed over; the path leads from the result's rows to its columns. All leading letters together are the rows. An operand of one
    letter is a diagonal matrix on the path: ``or,r,ri->oi``."""
    if len(result) < 2:
        return None
    rows, column = result[:-1], result[-1]
    diagonals: dict[str, Poly] = {}
    matrices, ends = [], []
    for letters, operand in zip(subscripts, operands):
        if len(letters) < 2:
            vector = lift.vector(operand)
            if not isinstance(vector, VectorValue) or letters in ("", _ELLIPSIS):
                return None
            diagonals[letters] = diagonals[letters] * vector.poly if letters in diagonals else vector.poly
            continue
        # Only the operand with the result's leading letters may have more than two.
        head = letters[:-1] if letters[:-1] == rows or len(letters) == 2 else None
        if head is None or (head == _ELLIPSIS and head != rows):
            return None
        ends.append((head, letters[-1]))
        matrices.append(operand)
    counts: dict[str, int] = {}
    for start, end in ends:
        counts[start] = counts.get(start, 0) + 1
        counts[end] = counts.get(end, 0) + 1
    if counts.get(rows) != 1 or counts.get(column) != 1 or rows == column:
        return None
    if any(count != 2 for letter, count in counts.items() if letter not in (rows, column)):
        return None
    if any(letter not in counts for letter in diagonals):
        return None
    product: Expr | None = None
    at, left = rows, list(range(len(matrices)))
    while left:
        step = next(((i, ends[i][0] == at) for i in left if at in ends[i]), None)
        if step is None:
            return None
        index, forward = step
        left.remove(index)
        alone = lift.matrix(matrices[index]) if len(matrices) == 1 else None
        factor = alone.expr if alone is not None else lift.operand(matrices[index], weight=product is not None)
        tensor = tensor_of(matrices[index])
        if factor is None or tensor is None or (product is not None and tensor.dim() != 2):
            return None
        factor = factor if forward else factor.transposed()
        if at in diagonals:
            factor = factor.left_diag(diagonals[at])
        product = factor if product is None else product @ factor
        at = ends[index][1] if forward else ends[index][0]
    if product is None or at != column:
        return None
    return MatrixValue(product.right_diag(diagonals[column]) if column in diagonals else product)
