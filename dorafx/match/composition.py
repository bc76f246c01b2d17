"""A term by its cores: ``y = Σ cᵢ(g) ⊙ coreᵢ + bias``, each core a chain that ends in an output dimension."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Diag, Expr, Lifter, Mat, PackedWeight, Poly, packed_weight
from dorafx.lift.algebra import ONES, Chain, Factor, count_matrices
from dorafx.log.kinds import ReasonKind

from .near_misses import Reason
from .norms import NormFactors


@dataclass(frozen=True)
class Composition:
    """A term by the products in it.

    Attributes:
        cores: of each product, ``x·Wᵀ`` or ``x·Aᵀ·Bᵀ``, the polynomial in vectors and scalars that it is scaled by on the output's side.
        bias: what is added and multiplies no activation.
    """

    cores: dict[Chain, Poly]
    bias: Poly


def group(expr: Expr) -> Composition:
    """Collect the terms of an expression by core."""
    cores: dict[Chain, Poly] = {}
    bias = Poly(())
    for (scalars, chain), c in expr.items:
        core, poly = chain, Poly(((scalars, c),))
        if chain and isinstance(chain[-1], Diag):
            core = chain[:-1]
            poly = poly * Poly(((chain[-1].mono, 1.0),))
        if core == (Mat(ONES),):
            bias = bias + poly
        else:
            cores[core] = cores.get(core, Poly(())) + poly
    return Composition(cores, bias)


@dataclass(frozen=True)
class Candidate:
    """A node whose term is scaled by the reciprocal of a DoRA norm: what a form's ``check`` looks at.

    Attributes:
        lift: the terms of the graph.
        node: the node.
        expr: its term.
        composition: the term by the products in it.
        norm: the norm that scales it; a node that several norms scale is a candidate for each.
    """

    lift: Lifter
    node: fx.Node
    expr: Expr
    composition: Composition
    norm: NormFactors


@dataclass(frozen=True)
class Part:
    """One summand ``scale · core`` inside the scaled bracket.

    Attributes:
        core: the product.
        scale: what it is multiplied by.
    """

    core: Chain
    scale: Poly


@dataclass(frozen=True)
class Match:
    """A recognised composition: ``y = constant + g ⊙ (base + Σ parts) [- base] + bias``.

    Attributes:
        pattern: the form's name.
        node: the last node that still is one.
        expr: its term.
        norm: the norm in ``g``.
        scaling: ``g`` as a polynomial, ``m · n⁻¹`` in the plain case.
        base: the product with the norm's weight.
        parts: the low-rank products.
        constant: in the delta form, what the base without dropout contributes, unscaled; else None.
        bias: what is added unscaled.
        first: where the composition was complete, if what follows up to ``node`` (a cast, a dropout that does nothing) only carries it
            on: the layer that it belongs to.
        transposed: whether the node holds the transpose of ``expr``: the weight multiplies from the left, and tokens are columns.
        channels_first: whether activations have their columns along the second axis, as those of a convolution do.
    """

    pattern: str
    node: fx.Node
    expr: Expr
    norm: NormFactors
    scaling: Poly
    base: Chain
    parts: tuple[Part, ...]
    constant: Expr | None = None
    bias: Poly = Poly(())
    first: fx.Node | None = None
    transposed: bool = False
    channels_first: bool = False

    @property
    def origin(self) -> fx.Node:
        """The node that the composition belongs to."""
        return self.first or self.node


def part_scale(candidate: Candidate, poly: Poly, scaling: Poly) -> Poly | None:
    """The ``q`` in ``poly = q · scaling``, if an adapter may be scaled by it: products of constants, scalars and vectors. Quotients
    do not count: a residual that is added with a constant is ``1/g`` times ``g``, and is no part of the layer.

    Args:
        candidate: the node.
        poly: what a product is scaled by.
        scaling: what the base product is scaled by, ``g``.

    Returns:
        q; None where there is none.
    """
    ratio = poly.ratio_to(scaling)
    if ratio is None or candidate.lift.norms_in(ratio):
        return None
    return ratio if all(exponent > 0 for mono, _ in ratio.items for _, exponent in mono) else None


def _is_formed(candidate: Candidate, factor: Factor, weight: Mat) -> bool:
    """Whether a factor is a computed dense value, no parameter, with the shape of the norm's quantised weight."""
    if not isinstance(factor, Mat) or factor.transposed == weight.transposed or factor.atom == ONES:
        return False
    node, weight_node = (candidate.lift.atom_of(atom).node for atom in (factor.atom, weight.atom))
    if node is None or weight_node is None or node.op not in ("call_function", "call_method"):
        return False
    value, weight_value = tensor_of(node), tensor_of(weight_node)
    if value is None or weight_value is None or not isinstance(packed_weight(weight_node), PackedWeight):
        return False
    return value.shape == weight_value.shape


def base_core(candidate: Candidate) -> Chain | None:
    """The core that multiplies the norm's own weight; for stacked adapters the core that is the previous adapter's output.

    Args:
        candidate: the node.

    Returns:
        The product; None where the term has none.
    """
    mat = candidate.norm.weight
    scaled = [
        core
        for core, poly in candidate.composition.cores.items()
        if candidate.norm.atom in candidate.lift.norms_in(poly)
    ]
    whole = candidate.lift.unrounded(mat)
    for core in scaled:
        last = core[-1] if core else None
        if count_matrices(core) < 2 or not isinstance(last, Mat):
            continue  # the weight alone, scaled on both sides, is no product with it
        # The product may have the weight in another dtype than the norm.
        last = candidate.lift.unrounded(last)
        if last.atom.id == whole.atom.id and last.transposed != whole.transposed:
            return core
    # A product with a weight that its library dequantises into a separate value (HQQ unpacks its codes in place).
    gemms = [
        core
        for core in scaled
        if len(core) == 2 and candidate.lift.gemms.get(Expr.chain(core)) and _is_formed(candidate, core[1], mat)
    ]
    if len(gemms) == 1:
        return gemms[0]
    # The norm's own weight does not count: scaled by column, it is a step towards a merged weight, and no layer's output.
    values = [core for core in scaled if len(core) == 1 and isinstance(core[0], Mat) and core[0].atom.id != mat.atom.id]
    return values[0] if len(values) == 1 else None


def no_base_product(candidate: Candidate) -> Reason:
    """What a form says of a node in which it finds no product with the norm's weight.

    Args:
        candidate: the node.
    """
    text = "the output scaled by this norm has no product with the norm's weight"
    return Reason(text, candidate.node, specific=False, kind=ReasonKind.NO_PRODUCT)


def no_low_rank_product(candidate: Candidate) -> Reason:
    """What a form says of a node in which nothing is added to the product with the norm's weight.

    Args:
        candidate: the node.
    """
    what = "the base product is scaled by the norm, but no low-rank product is added"
    return Reason(what, candidate.node, kind=ReasonKind.OTHER_PARTS)


def unequal_scaling(candidate: Candidate) -> Reason:
    """What a form says of a node whose products have scalings that do not go together.

    Args:
        candidate: the node.
    """
    what = "a part of the output is not scaled by the same vector as the base product"
    return Reason(what, candidate.node, kind=ReasonKind.UNEQUAL_SCALING)


def whole_match(name: str, candidate: Candidate, base: Chain, parts: list[Part]) -> Match | Reason:
    """The match of a form that emits all of a term, each product with a scaling of its own.

    Args:
        name: the form's.
        candidate: the node.
        base: the product with the norm's weight.
        parts: the low-rank products; none is a reason.
    """
    if not parts:
        return no_low_rank_product(candidate)
    return Match(
        name,
        candidate.node,
        candidate.expr,
        candidate.norm,
        candidate.composition.cores[base],
        base,
        tuple(parts),
        constant=candidate.expr,
        bias=candidate.composition.bias,
    )
