"""The operands of a norm: a weight and two factors, from the chains that the matcher found."""

from __future__ import annotations

import torch
from torch import fx

from dorafx.lift import Mat, PackedWeight, Poly
from dorafx.lift.algebra import ONES, Chain, transpose_chain
from dorafx.match import NormFactors

from .emit import Emitter

__all__ = ["factor_operands", "packed_operands", "weight_operand"]


def weight_operand(emit: Emitter, norm: NormFactors) -> fx.Node:
    """The weight, ``[d_out, d_in]``."""
    return _factor(emit, norm.weight)


def packed_operands(emit: Emitter, weight: PackedWeight) -> list[fx.Node | None]:
    """Codes, scales and zeros (or None) of a quantised weight."""
    found: list[fx.Node | None] = []
    for source in weight.tensors:
        node = None if source is None else emit.operand(source[0])
        found.append(emit.call(getattr, node, source[1]) if source is not None and source[1] else node)
    return found


def factor_operands(emit: Emitter, norm: NormFactors) -> tuple[fx.Node, fx.Node, float]:
    """left ``[d_out, r]``, right ``[r, d_in]`` and the scale of the delta."""
    if len(norm.delta) == 1 and not norm.delta[0].scalars:
        (part,) = norm.delta
        left, right = _factor(emit, part.left), _factor(emit, part.right)
        return left, right, part.coefficient / norm.weight_coefficient
    lefts, rights = [], []
    for part in norm.delta:
        left = _factor(emit, part.left)
        scale = Poly(((part.scalars, part.coefficient / norm.weight_coefficient),))
        lefts.append(left if scale.constant == 1.0 else emit.scaled(left, scale))
        rights.append(_factor(emit, part.right))
    if len(lefts) == 1:
        return lefts[0], rights[0], 1.0
    return emit.call(torch.cat, _one_dtype(emit, lefts), 1), emit.call(torch.cat, _one_dtype(emit, rights), 0), 1.0


def _factor(emit: Emitter, chain: Chain) -> fx.Node:
    """A factor of a norm. Read from the atoms themselves, before any cast: the norm is computed in fp32 anyway."""
    head = chain[0]
    if isinstance(head, Mat) and head.atom == ONES:
        return emit.method("t", emit.flat(emit.product(transpose_chain(chain))))
    if len(chain) == 1 and isinstance(head, Mat):
        node = emit.matrix(head.atom)
        return emit.method("t", node) if head.transposed else node
    return emit.flat(emit.product(chain))


def _one_dtype(emit: Emitter, nodes: list[fx.Node]) -> list[fx.Node]:
    dtypes = {emit.tensor(n).dtype for n in nodes}
    if len(dtypes) == 1:
        return nodes
    wide = torch.float64 if torch.float64 in dtypes else torch.float32
    return [emit.cast(n, wide) for n in nodes]
