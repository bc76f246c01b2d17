"""Matrix products, identities and diagonal matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dorafx.graphs.operators import arguments
from dorafx.graphs.tensors import tensor_of

from ..algebra import Diag, Expr, Poly
from ..lifter import Lifter, transfer
from ..values import FLOAT_DTYPES, Gemm, MatrixValue, Value, VectorValue
from .arithmetic import outer_product
from .filters import filters_by_letters
from .norms import diagonal_of_gram


def product_of(lift: Lifter, node: fx.Node, lhs: Any, rhs: Any, transposed: bool, bias: Any = None) -> Expr | None:
    """``lhs · rhs`` or ``lhs · rhsᵀ``, where ``rhs`` is a matrix, or one that is repeated for each entry of a batch."""
    weight = tensor_of(rhs)
    x = tensor_of(lhs)
    if weight is None or x is None or not x.dim():
        return None
    repeated = lift.aside(lift.repeated, rhs) if x.dim() == 3 and str(x.shape[0]) == str(weight.shape[0]) else None
    if weight.dim() != 2 and repeated is None:
        return None
    if x.dtype != weight.dtype and torch.float64 in (x.dtype, weight.dtype):
        return None  # an error at run time, but not while tracing; autocast casts other mixed dtypes, but not fp64
    left, right = (
        lift.operand(lhs) if x.dim() > 1 else _row(lift, lhs),
        lift.operand(rhs, weight=True) if repeated is None else repeated.expr,
    )
    if left is None or right is None:
        return None
    right = right.transposed() if transposed else right
    if all(isinstance(f, Diag) for (_, chain), _ in right.items for f in chain):
        # The product is only a scaling, for which a sum need not become an atom.
        scaled = lift.matrix(lhs)
        return scaled.expr @ right if scaled is not None else left @ right
    product = left @ right
    computes(lift, product, Gemm(node, lhs, rhs, transposed, bias))
    return product


def _row(lift: Lifter, arg: Any) -> Expr | None:
    """A single token ``[d]`` as an operand; a sum becomes one indeterminate, as in :meth:`Lifter.operand`."""
    value = lift.value(arg)
    if not isinstance(value, VectorValue) or value.axis is None:
        return None
    if value.row is not None and len(value.row.items) == 1:
        return value.row
    atoms = [atom for atom in value.poly.atoms() if value.poly == Poly.var(atom)]
    if not atoms and isinstance(sealed := lift.atom_value(arg), VectorValue):
        atoms = list(sealed.poly.atoms())
    return Expr.mat(atoms[0]) if atoms else None


def _value_of(lift: Lifter, node: fx.Node, product: Expr) -> Value | None:
    """The value of a product; for a single token it is a vector that can also be read as a matrix of one row."""
    tensor = tensor_of(node)
    if tensor is None or tensor.dim() > 1:
        return MatrixValue(product)
    vector = lift.atom_value(node)
    return VectorValue(vector.poly, vector.axis, product) if isinstance(vector, VectorValue) else None


def computes(lift: Lifter, product: Expr, gemm: Gemm) -> None:
    """Note which node computes a product. While no gradients are recorded, the node computes the detached product."""
    term = product if lift.records_gradients else lift.detached(product)
    lift.gemms.setdefault(term, []).append(replace(gemm, detached=term != product))


@transfer("linear")
def linear(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "weight", "bias")
    bias = args.get("bias")
    product = product_of(lift, node, args.get("input"), args.get("weight"), True, bias)
    if product is None:
        return None
    if bias is not None:
        vector = lift.vector(bias)
        if vector is None or vector.axis != -1:
            return None
        product = product + Expr.broadcast(vector.poly)
    return _value_of(lift, node, product)


@transfer("matmul", "mv")
def matmul(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "other")
    left, right = args.get("input"), args.get("other", args.get("mat2", args.get("vec")))
    vector = tensor_of(right)
    if vector is not None and vector.dim() == 1:
        product = product_of(lift, node, right, left, True)  # W·x is the row x·Wᵀ
    else:
        product = product_of(lift, node, left, right, False)
    return _value_of(lift, node, product) if product is not None else None


@transfer("addmm")
def addmm(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "mat1", "mat2")
    beta, alpha = args.get("beta", 1), args.get("alpha", 1)
    if not isinstance(beta, (int, float)) or not isinstance(alpha, (int, float)):
        return None
    added = args.get("input")
    plain_bias = beta == 1 and alpha == 1
    product = product_of(lift, node, args.get("mat1"), args.get("mat2"), False, added if plain_bias else node)
    if product is None:
        return None
    product = product.scaled(alpha)
    tensor, out = tensor_of(added), tensor_of(node)
    if tensor is None or out is None:
        return None
    if tensor.dim() == 2 and tuple(map(str, tensor.shape)) == tuple(map(str, out.shape)):
        base = lift.matrix(added)
        return MatrixValue(base.expr.scaled(beta) + product) if base is not None else None
    vector = lift.vector(added)
    if vector is None or vector.axis != -1 or str(tensor.numel()) != str(out.shape[-1]):
        return None
    return MatrixValue(product + Expr.broadcast(vector.poly).scaled(beta))


@transfer("outer")
def outer(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "vec2")
    column, row = lift.value(args.get("input")), lift.value(args.get("vec2"))
    if not isinstance(column, VectorValue) or not isinstance(row, VectorValue):
        return None
    return outer_product(column.poly, row.poly)


_LOOKED_UP = ("input", "indices", "weight")


@transfer("embedding")
def embedding(lift: Lifter, node: fx.Node) -> Value | None:
    """A look-up is the product of the indices' one-hot rows with the table. The rewritten graph reuses the look-up; this product is
    never computed."""
    operands = [*node.args[:2], *(node.kwargs[name] for name in _LOOKED_UP if name in node.kwargs)]
    if len(operands) != 2:
        return None
    first, second = operands
    table = tensor_of(first)
    # ``F.embedding(indices, table)``, but ``torch.embedding(table, indices)`` and aten's.
    indices, table_node = (second, first) if table is not None and table.dtype in FLOAT_DTYPES else (first, second)
    table = tensor_of(table_node)
    if not isinstance(indices, fx.Node) or table is None or table.dim() != 2 or table_node in lift.written:
        return None  # the table is written, for example by max_norm, which rescales its rows in place
    options = [*map(str, node.args[2:]), *sorted(f"{k}={v}" for k, v in node.kwargs.items() if k not in _LOOKED_UP)]
    weight = lift.operand(table_node, weight=True)
    if weight is None:
        return None
    rows = Expr.mat(lift.onehot(indices, tuple(options)))
    return MatrixValue(rows @ weight)


@transfer("tensordot")
def tensordot(lift: Lifter, node: fx.Node) -> Value | None:
    """A product over the last axis of the first operand and an axis of a matrix, or over the first axis of filters."""
    args = arguments(node, "a", "b", "dims")
    dims, left, right = args.get("dims", 2), tensor_of(args.get("a")), tensor_of(args.get("b"))
    if isinstance(dims, int) and not isinstance(dims, bool):
        dims = ([-1], [0]) if dims == 1 else ((), ())
    if not all(isinstance(d, (tuple, list)) for d in dims):
        return None
    if left is None or right is None or [len(d) for d in dims] != [1, 1] or left.dim() < 2:
        return None
    (first,), (second,) = dims
    if right.dim() > 2 and left.dim() == 2 and isinstance(first, int) and isinstance(second, int):
        factor = ("ar", "ra")[first % 2]
        return None if second % right.dim() else filters_by_letters(lift, (factor, "a*"), "r*", (args["a"], args["b"]))
    if right.dim() != 2:
        return None
    if not isinstance(first, int) or not isinstance(second, int) or first % left.dim() != left.dim() - 1:
        return None
    product = product_of(lift, node, args["a"], args["b"], second % 2 == 1)
    return MatrixValue(product) if product is not None else None


@transfer("multi_dot")
def multi_dot(lift: Lifter, node: fx.Node) -> Value | None:
    listed = len(node.args) == 1 and isinstance(node.args[0], (list, tuple))
    operands = [lift.operand(a) for a in (node.args[0] if listed else node.args)]  # type: ignore[union-attr]
    product = operands[0] if operands else None
    for operand in operands[1:]:
        if product is None or operand is None:
            return None
        product = product @ operand
    return MatrixValue(product) if product is not None else None


@transfer("eye")
def eye(lift: Lifter, node: fx.Node) -> Value | None:
    tensor = tensor_of(node)
    if tensor is None or tensor.dtype not in FLOAT_DTYPES or tensor.dim() != 2 or tensor.shape[0] != tensor.shape[1]:
        return None
    return MatrixValue(Expr.chain(()))


@transfer("diag")
def diag(lift: Lifter, node: fx.Node) -> Value | None:
    args = arguments(node, "input", "diagonal")
    tensor = tensor_of(args.get("input"))
    if tensor is not None and tensor.dim() == 2 and args.get("diagonal", 0) == 0:
        return diagonal_of_gram(lift, node, args.get("input"))
    vector = lift.value(args.get("input"))
    if tensor is None or tensor.dim() != 1 or not isinstance(vector, VectorValue) or args.get("diagonal", 0) != 0:
        return None
    if len(node.args) > 2 or node.kwargs.get("offset", 0) != 0 or not vector.poly.is_monomial:
        return None
    ((mono, c),) = vector.poly.items
    return MatrixValue(Expr.chain((Diag(mono),), c))
