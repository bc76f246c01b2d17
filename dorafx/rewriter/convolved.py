"""Products whose first factor is a convolution's input: convolutions of it, and 1x1 convolutions with the factors behind the first."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import fx

from dorafx.graphs.inputs import is_leaf
from dorafx.graphs.operators import canonical_name
from dorafx.graphs.shapes import sizes_of
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Atom, AtomInfo, Diag, Lifter, Mat, MatrixValue, Poly
from dorafx.lift.algebra import Chain, Mono, is_ones
from dorafx.lift.quantized import is_torchao
from dorafx.match import ReasonKind

from .nodes import CannotEmit

_CALLS: dict[int, Any] = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}


class _Emit(Protocol):
    """What is needed of an emitter."""

    lift: Lifter
    order: dict[fx.Node, int]
    site: fx.Node | None

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node: ...
    def method(self, name: str, *args: Any, **kwargs: Any) -> fx.Node: ...
    def tensor(self, node: fx.Node) -> torch.Tensor: ...
    def cast(self, node: fx.Node, dtype: torch.dtype) -> fx.Node: ...
    def operand(self, node: fx.Node, detached: bool = False) -> fx.Node: ...
    def matrix(self, atom: Atom) -> fx.Node: ...
    def vector(self, poly: Poly) -> fx.Node: ...
    def precise(self, factor: fx.Node) -> fx.Node: ...
    def scaled_input(self, node: fx.Node, scale: Poly) -> fx.Node: ...
    def product(self, chain: Chain) -> fx.Node: ...


def convolved(emit: _Emit, chain: Chain, scale: Poly | None = None) -> fx.Node:
    """``U(x)·Aᵀ·Bᵀ·D(v)`` as the convolution of x with A in the shape of filters, one with B that has a kernel of one, and a scaling of
    channels. Patches are never formed.

    Args:
        emit: makes the nodes.
        chain: the product.
        scale: what the columns of the patches are scaled by besides, all positions of a kernel by the same.
    """
    head, tail = chain[0], chain[1:]
    assert isinstance(head, Mat)
    info = emit.lift.atom_of(head.atom)
    if head.transposed or any(map(is_ones, tail)):
        raise CannotEmit(
            "a factor of the product is a repeated row or column, or the convolution's input is not the first"
        )
    kernel, options, node = _patches(info)
    last, prefix = chain[-1], chain[:-1]
    begins_with_scaling = bool(tail) and isinstance(tail[0], Diag)
    if kernel and len(tail) <= 1 + begins_with_scaling:
        if not isinstance(last, Mat) or not tail:
            raise CannotEmit("the patches of a convolution are multiplied with nothing")
        if isinstance(tail[0], Diag):
            scale = Poly(((tail[0].mono, 1.0),)) * (scale or Poly.const(1.0))
        left = _scaled_input(emit, _activations(emit, node, head.atom.detached), scale, math.prod(kernel))
        return _multiplied(emit, left, last, kernel, options)
    if not prefix:
        return _scaled_input(emit, _activations(emit, node, head.atom.detached), scale, 1)
    left = emit.product(prefix) if scale is None else convolved(emit, prefix, scale)
    if isinstance(last, Diag):
        return _scaled(emit, left, last.mono)
    return _multiplied(emit, left, last, (1,) * (emit.tensor(left).dim() - 2), ())


def _scaled_input(emit: _Emit, x: fx.Node, scale: Poly | None, positions: int) -> fx.Node:
    return x if scale is None else emit.scaled_input(x, _of_channels(emit.lift, scale, positions))


def _patches(info: AtomInfo) -> tuple[tuple[int, ...], tuple[Any, ...], fx.Node]:
    """Kernel and options of a convolution, and what it takes. Activations themselves have none: a kernel of one, and no options."""
    if info.kind == "channels" and info.node is not None:
        return (), (), info.node
    if info.patches is None:
        raise CannotEmit(
            "the convolution has groups, each of which multiplies other channels: its products are used where the program has them, "
            "and none is added"
        )
    return info.patches.kernel, info.patches.options, info.patches.node


def _of_channels(lift: Lifter, scale: Poly, positions: int) -> Poly:
    """A scaling of the columns of filters as one of input channels, which all positions of a kernel share."""
    total = Poly(())
    for mono, c in scale.items:
        total = total + Poly(((tuple(_of_channel(lift, atom, positions, e) for atom, e in mono), c),))
    return total


def _of_channel(lift: Lifter, atom: Atom, positions: int, exponent: int) -> tuple[Atom, int]:
    info = lift.atom_of(atom)
    if info.kind == "repeated" and info.span == positions and info.poly is not None:
        (inner,) = info.poly.atoms()
        return inner._replace(detached=atom.detached), exponent
    if positions == 1 or lift.is_scalar(atom):
        return atom, exponent
    raise CannotEmit("each position of a kernel is scaled by itself, which no scaling of the input's channels does")


def _activations(emit: _Emit, node: fx.Node, detached: bool) -> fx.Node:
    """What a convolution is given. A program may have it in several dtypes: in the site's, or else in the last that it was cast to."""
    site = emit.site
    assert site is not None
    value, dtype = emit.lift.values.get(node), emit.tensor(site).dtype
    best = node
    if isinstance(value, MatrixValue) and node not in emit.lift.written:
        alike = [other for other in emit.lift.nodes.get(value.expr, ()) if _is_cast_of(emit, other, node, value)]
        alike = [other for other in alike if emit.order[other] < emit.order[site]]
        in_dtype = [other for other in (node, *alike) if emit.tensor(other).dtype == dtype]
        best = (in_dtype or alike or [node])[-1]
    return emit.precise(emit.operand(best, detached))


def _is_cast_of(emit: _Emit, other: fx.Node, node: fx.Node, value: MatrixValue) -> bool:
    """Whether a node holds the value of another in its shape: equal terms may be reshaped."""
    one, two = tensor_of(other), tensor_of(node)
    if other in emit.lift.written or emit.lift.values.get(other) != value or one is None or two is None:
        return False
    return sizes_of(one.shape) == sizes_of(two.shape)


def _scaled(emit: _Emit, node: fx.Node, mono: Mono) -> fx.Node:
    """A scaling of channels."""
    vector = emit.cast(emit.vector(Poly(((mono, 1.0),))), emit.tensor(node).dtype)
    return emit.call(torch.mul, node, emit.method("reshape", vector, (-1,) + (1,) * (emit.tensor(node).dim() - 2)))


def _multiplied(emit: _Emit, left: fx.Node, factor: Mat, kernel: tuple[int, ...], options: tuple[Any, ...]) -> fx.Node:
    filters = emit.cast(_filters(emit, factor, emit.tensor(left).shape[1], kernel), emit.tensor(left).dtype)
    return emit.call(_CALLS[emit.tensor(left).dim()], left, filters, None, *options)


def _filters(emit: _Emit, factor: Mat, channels: Any, kernel: tuple[int, ...]) -> fx.Node:
    """A factor ``[channels · kernel, n]`` as filters ``[n, channels, *kernel]``; as they are where the program has them so."""
    info = emit.lift.atom_of(factor.atom)
    node, filters = info.node, tensor_of(info.node)
    if node is not None and filters is not None and _is_input(node) and not is_torchao(filters):
        # By the strides of filters a convolution chooses those of its result. Of what an operator made, tracers do not always know the
        # strides of axes of one element; reshaped from a matrix they are those that everybody expects.
        is_alike = sizes_of(filters.shape[1:]) == sizes_of((channels, *kernel))
        if is_alike and info.kind == "filter" and factor.transposed:
            return emit.precise(emit.operand(node, factor.atom.detached))
    matrix = emit.precise(emit.matrix(factor.atom))
    matrix = matrix if factor.transposed else emit.method("t", matrix)
    columns = emit.tensor(matrix).shape[1]
    if not isinstance(channels, int) or not isinstance(columns, int) or channels * math.prod(kernel) != columns:
        raise CannotEmit(
            f"a factor with {columns} columns is multiplied with patches of {channels} channels and the kernel {list(kernel)}",
            ReasonKind.SYMBOLIC_SHAPE,
        )
    return emit.method("reshape", matrix, (-1, channels, *kernel))


def _is_input(node: fx.Node) -> bool:
    """Whether a node is an input of the graph, or one that was cast or detached."""
    while canonical_name(node) in ("cast", "detach", "data") and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return is_leaf(node)
