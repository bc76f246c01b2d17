"""What a form's ``rewrite`` is given beside the match: the plan of the composition, and the emitter as far as forms know it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import fx

from dorafx.lift import Expr, Mat, Poly
from dorafx.lift.algebra import Chain

from .composition import Match, Part


@dataclass(frozen=True)
class CompositionPlan:
    """How one composition is computed.

    Attributes:
        match: the composition.
        accumulate: whether low-rank products are added to the base product inside their matrix product, which leaves one
            ``[tokens, d_out]`` intermediate. In half precision that rounds the sum once more than the original does, so there the
            products stay apart and the epilogue adds them in fp32; so does a sum with a bias in it, which `Emit.biased_base` has.
        few_tokens: whether the output has so few tokens that the norm costs more than all the rest.
        kernel: what computes it: ``"auto"``, ``"triton"``, or ``"triton_linear"`` for the whole layer as one kernel.
    """

    match: Match
    accumulate: bool
    few_tokens: bool
    kernel: str = "auto"


class Emit(Protocol):
    """Makes the nodes that replace a match, each just before the node that is replaced, with a fake value as a tracer would have
    given it. What the graph computes already is reused. Tokens are the leading axes of activations, ``[.., d]``; vectors are ``[d]``,
    in fp32, or fp64 where the program has it.

    Where ``rewrite`` raises, the site is left as it was, and the log has the exception's text.
    """

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a function: ``emit.call(torch.add, a, b)``."""
        ...

    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node:
        """A call of a tensor's method: ``emit.method("reshape", a, -1)``."""
        ...

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The fake tensor of a node: its shape, dtype and device."""
        ...

    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The node in a dtype; itself where it has it."""
        ...

    def out_dtype(self) -> torch.dtype:
        """The dtype of what is replaced."""
        ...

    def vector(self, poly: Poly) -> fx.Node:
        """A polynomial in vectors, ``m · n⁻¹`` for one, as ``[d]`` or a scalar. The norm in it becomes the factored one."""
        ...

    def product(self, chain: Chain) -> fx.Node:
        """A product of matrices, ``x·Aᵀ·Bᵀ`` for one, in the dtype in which the graph multiplies its factors."""
        ...

    def expression(self, expr: Expr) -> fx.Node:
        """A sum of products, each with its scaling."""
        ...

    def scaled(self, node: fx.Node, scale: Poly) -> fx.Node:
        """A value times a polynomial, along its columns."""
        ...

    def base(self, core: Chain, bias: Poly, scaling: Poly) -> tuple[fx.Node, Poly]:
        """The base product ``x·Wᵀ`` without the bias that the graph may have added to it, and the bias that is still to be added
        after the scaling."""
        ...

    def biased_base(self, match: Match) -> fx.Node | None:
        """The base product ``x·Wᵀ + bias`` where the graph has it with the match's bias and no kernel may compose, as on a CPU: for
        [`compose`][dorafx.extension.Emit.compose] with ``biased=True``. Else None."""
        ...

    def low_rank_sum(self, parts: Iterable[Part]) -> tuple[fx.Node, float]:
        """``Σ scale · core`` over the parts as one node, and a constant that it is still to be multiplied by."""
        ...

    def accumulated(self, base: fx.Node, part: Part) -> fx.Node:
        """``base + scale · core`` in one matrix product that accumulates."""
        ...

    def scaled_sum(self, terms: Iterable[tuple[fx.Node, Poly]], bias: Poly) -> fx.Node:
        """``Σ scale ⊙ product + bias`` over pairs of a product ``[.., d]`` and its scale, added in fp32 or fp64, in the shape and dtype of
        what is replaced."""
        ...

    def multiplied(self, node: fx.Node, chain: Chain) -> fx.Node:
        """A value ``[.., d_in]`` times a product of matrices, ``Aᵀ·Bᵀ`` for one."""
        ...

    def product_of_scaled(self, head: Mat, scale: Poly, tail: Chain) -> fx.Node:
        """``(x ⊙ scale)·tail`` for an activation ``head``; of a convolution the input's channels are scaled."""
        ...

    def scaled_input(self, node: fx.Node, scale: Poly) -> fx.Node:
        """A value times a polynomial along its columns, multiplied in fp32 or fp64 and rounded once, to the value's dtype."""
        ...

    def compose(
        self,
        base: fx.Node,
        lora: fx.Node | None,
        g: fx.Node,
        bias: fx.Node | None,
        scale: float,
        kernel: str = "auto",
        biased: bool = False,
    ) -> fx.Node:
        """``g ⊙ (base + scale·lora) + bias`` in the shape and dtype of what is replaced; base and lora ``[.., d]``, g and bias ``[d]``.
        ``kernel`` is the plan's. ``biased``: the base has the bias in it, as [`biased_base`][dorafx.extension.Emit.biased_base] has."""
        ...

    def compose_delta(
        self, result: fx.Node, base: fx.Node, lora: fx.Node, g: fx.Node, scale: float, kernel: str = "auto"
    ) -> fx.Node:
        """``result + (g - 1) ⊙ base + g ⊙ scale·lora``, otherwise as [`compose`][dorafx.extension.Emit.compose]."""
        ...

    def linear_kernel(self, match: Match, g: fx.Node, bias: fx.Node | None) -> fx.Node | None:
        """The whole layer as one kernel, for a plan whose kernel is ``"triton_linear"``; None where an operand does not fit."""
        ...

    def shaped_like_site(self, node: fx.Node) -> fx.Node:
        """A value in the shape and dtype of what is replaced."""
        ...
