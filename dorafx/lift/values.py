"""What the lifter knows of a node: a term, and how the node's tensor is laid out as a matrix or vector."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

from .algebra import Expr, Poly

FLOAT_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Dtypes between which a cast only changes accuracy. A cast to anything else (fp8, int, complex) is opaque."""


def loses_accuracy(before: torch.dtype, after: torch.dtype) -> bool:
    """Whether a cast from one floating dtype to another rounds, because the second cannot hold all values of the first."""
    return torch.promote_types(before, after) != after


Layout = Literal["last", "filter", "channels", "inputs", "batch"]


@dataclass(frozen=True)
class MatrixValue:
    """A tensor as a matrix. Its ``layout`` says how it is flattened:

    - ``"last"``: ``[..., rows, cols]``; all axes before the last are rows.
    - ``"filter"``: ``[rows, ...]``; all axes after the first are columns: the weight of a convolution.
    - ``"channels"``: ``[batch, cols, ...]``; all axes but the second are rows: the input and output of a convolution. A weight in this
      layout is the transpose of filters, with the input channels first.
    - ``"inputs"``: the same flattened after the input channels, ``[channels, rows · positions]``; ``expr`` is the filters' matrix.
    - ``"batch"``: ``[batch, rows, cols]``; as many matrices as the first axis has entries, and so has every factor of ``expr``.
    """

    expr: Expr
    squared: bool = False
    """The elementwise square of ``expr``: the first half of ``sqrt(sum(w*w))``."""
    layout: Layout = "last"
    positions: int = 1
    """Of the layout ``"inputs"``: how many a kernel has."""


@dataclass(frozen=True)
class VectorValue:
    """A polynomial in vectors along one ``axis`` (negative, counted from the end); the axis of a scalar is None."""

    poly: Poly
    axis: int | None
    row: Expr | None = None
    """The same value as a matrix of one row, if it contains the product of a single token ``[d_in]``: ``x·Wᵀ·D(g)``. In ``poly`` that
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
    or columns (or ``span`` neighbouring columns). ``sumsq``: the same without the root. ``reciprocal``: ``1/poly``. ``clamp_min``:
    ``max(poly, eps)``. ``repeated``: ``poly`` with ``span`` copies of each entry, a vector along the input channels as one along the
    columns of filters.
    ``maximum``: the same, with half of the gradient where the two are equal. ``rounded``: ``poly`` in ``dtype``.
    ``onehot``: the matrix of one-hot rows for an embedding's indices, which is never formed. ``filter`` and ``channels``:
    ``node`` in the layout of that name. ``batch``: ``node`` as a batch of matrices or vectors, see :attr:`Lifter.batches`. ``unfold``: the patches that a convolution multiplies, which are never formed.
    ``selection``: consecutive columns of an identity, which put rows among zeros; never formed.
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
        "batch",
        "unfold",
        "selection",
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
    """For a norm or sum of squares: whether the program computes it in fp64."""
    rooted: bool = False
    """For a norm: whether the program computes it as the root of a sum of squares, whose gradient is NaN where the sum is zero."""
    dtype: torch.dtype | None = None
    """The dtype to which a ``rounded`` vector, or a node that rounds a matrix (see ``rounds``), is rounded."""
    rounds: Expr | None = None
    """For a node that casts a matrix to a dtype that cannot hold all of its values: that matrix."""
    sites: list[fx.Node] = field(default_factory=list, compare=False)
    """For a norm: the nodes that compute a multiple or a power of it and nothing else, in graph order."""
    norms: frozenset[int] = frozenset()
    """For a ``node`` that is a function of vectors with norms in them, of which the algebra has no term: the ids of the norms' atoms."""
    rows: tuple[int, int, int] = (0, 0, 0)
    """For a ``selection``: how many rows of zeros come before, how many rows it places, how many of zeros behind."""
    of: fx.Node | Expr | None = field(default=None, compare=False)
    """For ``onehot``: the indices; for ``unfold``: the activations. Used for printing a term only."""
    patches: Patches | None = field(default=None, compare=False)
    """For ``unfold``: how to make a product with it; None for a convolution in groups, which is no product with one matrix of patches."""


@dataclass(frozen=True)
class Gemm:
    """A matrix product that the graph already computes: ``node = lhs · rhs (+ bias)``, rhs transposed for linear.
    ``convolution``: for a convolution, the operator that computes it as ``convolution(lhs, rhs, bias, *options)``."""

    node: fx.Node
    lhs: Any
    rhs: Any
    rhs_transposed: bool
    bias: Any
    convolution: Callable[..., Any] | None = None
    options: tuple[Any, ...] = ()
    detached: bool = False
    """Whether it is computed while no gradients are recorded, from operands that require some."""


def holds_product(value: Value | None) -> bool:
    """Whether a value is a sum in which there is a product of two matrices."""
    return isinstance(value, MatrixValue) and value.expr.holds_product


def vector_axis(shape: torch.Size | tuple[Any, ...]) -> int | None:
    """The only axis of a size other than 1, as a negative index; None if there are several. For a shape of ones, the last axis."""
    long = [i for i, size in enumerate(shape) if not (isinstance(size, int) and size == 1)]
    if len(long) > 1:
        return None
    return long[0] - len(shape) if long else -1
