"""The operands of the norms of a batch of weights: batches of a weight and of two factors."""

from __future__ import annotations

import torch
from torch import fx

from dorafx._compat.distributed import placements
from dorafx.lift import Mat, Poly
from dorafx.lift.algebra import Chain
from dorafx.match import NormFactors, ReasonKind

from .emit import Emitter
from .nodes import CannotEmit


def batched_operands(emit: Emitter, norm: NormFactors) -> tuple[fx.Node, fx.Node, fx.Node, float]:
    """weight ``[batch, d_out, d_in]``, left ``[batch, d_out, r]``, right ``[batch, r, d_in]`` and the scale of the delta."""
    weight = _matrices(emit, norm.weight)
    lefts, rights = [], []
    scale = norm.delta[0].coefficient / norm.weight_coefficient
    for part in norm.delta:
        left = batched_product(emit, part.left)
        factor = Poly(((part.scalars, part.coefficient / norm.weight_coefficient),))
        if part.scalars or (len(norm.delta) > 1 and factor.constant != 1.0):
            left = emit.scaled(emit.precise(left), factor)
        lefts.append(left)
        rights.append(batched_product(emit, part.right))
    if len(norm.delta) > 1 or norm.delta[0].scalars:
        scale = 1.0
    left, right = _side_by_side(emit, lefts, 2), _side_by_side(emit, rights, 1)
    if any(placements(emit.tensor(operand)) is not None for operand in (weight, left, right)):
        raise CannotEmit(
            "the experts' weights or factors are sharded over devices, and norms of such batches are not known",
            ReasonKind.BATCHED_WEIGHTS,
        )
    return weight, left, right, scale


def batched_product(emit: Emitter, chain: Chain) -> fx.Node:
    """A product of batches of matrices; a factor that stands alone is read as it is."""
    if len(chain) == 1 and isinstance(chain[0], Mat):
        return _matrices(emit, chain[0])
    product: fx.Node | None = None
    rows: fx.Node | None = None
    for factor in chain:
        if isinstance(factor, Mat):
            matrices = emit.precise(_matrices(emit, factor))
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


def _matrices(emit: Emitter, mat: Mat) -> fx.Node:
    node = emit.atom(mat.atom)
    return emit.method("transpose", node, 1, 2) if mat.transposed else node


def _side_by_side(emit: Emitter, nodes: list[fx.Node], axis: int) -> fx.Node:
    if len(nodes) == 1:
        return nodes[0]
    dtype = emit.tensor(nodes[0]).dtype
    for node in nodes[1:]:
        dtype = torch.promote_types(dtype, emit.tensor(node).dtype)
    return emit.call(torch.cat, [emit.cast(node, dtype) for node in nodes], axis)
