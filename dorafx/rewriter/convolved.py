"""Products whose first factor is a convolution's input: convolutions of it, and 1x1 convolutions with the factors behind the first."""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import fx

from dorafx.graphs.operators import canonical_name
from dorafx.graphs.shapes import sizes_of
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Atom, Diag, Lifter, Mat, MatrixValue, Poly
from dorafx.lift.algebra import Chain, Mono, is_ones
from dorafx.lift.quantized import is_torchao
from dorafx.match import ReasonKind

from .nodes import CannotEmit

__all__ = ["convolved"]

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
    def product(self, chain: Chain) -> fx.Node: ...


def convolved(emit: _Emit, chain: Chain) -> fx.Node:
    """``U(x)·Aᵀ·Bᵀ·D(v)`` as the convolution of x with A in the shape of filters, one with B that has a kernel of one, and a scaling of
    channels. Patches are never formed."""
    head, last, prefix = chain[0], chain[-1], chain[:-1]
    assert isinstance(head, Mat)
    info = emit.lift.atom_of(head.atom)
    if not prefix:
        if info.kind != "channels" or info.node is None or head.transposed:
            raise CannotEmit("the patches of a convolution stand alone in the product")
        return _activations(emit, info.node, head.atom.detached)
    if head.transposed or any(map(is_ones, chain)):
        raise CannotEmit(
            "a factor of the product is one row or column repeated, or the convolution's input is not the first"
        )
    patches = info.patches
    if info.kind == "unfold" and patches is None:
        raise CannotEmit(
            "the convolution has groups, each of which multiplies other channels: its products are used where the program has them, and none is made"
        )
    first = chain[1]
    if patches is not None and (len(chain) == 2 or (len(chain) == 3 and isinstance(first, Diag))):
        if isinstance(last, Diag):
            raise CannotEmit("the patches of a convolution are scaled, and multiplied by nothing")
        left = _activations(emit, patches.node, head.atom.detached)
        if isinstance(first, Diag):
            left = _scaled(emit, left, _of_channels(emit.lift, first.mono, math.prod(patches.kernel)))
        return _multiplied(emit, left, last, patches.kernel, patches.options)
    left = emit.product(prefix)
    if isinstance(last, Diag):
        return _scaled(emit, left, last.mono)
    return _multiplied(emit, left, last, (1,) * (emit.tensor(left).dim() - 2), ())


def _of_channels(lift: Lifter, mono: Mono, positions: int) -> Mono:
    """A scaling of the columns of filters as one of input channels, which all positions of a kernel share."""
    found = []
    for atom, exponent in mono:
        info = lift.atom_of(atom)
        if info.kind == "repeated" and info.span == positions and info.poly is not None:
            (inner,) = info.poly.atoms()
            found.append((inner._replace(detached=atom.detached), exponent))
        elif positions == 1 or lift.is_scalar(atom):
            found.append((atom, exponent))
        else:
            raise CannotEmit(
                "each position of a kernel is scaled by itself, which no scaling of the input's channels does"
            )
    return tuple(found)


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
    node, own = info.node, tensor_of(info.node)
    if node is not None and own is not None and _is_input(node) and not is_torchao(own):
        # By the strides of filters a convolution chooses those of its result. Of what an operator made, tracers do not always know the
        # strides of axes of one element; reshaped from a matrix they are those that everybody expects.
        is_alike = sizes_of(own.shape[1:]) == sizes_of((channels, *kernel))
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
    return node.op in ("placeholder", "get_attr")
