"""Linear DoRA with the norm of columns: ``y = (x ⊙ c)·Wᵀ + s·((x ⊙ c)·Aᵀ)·Bᵀ + bias`` with ``c = m / ‖W + s·B·A‖`` by column.

The scaling lies on the input's side, where the linear form has it on the output's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import fx, nn

from dorafx.lift import Diag, Expr, Mat, Poly
from dorafx.lift.algebra import Chain, Factor
from dorafx.match import (
    Candidate,
    Composition,
    CompositionPlan,
    Emit,
    Match,
    Part,
    Reason,
    ReasonKind,
    group,
    no_base_product,
    pattern,
    whole_match,
)


@pattern(name="linear_columns")
class LinearColumns:
    """A merged weight whose columns are normalised. Where the program itself scales the input, nothing is left to do but the
    norm."""

    name: str = "linear_columns"

    @staticmethod
    def statement(
        x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor, s: float
    ) -> torch.Tensor:
        """The form as plain PyTorch. Shapes: x ``[.., d_in]``, W ``[d_out, d_in]``, A ``[r, d_in]``, B ``[d_out, r]``,
        m ``[d_in]``."""
        adapted = W + s * (B @ A)
        return F.linear(x, m * adapted / torch.linalg.norm(adapted, dim=0))

    @staticmethod
    def example() -> dict[str, torch.Tensor]:
        """Arguments of ``statement``, parameters among them as such."""
        return {
            "x": torch.empty(3, 5),
            "W": nn.Parameter(torch.empty(4, 5)),
            "A": nn.Parameter(torch.empty(2, 5)),
            "B": nn.Parameter(torch.empty(4, 2)),
            "m": nn.Parameter(torch.empty(5)),
            "s": torch.empty(()),
        }

    def check(self, candidate: Candidate) -> Match | Reason:
        lift = candidate.lift
        weight = lift.unrounded(Mat(candidate.norm.dense_atom)).atom.id
        cores = candidate.composition.cores
        base = next(
            (
                core
                for core in cores
                if len(core) > 2
                and isinstance(core[1], Diag)
                and isinstance(core[-1], Mat)
                and lift.unrounded(core[-1]).atom.id == weight
                and candidate.norm.atom in lift.norms_in(Poly(((core[1].mono, 1.0),)))
            ),
            None,
        )
        if base is None:
            return no_base_product(candidate)
        if lift.gemms.get(Expr.chain(base)):
            return Reason(
                "the program scales the input and multiplies it by the weight itself: nothing else to do",
                candidate.node,
                kind=ReasonKind.NOTHING_ELSE,
            )
        what = "a part of the output has an input that is not scaled as the weight's is"
        unequal = Reason(what, candidate.node, kind=ReasonKind.UNEQUAL_SCALING)
        products = _products(candidate.composition)
        if products is None:
            return unequal
        parts = []
        for product in products:
            computed = bool(lift.gemms.get(Expr.chain(product.core)))
            if product.tail == base[2:] or (product.core[-1] == base[-1] and computed):
                continue  # the product with the weight, and the base product of the input itself
            if product.core[0] != base[0] or computed:
                return unequal
            parts.append(Part(product.core, product.output))
        return whole_match(self.name, candidate, base, parts)

    def rewrite(self, match: Match, plan: CompositionPlan, emit: Emit) -> fx.Node:
        products = _products(group(match.expr))
        assert products is not None
        bias = match.bias
        terms = []
        for product in products:
            head = product.core[0]
            if product.input.constant is None and isinstance(head, Mat):
                terms.append((emit.product_of_scaled(head, product.input, product.tail), product.output))
            else:
                node, bias = emit.base(product.core, bias, product.output)
                terms.append((node, product.output))
        return emit.scaled_sum(terms, bias)


class _Product(NamedTuple):
    """``output ⊙ ((x ⊙ input) · tail)``: what cores that differ in the scaling of the input make together."""

    core: Chain
    """``x · tail``, with the scaling of the first of them."""
    tail: Chain
    input: Poly
    output: Poly


def _products(composition: Composition) -> list[_Product] | None:
    """A composition by its products, ``t·(x ⊙ c)·Wᵀ + (1 - t)·x·Wᵀ`` as one; None where the scalings do not come apart into one of the
    input and one of the output."""
    products: dict[tuple[Factor, Chain], _Product] = {}
    for core, output in composition.cores.items():
        if len(core) < 2 or not isinstance(core[0], Mat):
            return None
        head, second = core[:2]
        mono = second.mono if isinstance(second, Diag) else ()
        tail = core[2:] if mono else core[1:]
        same = products.get((head, tail))
        ratio = output.ratio_to(same.output) if same is not None else Poly.const(1.0)
        if ratio is None or ratio.constant is None:
            return None
        summand = Poly(((mono, ratio.constant),))
        if same is None:
            products[head, tail] = _Product(core, tail, summand, output)
        else:
            products[head, tail] = same._replace(input=same.input + summand)
    return list(products.values())
