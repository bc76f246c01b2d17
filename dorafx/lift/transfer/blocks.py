"""Weights put together of blocks of rows or columns: ``cat``, and ``pad`` with zeros.

``cat([P, Q])`` is ``S₁·P + S₂·Q``, where ``Sᵢ`` are the columns of the identity that belong to a block: a selection, which is never
formed. A delta of some rows of a packed weight (q and v of a fused projection) is a product of factors by that. What has no product in
it stays one value: of concatenated factors the graph has the product already.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import fx

from dorafx._compat.tensors import storage_id
from dorafx.graphs.operators import ZEROS, arguments
from dorafx.graphs.provenance import operator_name
from dorafx.graphs.tensors import tensor_of

from ..algebra import Expr, Mat, count_matrices
from ..lifter import Lifter, transfer
from ..values import MatrixValue, Value

_PARTS = frozenset(("getitem", "narrow", "slice", "chunk", "split", "split_with_sizes", "tensor_split"))


class _Block(NamedTuple):
    """Rows of what is put together: their term, the first of them, and how many they are."""

    expr: Expr
    start: int
    rows: int


@transfer("cat")
def cat(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "tensors", "dim")
    parts, dim, out = args.get("tensors"), args.get("dim", 0), tensor_of(node)
    if not isinstance(parts, (list, tuple)) or not isinstance(dim, int) or out is None or out.dim() != 2:
        return None
    by_row = dim % 2 == 0
    blocks, start = [], 0
    for part in parts:
        tensor = tensor_of(part)
        if tensor is None or tensor.dim() != 2 or tensor.dtype != out.dtype:
            return None
        rows = tensor.shape[0 if by_row else 1]
        if not isinstance(rows, int):
            return None
        if not _is_zero(lift, part):
            expr = lift.operand(part, weight=True)
            if expr is None:
                return None
            blocks.append(_Block(expr if by_row else expr.transposed(), start, rows))
        start += rows
    expr = _put_together(lift, blocks, start)
    return None if expr is None else MatrixValue(expr if by_row else expr.transposed())


@transfer("pad")
def pad(lift: Lifter, node: fx.Node) -> Value | None:
    """Zeros around a matrix."""
    args = arguments(node, "input", "pad", "mode", "value")
    widths, tensor = args.get("pad"), tensor_of(args.get("input"))
    # aten's ``constant_pad_nd`` has the value where ``F.pad`` has the mode.
    if args.get("mode", "constant") not in ("constant", 0) or args.get("value") not in (None, 0):
        return None
    if tensor is None or tensor.dim() != 2 or not isinstance(widths, (list, tuple)) or len(widths) not in (2, 4):
        return None
    left, right, above, below = [*widths, 0, 0][:4]
    sizes = (left, right, above, below, *tensor.shape)
    if not all(isinstance(size, int) for size in sizes) or min(left, right, above, below) < 0:
        return None
    expr = lift.operand(args["input"], weight=True)
    if expr is None:
        return None
    for before, after, rows in ((above, below, tensor.shape[0]), (left, right, tensor.shape[1])):
        put = _put_together(lift, [_Block(expr, before, rows)], before + rows + after)
        if put is None:
            return None
        expr = put.transposed()  # rows, then columns, and back
    return MatrixValue(expr)


def _is_zero(lift: Lifter, part: Any) -> bool:
    return isinstance(part, fx.Node) and lift.name_of(part) in ZEROS and part not in lift.written


def _put_together(lift: Lifter, blocks: Sequence[_Block], total: int) -> Expr | None:
    """``Σ Sᵢ·Pᵢ``; None where no block has a product in it, or one is a dense matrix that is no part of a weight cut into blocks."""
    exprs = [block.expr for block in blocks]
    if not all(lift.weights.is_made_of_weights(expr) for expr in exprs):
        return None
    if not any(expr.holds_product for expr in exprs):
        return None
    if any(expr.vanished for expr in exprs):
        return None
    if all(block.rows == total for block in blocks):
        return exprs[0] if len(exprs) == 1 else None
    whole = _cut_into(lift, blocks, total)
    expr = whole
    for block in blocks:
        select = Mat(lift.selection(block.start, block.rows, total))
        for (scalars, chain), c in block.expr.items:
            if count_matrices(chain) < 2:
                if whole is None:
                    return None
                continue
            term = Expr.of({(scalars, (select, *chain)): c})
            expr = term if expr is None else expr + term
    return expr


def _cut_into(lift: Lifter, blocks: Sequence[_Block], total: int) -> Expr | None:
    """The matrix of which the blocks' dense parts are consecutive rows, all of them, times what all are multiplied by."""
    expected = 0
    factors: set[tuple[fx.Node, bool, float]] = set()
    for block in blocks:
        dense = [(key, c) for key, c in block.expr.items if count_matrices(key[1]) < 2]
        if len(dense) != 1 or block.start != expected:
            return None
        (((scalars, chain), c),) = dense
        if scalars or len(chain) != 1 or not isinstance(chain[0], Mat):
            return None
        source = _rows_of(lift, chain[0], block)
        if source is None:
            return None
        factors.add((source, chain[0].atom.detached, c))
        expected += block.rows
    if len(factors) != 1:
        return None
    ((source, detached, c),) = factors
    tensor, value = tensor_of(source), lift.matrix(source)
    if expected != total or value is None or tensor is None or len(value.expr.items) != 1:
        return None
    if lift.requires_grad(value.expr) and not detached and source in lift.unrecorded:
        return None
    return (lift.detached(value.expr) if detached else value.expr).scaled(c)


def _rows_of(lift: Lifter, mat: Mat, block: _Block) -> fx.Node | None:
    """The matrix of as many rows as all blocks have together of which a factor is the block's rows: a view of it."""
    node = lift.atom_of(mat.atom).node
    if node is None or mat.transposed or node in lift.written:
        return None
    view, source, whole = tensor_of(node), node, None
    while whole is None:
        parent = source.args[0] if source.args and _takes_a_part(source) else None
        if not isinstance(parent, fx.Node):
            return None
        source, whole = parent, tensor_of(parent)  # that of a ``chunk`` are several
    if view is None or whole is None or whole.dim() != 2 or source in lift.written:
        return None
    known = (*whole.shape, *whole.stride(), *view.shape, *view.stride(), whole.storage_offset(), view.storage_offset())
    if not all(isinstance(size, int) for size in known):
        return None
    same = storage_id(view) == storage_id(whole) and whole.stride() == view.stride() and whole.dtype == view.dtype
    offset = view.storage_offset() - whole.storage_offset()
    if not same or view.shape[1] != whole.shape[1] or offset != block.start * whole.stride(0):
        return None
    return source


def _takes_a_part(node: fx.Node) -> bool:
    """Whether a node is a part of its first operand, as views of its memory are."""
    return node.op in ("call_function", "call_method") and operator_name(node).split(".")[0] in _PARTS
