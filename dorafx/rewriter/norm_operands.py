"""The operands of a norm: a weight and two factors, from the chains that the matcher found."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import fx

from dorafx.graphs.tensors import tensor_of
from dorafx.lift import AtomInfo, Mat, PackedWeight, Poly
from dorafx.lift.algebra import Chain, is_ones, transpose_chain
from dorafx.match import NormFactors

from .emit import Emitter
from .nodes import CannotEmit


def weight_operand(emit: Emitter, norm: NormFactors) -> tuple[fx.Node, tuple[int, ...]]:
    """The weight ``[d_out, d_in]``, or a batch of them, and in which order the axes of a filter make up its columns; empty for their own
    order.

    Filters in ``channels_last`` are a matrix as they lie in memory, and flattening them in the order of their axes would copy all
    of the weight. Norms do not depend on the order of columns, so that of the right factor is changed instead.
    """
    head = norm.weight
    if norm.batch is not None:
        return batched_product(emit, (head,)), ()
    if not head.transposed:
        info = emit.lift.atom_of(head.atom)
        order = _order_in_memory(emit.tensor(info.node)) if info.kind == "filter" and info.node is not None else ()
        if order and info.node is not None:
            filters = emit.operand(info.node, head.atom.detached)
            return emit.method("flatten", emit.method("permute", filters, (0, *order)), 1), order
    return _factor(emit, (norm.weight,)), ()


def in_order(emit: Emitter, right: fx.Node, norm: NormFactors, order: tuple[int, ...]) -> fx.Node:
    """The right factor ``[r, d_in]`` with its columns in the order that :func:`weight_operand` has them in."""
    if not order:
        return right
    filters = emit.lift.atom_of(norm.dense_atom).node
    assert filters is not None
    split = emit.method("unflatten", right, 1, tuple(emit.tensor(filters).shape[1:]))
    return emit.method("flatten", emit.method("permute", split, (0, *order)), 1)


def _order_in_memory(filters: torch.Tensor) -> tuple[int, ...]:
    """The axes of filters ``[d_out, …]`` but the first, outermost in memory first, where they lie there without gaps and in another
    order than their own; empty otherwise."""
    sizes, strides = tuple(filters.shape), tuple(filters.stride())
    if not all(isinstance(n, int) for n in (*sizes, *strides)):
        return ()
    axes = sorted(range(1, len(sizes)), key=lambda axis: (-strides[axis], axis))
    expected = 1
    for axis in reversed(axes):
        if sizes[axis] > 1 and strides[axis] != expected:
            return ()
        expected *= sizes[axis]
    wide = [axis for axis in axes if sizes[axis] > 1]
    return tuple(axes) if wide != sorted(wide) else ()


def in_its_dtype(emit: Emitter, info: AtomInfo) -> AbstractContextManager[None]:
    """Make the operands of a norm in the dtype that it is computed in, fp64 or fp32; in their own, for half of the memory, where all
    that the original computes of it is in half precision."""
    dtypes = [tensor.dtype for site in info.sites if (tensor := tensor_of(site)) is not None]
    if not info.double and all(torch.finfo(dtype).bits < 32 for dtype in dtypes):
        return nullcontext()
    return emit.precisely(torch.float64 if info.double else torch.float32)


def packed_operands(emit: Emitter, weight: PackedWeight) -> list[fx.Node | None]:
    """Codes, scales and zeros (or None) of a quantised weight."""
    operands: list[fx.Node | None] = []
    for source in weight.tensors:
        node = None if source is None else emit.operand(source[0])
        operands.append(emit.call(getattr, node, source[1]) if source is not None and source[1] else node)
    return operands


def factor_operands(emit: Emitter, norm: NormFactors) -> tuple[fx.Node, fx.Node, float]:
    """left ``[d_out, r]``, right ``[r, d_in]`` and the scale of the delta; of a batch of weights, batches of factors.

    What has to be multiplied first is multiplied in the dtype of the norm (see :func:`in_its_dtype`).
    """
    factor, rows = (_factor, 0) if norm.batch is None else (batched_product, 1)
    if len(norm.delta) == 1 and not norm.delta[0].scalars:
        (part,) = norm.delta
        left, right = factor(emit, part.left), factor(emit, part.right)
        return left, right, part.coefficient / norm.weight_coefficient
    lefts, rights = [], []
    for part in norm.delta:
        left = factor(emit, part.left)
        scale = Poly(((part.scalars, part.coefficient / norm.weight_coefficient),))
        lefts.append(left if scale.constant == 1.0 else emit.scaled(emit.precise(left), scale))
        rights.append(factor(emit, part.right))
    if len(lefts) == 1:
        return lefts[0], rights[0], 1.0
    left, right = (
        emit.call(torch.cat, _one_dtype(emit, factors), axis) for factors, axis in ((lefts, rows + 1), (rights, rows))
    )
    return left, right, 1.0


def product_dtype(emit: Emitter, norm: NormFactors, left: fx.Node, right: fx.Node) -> torch.dtype | None:
    """The dtype in which the program multiplies the factors of a norm, where it rounds them to one that is narrower than theirs, as
    under autocast; None otherwise. Rounding the factors to it costs no accuracy that the program has, and tensor cores multiply
    halves several times as fast."""
    factor_dtypes = [emit.tensor(factor).dtype for factor in (left, right)]
    if norm.info.double or any(dtype.itemsize < 4 for dtype in factor_dtypes):
        return None
    dtypes = set()
    for part in norm.delta:
        # Both sides of a column times a row include the matrix of ones between them.
        rest = part.right[1:] if is_ones(part.left[-1]) and is_ones(part.right[0]) else part.right
        dtypes |= emit.lift.product_dtypes(part.left + rest) or {torch.float32}
    (dtype, *others) = dtypes
    return dtype if not others and dtype in (torch.float16, torch.bfloat16) else None


def _factor(emit: Emitter, chain: Chain) -> fx.Node:
    """A factor of a norm. Read from the atoms themselves, before any cast: the norm is computed in fp32 anyway."""
    head = chain[0]
    if is_ones(head):
        return emit.method("t", emit.flat(emit.product(transpose_chain(chain))))
    if len(chain) == 1 and isinstance(head, Mat):
        node = emit.matrix(head.atom)
        return emit.method("t", node) if head.transposed else node
    return emit.flat(emit.product(chain))


def batched_product(emit: Emitter, chain: Chain) -> fx.Node:
    """A product of batches of matrices; a factor that stands alone is read as it is."""
    if len(chain) == 1 and isinstance(chain[0], Mat):
        return _batch_of(emit, chain[0])
    product: fx.Node | None = None
    rows: fx.Node | None = None
    for factor in chain:
        if isinstance(factor, Mat):
            matrices = emit.precise(_batch_of(emit, factor))
            if rows is not None:
                column = emit.cast(emit.method("unsqueeze", rows, 2), emit.tensor(matrices).dtype)
                matrices, rows = emit.call(torch.mul, matrices, column), None
            if product is not None:
                matrices = emit.cast(matrices, emit.tensor(product).dtype)
            product = matrices if product is None else emit.call(torch.bmm, product, matrices)
            continue
        vectors = emit.vector(Poly(((factor.mono, 1.0),)))
        if product is None:
            rows = vectors
        else:
            row = emit.cast(emit.method("unsqueeze", vectors, 1), emit.tensor(product).dtype)
            product = emit.call(torch.mul, product, row)
    if product is None:
        raise CannotEmit("a factor of the delta has no matrix in it")
    return product


def _batch_of(emit: Emitter, mat: Mat) -> fx.Node:
    node = emit.atom(mat.atom)
    return emit.method("transpose", node, 1, 2) if mat.transposed else node


def _one_dtype(emit: Emitter, nodes: list[fx.Node]) -> list[fx.Node]:
    dtypes = {emit.tensor(n).dtype for n in nodes}
    if len(dtypes) == 1:
        return nodes
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return [emit.cast(n, wide) for n in nodes]
