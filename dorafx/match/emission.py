"""What a form's ``rewrite`` is given: the emitter, as far as forms know it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import fx

from dorafx.lift import Expr, Poly
from dorafx.lift.algebra import Chain

from .composition import Match, Part

__all__ = ["Emit"]


class Emit(Protocol):
    """Makes the nodes that replace a match, each just before the node that is replaced, with a fake value as a tracer would have
    given it. What the graph computes already is reused. Tokens are the leading axes of activations, ``[.., d]``; vectors are ``[d]``,
    in fp32, or fp64 where the program has it.

    A form that cannot be emitted after all raises; the site is then left as it was, with the exception's text in the log.

    Attributes:
        accumulate: whether the plan wants low-rank products accumulated into the base product.
        channels: to be set by a form whose activations have their columns along the second axis, as a convolution's.
    """

    accumulate: bool
    channels: bool

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

    def scaled_input(self, node: fx.Node, scale: Poly) -> fx.Node:
        """A value times a polynomial along its columns, multiplied in fp32 or fp64 and rounded once, to the value's dtype."""
        ...

    def compose(self, base: fx.Node, lora: fx.Node | None, g: fx.Node, bias: fx.Node | None, scale: float) -> fx.Node:
        """``g ⊙ (base + scale·lora) + bias`` in the shape and dtype of what is replaced; base and lora ``[.., d]``, g and bias ``[d]``."""
        ...

    def compose_delta(self, result: fx.Node, base: fx.Node, lora: fx.Node, g: fx.Node, scale: float) -> fx.Node:
        """``result + (g - 1) ⊙ base + g ⊙ scale·lora``, otherwise as :meth:`compose`."""
        ...

    def linear_kernel(self, match: Match, g: fx.Node, bias: fx.Node | None) -> fx.Node | None:
        """The whole layer as one kernel; None where the plan does not say so, or an operand does not fit."""
        ...

    def shaped_like_site(self, node: fx.Node) -> fx.Node:
        """A value in the shape and dtype of what is replaced."""
        ...
