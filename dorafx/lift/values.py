"""What the lifter knows of one node: a term with the layout that the node's tensor gives it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from .algebra import Expr, Poly

__all__ = [
    "FLOAT_DTYPES",
    "AtomInfo",
    "Gemm",
    "MatrixValue",
    "Patches",
    "Value",
    "VectorValue",
    "loses_accuracy",
    "vector_axis",
]

FLOAT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Dtypes between which a cast only changes accuracy. A cast to anything else (fp8, int, complex) is opaque."""


def loses_accuracy(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether a cast from one floating dtype to another rounds: not every value of the first is one of the second."""
    return torch.promote_types(before, after) != after


Layout = Literal["last", "filter", "channels", "inputs"]


@dataclass(frozen=True)
class MatrixValue:
    """A tensor as a matrix. How it is flattened to one is its ``layout``:

    - ``"last"``: ``[..., rows, cols]``, everything before the last axis is rows.
    - ``"filter"``: ``[rows, ...]``, everything behind the first axis is columns: the weight of a convolution.
    - ``"channels"``: ``[batch, cols, ...]``, everything but the second axis is rows: what a convolution takes and gives. Of a weight it
      is the transpose of filters, with the input channels first.
    - ``"inputs"``: that flattened behind the input channels, ``[channels, rows · positions]``; ``expr`` is the filters' matrix.
    """

    expr: Expr
    squared: bool = False
    """The elementwise square of ``expr``: the first half of ``sqrt(sum(w*w))``."""
    layout: Layout = "last"
    positions: int = 1
    """Of the layout ``"inputs"``: how many a kernel has."""


@dataclass(frozen=True)
class VectorValue:
    """A polynomial in vectors that lies along one ``axis`` (negative, counted from the end); None for a scalar."""

    poly: Poly
    axis: int | None
    row: Expr | None = None
    """The same as a matrix of one row, where the product of a single token ``[d_in]`` is in it: ``x·Wᵀ·D(g)``. To ``poly`` that
    product is one indeterminate."""


Value = MatrixValue | VectorValue


@dataclass(frozen=True)
class Patches:
    """How a convolution selects the patches that it multiplies.

    Attributes:
        node: the activations ``[batch, channels, ...]``.
        kernel: the size of a patch by spatial axis.
        options: stride, padding and dilation, as the convolution takes them.
    """

    node: fx.Node
    kernel: tuple[int, ...]
    options: tuple[Any, ...]


@dataclass(frozen=True)
class AtomInfo:
    """What an indeterminate stands for.

    ``node``: the value of a graph node. ``norm``: ``sqrt(eps + Σ expr²)`` along rows (``side="row"``, one entry a row)
    or columns (or ``span`` neighbouring columns). ``sumsq``: the same before the root. ``reciprocal``: ``1/poly``. ``clamp_min``: ``max(poly, eps)``.
    ``repeated``: each entry of ``poly`` ``span`` times, a vector along the input channels as one along the columns of filters.
    ``maximum``: the same, with half of the gradient where the two are equal. ``rounded``: ``poly`` in ``dtype``.
    ``onehot``: the matrix with a one a row that an embedding's indices stand for; it is never formed. ``filter`` and
    ``channels``: ``node`` in the layout of that name. ``unfold``: the patches that a convolution multiplies; never formed.
    """

    kind: Literal[
        "ones",
        "node",
        "norm",
        "sumsq",
        "reciprocal",
        "clamp_min",
        "maximum",
        "rounded",
        "repeated",
        "onehot",
        "filter",
        "channels",
        "unfold",
    ]
    requires_grad: bool = True
    parameter: bool = False
    """Known to depend on parameters and buffers only."""
    node: fx.Node | None = None
    expr: Expr | None = None
    side: Literal["row", "col"] = "row"
    eps: float = 0.0
    span: int = 1
    """For a norm or sum of squares by column: of how many neighbouring columns each entry is, those of one input channel of filters. For
    ``repeated``: how often each entry is there."""
    poly: Poly | None = None
    double: bool = False
    """For a norm or sum of squares: whether it is one of fp64, whatever it is made of."""
    rooted: bool = False
    """For a norm: whether it is the root of a sum of squares, whose gradient is NaN where the sum is zero."""
    dtype: torch.dtype | None = None
    """What a ``rounded`` vector, or a node that rounds a matrix (see ``rounds``), is rounded to."""
    rounds: Expr | None = None
    """Of a node that casts a matrix to a dtype which cannot hold all of its values: the matrix."""
    sites: list[fx.Node] = field(default_factory=list, compare=False)
    """For a norm: the nodes that compute a multiple or a power of it and nothing else, in graph order."""
    of: fx.Node | Expr | None = field(default=None, compare=False)
    """For ``onehot``: the indices; for ``unfold``: the activations. For those who read a term only."""
    patches: Patches | None = field(default=None, compare=False)
    """For ``unfold``: how to make a product with it; None of a convolution in groups, which is no product of one matrix of patches."""


@dataclass(frozen=True)
class Gemm:
    """A matrix product that the graph already computes: ``node = lhs · rhs (+ bias)``, rhs transposed for linear.
    ``convolution``: the operator that computes it as ``convolution(lhs, rhs, bias, *options)``, where it is one."""

    node: fx.Node
    lhs: Any
    rhs: Any
    rhs_transposed: bool
    bias: Any
    convolution: Callable[..., Any] | None = None
    options: tuple[Any, ...] = ()
    detached: bool = False
    """Whether it is computed where no gradients are recorded, of operands that have some."""


def vector_axis(shape: torch.Size | tuple[Any, ...]) -> int | None:
    """The only axis along which a tensor of this shape extends, as a negative index; None where there are several.
    A shape of ones has its data on the last axis."""
    long = [i for i, size in enumerate(shape) if not (isinstance(size, int) and size == 1)]
    if len(long) > 1:
        return None
    return long[0] - len(shape) if long else -1
