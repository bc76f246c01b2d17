"""Batches of weights, one for each expert: ``W [E, d_out, d_in]``, ``A [E, r, d_in]``, ``B [E, d_out, r]``, ``m [E, d_out]``.

A product of matrices over a batch is a chain like any other, of factors that all have the batch as their first axis. Vectors of a batch
are ``[E, d]``, ``[E, d, 1]`` or ``[E, 1, d]``. What is known of such nodes is kept apart from other terms (:attr:`Lifter.batches`), so that
a vector for each expert is never taken for a matrix, nor for a vector that all share. Nothing is broadcast along the axis of the batch:
operands that do not have it, or have it with another size, leave a node unknown.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import fx

from dorafx.graphs.operators import arguments, first_argument, permuted_axes
from dorafx.graphs.provenance import operator_name
from dorafx.graphs.tensors import tensor_of

from ..algebra import Expr, Mat, Poly
from ..lifter import Lifter, Reading, transfer
from ..values import FLOAT_DTYPES, Gemm, MatrixValue, VectorValue, loses_accuracy
from .arithmetic import inverse_of
from .elementwise import at_least, root
from .filters import multiplies_weights, swapped_axes
from .indexing import takes_everything
from .products import computes

Batch = MatrixValue | VectorValue
Shape = tuple[int | str, ...]
"""Sizes of a tensor, symbols (of how many tokens there are) by their expressions."""


class _Operand(NamedTuple):
    """An argument of an elementwise operator, by all readings that it has. A vector without axis is a scalar for all experts."""

    shape: Shape
    matrix: MatrixValue | None = None
    vector: VectorValue | None = None


def _shape(arg: Any) -> Shape | None:
    tensor = tensor_of(arg)
    if tensor is None or tensor.dtype not in FLOAT_DTYPES:
        return None
    # A symbol that the program fixed is printed as the number.
    return tuple(int(n) if n.isdecimal() else n for n in map(str, tensor.shape))


def vector_axis_of(shape: Shape) -> int | None:
    """Along which axis a batch of vectors of this shape lies; None for a shape that has none, or several."""
    if len(shape) == 2:
        return -1
    if len(shape) == 3 and (shape[1] == 1) != (shape[2] == 1):
        return -1 if shape[1] == 1 else -2
    return None


def _of_atoms(lift: Lifter, expr: Expr, shape: Shape) -> list[tuple[Any, Any, float]] | None:
    """A sum of indeterminates of this shape as items of scalars, the atom as a batch, and the coefficient."""
    items = []
    for (scalars, chain), c in expr.items:
        factor = chain[0] if len(chain) == 1 else None
        if not isinstance(factor, Mat) or factor.transposed:
            return None
        info = lift.atom_of(factor.atom)
        if info.kind != "node" or info.node is None or _shape(info.node) != shape:
            return None
        atom = lift.batch_atom(info.node)
        if atom is None:
            return None
        items.append((scalars, atom._replace(detached=True) if factor.atom.detached else atom, c))
    return items


def _known(lift: Lifter, arg: Any) -> Batch | None:
    return lift.aside(lift.batches, arg)


def _plain(lift: Lifter, arg: Any) -> MatrixValue | None:
    """The term of an argument that is made of weights, where it is not known as a batch."""
    readable = isinstance(arg, fx.Node) and arg not in lift.batches and arg not in lift.written
    value = lift.value(arg) if readable else None
    if not isinstance(value, MatrixValue) or value.squared or value.layout != "last" or value.expr.vanished:
        return None
    return value if multiplies_weights(lift, value.expr) else None


def matrices(lift: Lifter, arg: Any) -> MatrixValue | None:
    """An argument as a batch of matrices: one that is known as such, or a weight of three axes."""
    known, shape = _known(lift, arg), _shape(arg)
    if known is not None or shape is None or len(shape) != 3:
        return known if isinstance(known, MatrixValue) else None
    value = _plain(lift, arg)
    items = _of_atoms(lift, value.expr, shape) if value is not None else None
    if items is None:
        # A view of weights in another shape is one value, as ``W.unsqueeze(0)``.
        whole = lift.batch_atom(arg) if value is not None and len(value.expr.items) == 1 else None
        return MatrixValue(Expr.mat(whole), layout="batch") if whole is not None else None
    return MatrixValue(Expr.of({(scalars, (Mat(atom),)): c for scalars, atom, c in items}), layout="batch")


def vectors(lift: Lifter, arg: Any) -> VectorValue | None:
    """An argument as a batch of vectors: one that is known as such, or a weight of that shape."""
    known, shape = _known(lift, arg), _shape(arg)
    if known is not None or shape is None:
        return known if isinstance(known, VectorValue) else None
    axis, value = vector_axis_of(shape), _plain(lift, arg)
    items = _of_atoms(lift, value.expr, shape) if value is not None and axis is not None else None
    if items is None:
        return None
    poly = Poly.of({})
    for scalars, atom, c in items:
        poly = poly + Poly.var(atom) * Poly(((scalars, c),))
    return VectorValue(poly, axis)


def _operand(lift: Lifter, arg: Any) -> _Operand | None:
    tensor = tensor_of(arg)
    if tensor is None or not tensor.dim():
        value = lift.value(arg)
        scalar = value if isinstance(value, VectorValue) and value.axis is None else None
        return _Operand((), vector=scalar) if scalar is not None else None
    shape = _shape(arg)
    if shape is None:
        return None
    matrix, vector = matrices(lift, arg), vectors(lift, arg)
    return _Operand(shape, matrix, vector) if matrix is not None or vector is not None else None


# -- sums and products by element ---------------------------------------------------------------------------------------


def _added(a: _Operand, b: _Operand, sign: float) -> Batch | None:
    if a.vector is not None and b.vector is not None and (a.shape == b.shape or () in (a.shape, b.shape)):
        return VectorValue(a.vector.poly + b.vector.poly.scaled(sign), _axis(a.vector, b.vector))
    if a.matrix is None or b.matrix is None or a.shape != b.shape:
        return _biased(a, b, sign)
    if a.matrix.squared or b.matrix.squared:
        return None
    return replace(a.matrix, expr=a.matrix.expr + b.matrix.expr.scaled(sign))


def _biased(a: _Operand, b: _Operand, sign: float) -> MatrixValue | None:
    """A batch of matrices plus a batch of row vectors, which is added to each row."""
    matrix, vector = (a, b) if a.matrix is not None else (b, a)
    if matrix.matrix is None or matrix.matrix.squared or vector.vector is None or not matrix.shape[2:]:
        return None
    batch, _, columns = matrix.shape
    if vector.shape != (batch, 1, columns) or columns == 1:
        return None
    m, v = (1.0, sign) if matrix is a else (sign, 1.0)
    return replace(matrix.matrix, expr=matrix.matrix.expr.scaled(m) + Expr.broadcast(vector.vector.poly).scaled(v))


def _axis(v: VectorValue, w: VectorValue) -> int | None:
    return v.axis if v.axis is not None else w.axis


def _multiplied(a: _Operand, b: _Operand) -> Batch | None:
    if a.vector is not None and b.vector is not None and (a.shape == b.shape or () in (a.shape, b.shape)):
        return VectorValue(a.vector.poly * b.vector.poly, _axis(a.vector, b.vector))
    if a.matrix is not None and a.matrix == b.matrix and a.shape == b.shape:
        return None if a.matrix.squared else replace(a.matrix, squared=True)
    if a.matrix is not None and b.vector is not None:
        return _scaled(a.matrix, a.shape, b.vector, b.shape)
    if b.matrix is not None and a.vector is not None:
        return _scaled(b.matrix, b.shape, a.vector, a.shape)
    return None


def _scaled(m: MatrixValue, shape: Shape, v: VectorValue, of: Shape) -> MatrixValue | None:
    """A batch of matrices whose rows or columns are scaled by a batch of vectors, or all by a scalar."""
    if m.squared:
        return None
    if v.axis is None:
        constant = v.poly.constant
        return replace(m, expr=m.expr.scaled(constant) if constant is not None else m.expr.times_scalar(v.poly))
    batch, rows, columns = shape
    if of == (batch, rows, 1) and rows != 1:
        return replace(m, expr=m.expr.left_diag(v.poly))
    if of == (batch, 1, columns) and columns != 1:
        return replace(m, expr=m.expr.right_diag(v.poly))
    return None


def _note(lift: Lifter, node: fx.Node, value: Batch | None) -> None:
    if value is not None and (not isinstance(value, VectorValue) or value.axis is not None):
        lift.note_batch(node, value)


def _elementwise(lift: Lifter, node: fx.Node, *names: str) -> tuple[_Operand, _Operand] | None:
    """The two operands of an elementwise operator, of which one at least has the axis of a batch."""
    args = arguments(node, *names)
    given = [args.get(name) for name in names[:2]]
    if not any(isinstance(a, fx.Node) and (a in lift.batches or _plain(lift, a) is not None) for a in given):
        return None
    first, second = (_operand(lift, a) for a in given)
    return (first, second) if first is not None and second is not None else None


@transfer("add", "sub", "rsub", reading=Reading.BATCH)
def add(lift: Lifter, node: fx.Node) -> None:
    operands = _elementwise(lift, node, "input", "other", "alpha")
    alpha = arguments(node, "input", "other", "alpha").get("alpha", 1)
    if operands is None or not isinstance(alpha, (int, float)):
        return
    a, b = operands
    if lift.name_of(node) == "rsub":
        a, b = b, a
        if alpha != 1:
            return
    _note(lift, node, _added(a, b, float(alpha) if lift.name_of(node) == "add" else -float(alpha)))


@transfer("mul", reading=Reading.BATCH)
def mul(lift: Lifter, node: fx.Node) -> None:
    operands = _elementwise(lift, node, "input", "other")
    if operands is not None:
        _note(lift, node, _multiplied(*operands))


@transfer("div", reading=Reading.BATCH)
def div(lift: Lifter, node: fx.Node) -> None:
    operands = _elementwise(lift, node, "input", "other")
    if operands is None or arguments(node, "input", "other").get("rounding_mode") is not None:
        return
    a, b = operands
    inverse = inverse_of(lift, b.vector) if b.vector is not None else None
    if inverse is not None:
        _note(lift, node, _multiplied(a, _Operand(b.shape, vector=inverse)))


@transfer("neg", reading=Reading.BATCH)
def neg(lift: Lifter, node: fx.Node) -> None:
    known = _known(lift, first_argument(node))
    if isinstance(known, VectorValue):
        lift.note_batch(node, replace(known, poly=known.poly.scaled(-1.0)))
    elif known is not None and not known.squared:
        lift.note_batch(node, replace(known, expr=known.expr.scaled(-1.0)))


@transfer("square", "pow", reading=Reading.BATCH)
def power(lift: Lifter, node: fx.Node) -> None:
    args = arguments(node, "input", "exponent")
    exponent: Any = 2 if lift.name_of(node) == "square" else args.get("exponent")
    if not isinstance(exponent, (int, float)):
        return
    known = _known(lift, args.get("input"))
    if isinstance(known, VectorValue):
        if exponent in (0.5, -0.5):
            _rooted(lift, node, known, exponent < 0)
        elif exponent == -1:
            _note(lift, node, inverse_of(lift, known))
        return
    value = matrices(lift, args.get("input"))
    if exponent == 2 and value is not None and not value.squared:
        lift.note_batch(node, replace(value, squared=True))


def _rooted(lift: Lifter, node: fx.Node, value: VectorValue, inverted: bool) -> None:
    rooted = root(lift, value, node)
    _note(lift, node, inverse_of(lift, rooted) if inverted and rooted is not None else rooted)


@transfer("sqrt", "rsqrt", reading=Reading.BATCH)
def sqrt(lift: Lifter, node: fx.Node) -> None:
    known = _known(lift, first_argument(node))
    if isinstance(known, VectorValue):
        _rooted(lift, node, known, lift.name_of(node) == "rsqrt")


@transfer("reciprocal", reading=Reading.BATCH)
def reciprocal(lift: Lifter, node: fx.Node) -> None:
    known = _known(lift, first_argument(node))
    if isinstance(known, VectorValue):
        _note(lift, node, inverse_of(lift, known))


@transfer("clamp", "clamp_min", reading=Reading.BATCH)
def clamp(lift: Lifter, node: fx.Node) -> None:
    args = arguments(node, "input", "min", "max")
    low, known = args.get("min"), _known(lift, args.get("input"))
    if args.get("max") is None and isinstance(low, (int, float)) and isinstance(known, VectorValue):
        lift.note_batch(node, at_least(lift, known, float(low)))


# -- products of matrices -----------------------------------------------------------------------------------------------


def _product(
    lift: Lifter, node: fx.Node, lhs: Any, rhs: Any, flip: tuple[bool, bool] = (False, False), bias: Any = None
) -> Expr | None:
    """The product of two batches of matrices, either of them transposed, one of weights at least; ``bias``: what the node adds to it.
    The first may be tokens ``[T, d]`` or ``[1, T, d]`` that all experts share."""
    first, second, out = _shape(lhs), _shape(rhs), _shape(node)
    dtypes = {t.dtype for t in map(tensor_of, (lhs, rhs, node)) if t is not None}
    if first is None or second is None or out is None or len(second) != 3 or len(out) != 3:
        return None
    if len(dtypes) > 1 and torch.float64 in dtypes:
        return None  # an error at run time; autocast casts other dtypes
    shared = len(first) == 2 or (len(first) == 3 and first[0] == 1 != second[0])
    if not shared and (len(first) != 3 or first[0] != second[0]):
        return None
    factors, weights = [], 0
    for arg, flipped in zip((lhs, rhs), flip):
        value = matrices(lift, arg) if not (shared and arg is lhs) else None
        of_weights = value is not None and not value.squared and multiplies_weights(lift, value.expr)
        weights += of_weights
        if value is None or value.squared or not (of_weights or len(value.expr.items) == 1):
            # Activations: a sum of them is one value, however it was computed.
            unknown = lift.batch_atom(arg) if isinstance(arg, fx.Node) else None
            if unknown is None:
                return None
            value = MatrixValue(Expr.mat(unknown), layout="batch")
        factors.append(value.expr.transposed() if flipped else value.expr)
    if not weights:
        return None
    product = factors[0] @ factors[1]
    if not flip[0]:
        computes(lift, product, Gemm(node, lhs, rhs, flip[1], bias))
    return product


@transfer("bmm", "matmul", reading=Reading.BATCH)
def bmm(lift: Lifter, node: fx.Node) -> None:
    args = arguments(node, "input", "other" if lift.name_of(node) == "matmul" else "mat2")
    product = _product(lift, node, args.get("input"), args.get("other", args.get("mat2")))
    if product is not None:
        lift.note_batch(node, MatrixValue(product, layout="batch"))


@transfer("baddbmm", reading=Reading.BATCH)
def baddbmm(lift: Lifter, node: fx.Node) -> None:
    args = arguments(node, "input", "batch1", "batch2")
    beta, alpha, total = args.get("beta", 1), args.get("alpha", 1), args.get("input")
    if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)) or _shape(total) != _shape(node):
        return
    value, product = matrices(lift, total), _product(lift, node, args.get("batch1"), args.get("batch2"), bias=node)
    if value is None or value.squared or product is None:
        return
    expr = value.expr.scaled(float(beta)) + product.scaled(float(alpha))
    lift.note_batch(node, MatrixValue(expr, layout="batch"))


@transfer("einsum", reading=Reading.BATCH)
def einsum(lift: Lifter, node: fx.Node) -> None:
    equation, *operands = node.args or (None,)
    if len(operands) == 1 and isinstance(operands[0], (list, tuple)):
        operands = list(operands[0])
    if not isinstance(equation, str) or "->" not in equation or "." in equation or len(operands) != 2:
        return
    inputs, _, result = equation.replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    shapes = [_shape(o) for o in operands]
    if len(left) != len(shapes[0] or ()) or len(right) != len(shapes[1] or ()):
        return
    sizes: dict[str, int | str] = {}
    for letters, shape in zip((left, right), shapes):
        if any(sizes.setdefault(letter, size) != size for letter, size in zip(letters, shape or ())):
            return  # a size of 1 is broadcast
    # Tokens that all experts share have no letter for the batch.
    left, right = (result[:1] + s if len(s) == 2 and result[:1] not in s else s for s in (left, right))
    if not len(left) == len(right) == 3 or any(len(set(s)) != len(s) for s in (left, right, result)):
        return
    if not left[0] == right[0] == result[:1]:
        return
    if left == right and len(result) == 2 and result[1] in left[1:]:
        value = matrices(lift, operands[0])
        if value is not None and not value.squared and value == matrices(lift, operands[1]):
            squares = replace(value, squared=True)
            _reduced(lift, node, "sumsq", squares, operands[0], "row" if result[1] == left[1] else "col", -1)
        return
    summed = set(left[1:]) & set(right[1:])
    if len(result) != 3 or len(summed) != 1 or set(result[1:]) != set(left[1:]) ^ set(right[1:]):
        return
    (letter,) = summed
    if result[1] not in left:
        left, right = right, left
        operands.reverse()
    product = _product(lift, node, operands[0], operands[1], (left[2] != letter, right[1] != letter))
    if product is not None:
        lift.note_batch(node, MatrixValue(product, layout="batch"))


# -- norms --------------------------------------------------------------------------------------------------------------


def _reduced(
    lift: Lifter,
    node: fx.Node,
    kind: Literal["norm", "sumsq"],
    value: MatrixValue,
    arg: Any,
    side: Literal["row", "col"],
    axis: int,
) -> VectorValue | None:
    tensor, out = tensor_of(arg), tensor_of(node)
    if value.squared != (kind == "sumsq") or tensor is None or out is None or out.dtype not in FLOAT_DTYPES:
        return None
    if loses_accuracy(tensor.dtype, out.dtype) or node.kwargs.get("dtype") not in (None, *FLOAT_DTYPES):
        return None
    atom = lift.norm_atom(kind, value.expr, side, out.dtype == torch.float64)
    if kind == "norm":
        lift.atom_of(atom).sites.append(node)
    vector = VectorValue(Poly.var(atom), axis)
    lift.note_batch(node, vector)
    return vector


def _side(dim: Any) -> Literal["row", "col"] | None:
    """Which vector is left of matrices ``[batch, rows, cols]`` where one axis is summed over."""
    if isinstance(dim, (tuple, list)):
        dim = dim[0] if len(dim) == 1 else None
    if not isinstance(dim, int) or isinstance(dim, bool) or not -3 <= dim < 3 or dim % 3 == 0:
        return None
    return "row" if dim % 3 == 2 else "col"


def _along(
    lift: Lifter, node: fx.Node, kind: Literal["norm", "sumsq"], arg: Any, dim: Any, keepdim: Any
) -> VectorValue | None:
    value, side = matrices(lift, arg), _side(dim)
    if (
        kind == "norm"
        and arg in lift.written
        and lift.weights.depends_on_parameters_only(arg)
        and len(_shape(arg) or ()) == 3
    ):
        unknown = lift.batch_atom(arg)  # of which the norm has to be recorded, too
        value = MatrixValue(Expr.mat(unknown), layout="batch") if unknown is not None else None
    if value is None or side is None:
        return None
    axis = -2 if keepdim and side == "row" else -1
    if keepdim and vector_axis_of(_shape(node) or ()) != axis:
        return None  # rows of one entry: which axis is the vector's cannot be told
    return _reduced(lift, node, kind, value, arg, side, axis)


@transfer("norm", "linalg_norm", "vector_norm", reading=Reading.BATCH)
def norm(lift: Lifter, node: fx.Node) -> None:
    order_name = "p" if "p" in node.kwargs else "ord"
    args = arguments(node, "input", order_name, "dim", "keepdim")
    order = args.get(order_name)
    if order not in (None, 2, 2.0, "fro") or isinstance(order, bool):
        return
    arg = args.get("input", args.get("x", args.get("A")))
    _along(lift, node, "norm", arg, args.get("dim"), args.get("keepdim", False))


@transfer("normalize", reading=Reading.BATCH)
def normalize(lift: Lifter, node: fx.Node) -> None:
    """``w / max(‖w‖, eps)`` of each row or column."""
    args = arguments(node, "input", "p", "dim", "eps", "out")
    value, side, eps = matrices(lift, args.get("input")), _side(args.get("dim", 1)), args.get("eps", 1e-12)
    if args.get("p", 2.0) != 2 or args.get("out") is not None or not isinstance(eps, (int, float)):
        return
    if value is None or value.squared or side is None:
        return
    tensor = tensor_of(args["input"])
    norms = lift.norm_atom("norm", value.expr, side, tensor is not None and tensor.dtype == torch.float64)
    inverse = inverse_of(lift, at_least(lift, VectorValue(Poly.var(norms), -1), float(eps)))
    if inverse is not None:
        scaled = value.expr.left_diag(inverse.poly) if side == "row" else value.expr.right_diag(inverse.poly)
        lift.note_batch(node, replace(value, expr=scaled))


@transfer("sum", "mean", reading=Reading.BATCH)
def sum_of_squares(lift: Lifter, node: fx.Node) -> None:
    args = arguments(node, "input", "dim", "keepdim")
    known, dim = _known(lift, args.get("input")), args.get("dim")
    if not isinstance(known, MatrixValue) or not known.squared:
        return
    sums = _along(lift, node, "sumsq", args["input"], dim, args.get("keepdim", False))
    shape = _shape(args["input"])
    if lift.name_of(node) == "mean" and sums is not None and shape is not None:
        lift.batches.pop(node)
        (size,) = [shape[d] for d in (dim if isinstance(dim, (tuple, list)) else [dim]) if isinstance(d, int)]
        if args.get("dtype") is None and isinstance(size, int) and size:
            _note(lift, node, replace(sums, poly=sums.poly.scaled(1.0 / size)))


# -- operators that keep the value ----------------------------------------------------------------------------------------


@transfer("detach", "data", reading=Reading.BATCH)
def detach(lift: Lifter, node: fx.Node) -> None:
    known = _known(lift, first_argument(node))
    if known is not None:
        lift.note_batch(node, lift.detach(known))


@transfer("identity", reading=Reading.BATCH)
def identity(lift: Lifter, node: fx.Node) -> None:
    _note(lift, node, _known(lift, first_argument(node)))


@transfer("cast", reading=Reading.BATCH)
def cast(lift: Lifter, node: fx.Node) -> None:
    before, after = tensor_of(first_argument(node)), tensor_of(node)
    known = _known(lift, first_argument(node))
    if known is None or before is None or after is None or before.device != after.device:
        return
    if before.dtype not in FLOAT_DTYPES or after.dtype not in FLOAT_DTYPES:
        return
    if loses_accuracy(before.dtype, after.dtype):
        if isinstance(known, VectorValue):
            known = replace(known, poly=lift.rounded_vector(known.poly, after.dtype))
        elif all(len(chain) > 1 for (_, chain), _ in known.expr.items) or len(known.expr.items) > 1:
            lift.note_rounding(node, after.dtype)
        else:
            return  # a single matrix: the rounded one is another
    lift.note_batch(node, known)


def _count(shape: Shape) -> int | None:
    """How many entries there are; None if a symbol decides that."""
    return math.prod(n for n in shape if isinstance(n, int)) if all(isinstance(n, int) for n in shape) else None


def _takes_all(index: Any) -> bool:
    """Whether an index takes everything, apart from the entry that it may take of axes of size 1."""
    items = index if isinstance(index, tuple) else (index,)
    return takes_everything(tuple(slice(None) if type(i) is int and i in (0, -1) else i for i in items))


@transfer("view", "getitem", "slice", "select", reading=Reading.BATCH)
def view(lift: Lifter, node: fx.Node) -> None:
    """A view of the same shape, or one that adds or drops the axes of size 1 of a batch of vectors."""
    source = first_argument(node)
    before, after, tensor, out = _shape(source), _shape(node), tensor_of(source), tensor_of(node)
    if before is None or after is None or tensor is None or out is None or tensor.dtype != out.dtype:
        return
    name = lift.name_of(node)
    if (name == "getitem" and not _takes_all(node.args[1])) or (name == "slice" and before != after):
        return
    if before != after and (_count(before) is None or _count(before) != _count(after)):
        return  # an entry of an axis of several
    if before == after:
        _note(lift, node, _known(lift, source))
        return
    vector, axis = vectors(lift, source), vector_axis_of(after)
    if vector is None or vector.axis is None or axis is None or before[0] != after[0]:
        return
    if _count(before[1:]) == _count(after[1:]) not in (1, None):
        _note(lift, node, replace(vector, axis=axis))


def _swapped(lift: Lifter, node: fx.Node) -> None:
    """The two axes after that of the batch, exchanged."""
    vector = _known(lift, first_argument(node))
    if isinstance(vector, VectorValue):
        if len(_shape(node) or ()) == 3 and vector.axis is not None:
            lift.note_batch(node, replace(vector, axis=-3 - vector.axis))
        return
    value = matrices(lift, first_argument(node))
    if value is not None:
        lift.note_batch(node, replace(value, expr=value.expr.transposed()))


@transfer("transpose", reading=Reading.BATCH)
def transpose(lift: Lifter, node: fx.Node) -> None:
    dims, shape = swapped_axes(node), _shape(first_argument(node))
    if dims is not None and shape is not None and len(shape) == 3 and sorted(d % 3 for d in dims) == [1, 2]:
        _swapped(lift, node)


@transfer("permute", reading=Reading.BATCH)
def permute(lift: Lifter, node: fx.Node) -> None:
    order, shape = permuted_axes(node), _shape(first_argument(node))
    if shape is not None and len(shape) == 3 and [d % 3 for d in order if isinstance(d, int)] == [0, 2, 1]:
        _swapped(lift, node)


@transfer("getattr", reading=Reading.BATCH)
def attribute(lift: Lifter, node: fx.Node) -> None:
    if len(node.args) > 1 and node.args[1] in ("mT", "mH") and len(_shape(first_argument(node)) or ()) == 3:
        _swapped(lift, node)
    elif len(node.args) > 1 and node.args[1] == "data":
        detach(lift, node)


@transfer("t", reading=Reading.BATCH)
def matrix_transpose(lift: Lifter, node: fx.Node) -> None:
    name = operator_name(node)
    name = name.split(".")[1] if name.startswith("aten.") else name
    if name in ("mT", "mH", "adjoint") and len(_shape(first_argument(node)) or ()) == 3:
        _swapped(lift, node)
