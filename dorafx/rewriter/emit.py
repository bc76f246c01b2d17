"""Compositions as nodes of a new graph: base products, low-rank sums, and the operator that scales and adds them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from dorafx._compat.distributed import placements
from dorafx.graphs.inputs import is_leaf
from dorafx.graphs.shapes import sizes_of
from dorafx.graphs.tensors import tensor_of
from dorafx.graphs.uses import dies
from dorafx.lift import Diag, Expr, Gemm, Mat, Poly
from dorafx.lift.algebra import Chain, is_ones
from dorafx.lift.quantized import is_torchao
from dorafx.match import Match, Part, ReasonKind
from dorafx.ops import sharding
from dorafx.plan.bias import biased_base
from dorafx.plan.kernel import linear_operands

from .nodes import CannotEmit
from .terms import TermEmitter

_ONE_COLUMN = "a low-rank product has one column, and no vector makes it wide"


class Emitter(TermEmitter):
    """Emits replacements into a copy of the lifted graph; the arguments are :class:`TermEmitter`'s."""

    def base(self, core: Chain, bias: Poly, scaling: Poly) -> tuple[fx.Node, Poly]:
        """The base product and the bias that remains to be added after the scaling.

        A base product that the graph only has with its bias is made again without it where the biased one then dies;
        where somebody else reads the biased one, or an operand was written meanwhile, it is reused and ``g ⊙ b`` is subtracted from the bias.
        """
        assert self.site is not None
        existing = self._existing(Expr.chain(core))
        gemms = [g for g in self.lift.gemms.get(Expr.chain(core), ()) if self.order[g.node] < self.order[self.site]]
        for gemm in gemms:
            if gemm.bias is None:
                return _base_product(self, core, gemm), bias
        for gemm in gemms:
            vector = self.lift.vector(gemm.bias)
            if vector is None:
                continue
            inside = self.lift.detached(vector.poly) if gemm.node in self.lift.unrecorded else vector.poly
            unreadable = not self.lift.written.isdisjoint((gemm.lhs, gemm.rhs))
            if unreadable or not dies(gemm.node, self.site, self.order):
                return self.copied[gemm.node], bias + (inside * scaling).scaled(-1.0)
            if bias == inside * scaling:
                return self.copied[gemm.node], Poly(())
        if existing is not None and not gemms:
            return existing, bias
        if gemms:
            return self._again(gemms[0]), bias
        return self.product(core), bias

    def biased_base(self, match: Match) -> fx.Node | None:
        base = biased_base(self.lift, match, self.order)
        if base is None:
            return None
        if base.trained is None:
            return self.copied[base.node]
        operands = fx.map_arg((base.node.args, base.node.kwargs), lambda n: self.operand(n, n is base.trained))
        make = self.call if base.node.op == "call_function" else self.method
        return make(base.node.target, *operands[0], **operands[1])  # type: ignore[arg-type]

    def accumulated(self, base: fx.Node, part: Part) -> fx.Node:
        """``base + scale · prefix · last`` in one product that accumulates (beta = 1)."""
        last = part.core[-1]
        alpha = part.scale.constant
        plain = len(part.core) > 1 and isinstance(last, Mat) and not any(map(is_ones, part.core[-2:]))
        plain = plain and not self._is_selection(last)
        if alpha is None or not plain:
            node = self.product(part.core)
            return self._added(base, self.scaled(node, part.scale) if part.scale.constant != 1.0 else node)
        assert isinstance(last, Mat)
        left = self.product(part.core[:-1])
        dtype = self.tensor(base).dtype
        right = self.cast(self.matrix(last.atom), dtype)
        right = self.method("t", right) if last.transposed else right
        flat_base, flat_left = self.flat(base), self.cast(self.flat(left), dtype)
        if alpha != 1.0 and dtype in (torch.float32, torch.float64):
            # The gradients of a product with a factor are multiplied by it one by one, that of the last matrix in another layout; the
            # gradient of this is one product ``[tokens, r]``. In half precision it would be rounded.
            flat_left, alpha = self.call(torch.mul, flat_left, alpha), 1.0
        out = self.call(torch.addmm, flat_base, flat_left, right, alpha=alpha)
        return out if flat_base is base else self.method("reshape_as", out, base)

    def low_rank_sum(self, parts: Iterable[Part]) -> tuple[fx.Node, float]:
        """``Σ scale · core`` as one node and a constant factor that is left to the composition."""
        parts = tuple(parts)
        if any(p.scale.constant is not None and any(map(is_ones, p.core[-1:])) for p in parts):
            raise CannotEmit(_ONE_COLUMN)
        if len(parts) == 1:
            return self._scaled_product(parts[0])
        total: fx.Node | None = None
        for part in parts:
            node, scale = self._scaled_product(part)
            node = node if scale == 1.0 else self.scaled(node, Poly.const(scale))
            total = node if total is None else self._added(total, node)
        assert total is not None
        return total, 1.0

    def _scaled_product(self, part: Part) -> tuple[fx.Node, float]:
        """``scale · core`` without its constant factor, and that factor. The graph may have the product scaled by a vector already."""
        if not part.scale.is_monomial:
            return self.scaled(self.product(part.core), part.scale), 1.0
        ((mono, c),) = part.scale.items
        existing = self._existing(Expr.chain((*part.core, Diag(mono)))) if mono else None
        if existing is not None:
            return existing, c
        node = self.product(part.core)
        return (self.scaled(node, part.scale), 1.0) if mono else (node, c)

    def scaled_sum(self, terms: Iterable[tuple[fx.Node, Poly]], bias: Poly) -> fx.Node:
        products, scales = zip(*terms)
        return self._shaped(lambda *products: self._sum(products, scales, bias), *products)

    def _sum(self, products: Iterable[fx.Node], scales: Iterable[Poly], bias: Poly) -> fx.Node:
        total: fx.Node | None = None
        for product, scale in zip(products, scales):
            term = self._wide(product)
            if scale.constant != 1.0:
                constant = scale.constant
                factor = self.across_tokens(self.vector(scale)) if constant is None else constant
                term = self.call(torch.mul, term, factor)
            total = term if total is None else self.call(torch.add, total, term)
        assert total is not None
        if bias.items:
            total = self.call(torch.add, total, self.across_tokens(self.vector(bias)))
        return self.cast(total, self.out_dtype())

    def shaped_like_site(self, node: fx.Node) -> fx.Node:
        """A value with the shape and dtype of what it replaces."""
        return self._shaped(lambda out: self.cast(out, self.out_dtype()), node)

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
        target, *rest = self._operator(torch.ops.dorafx.compose.default, sharding.compose, base, kernel)
        if biased:
            rest = [self.out_dtype(), "auto", True]  # no kernel computes it
        g, bias = self.across_tokens(g), None if bias is None else self.across_tokens(bias)
        return self._shaped(lambda base, lora: self.call(target, base, lora, g, bias, scale, *rest), base, lora)

    def compose_delta(
        self, result: fx.Node, base: fx.Node, lora: fx.Node, g: fx.Node, scale: float, kernel: str = "auto"
    ) -> fx.Node:
        target, *rest = self._operator(torch.ops.dorafx.compose_delta.default, sharding.compose_delta, base, kernel)
        return self._shaped(
            lambda result, base, lora: self.call(target, result, base, lora, g, scale, *rest), result, base, lora
        )

    def _operator(
        self, target: Callable[..., Any], sharded: Callable[..., Any], base: fx.Node, kernel: str
    ) -> tuple[Any, ...]:
        """The operator that composes, and its last arguments: the output's dtype and the kernel. That for DTensors takes no kernel."""
        if placements(self.tensor(base)) is not None:
            return sharded, self.out_dtype()
        return (target, self.out_dtype(), *(() if kernel == "auto" else ("triton",)))

    def linear_kernel(self, match: Match, g: fx.Node, bias: fx.Node | None) -> fx.Node | None:
        """The whole layer as one operator, ``dorafx::dora_linear``; None where an operand does not fit, which the plan could not see."""
        operands = linear_operands(self.lift, match, self.order)
        if isinstance(operands, str):
            return None
        x, weight, h, left = (self.operand(node) for node in operands.nodes)
        assert self.site is not None
        shape = self.tensor(self.site).shape
        flat = any(sizes_of(self.tensor(t).shape[:-1]) != sizes_of(shape[:-1]) for t in (x, h))
        if any(sizes_of(self.tensor(v).shape) != sizes_of(shape[-1:]) for v in (g, bias) if v is not None):
            return None
        if flat:
            if not all(isinstance(size, int) for size in shape):
                return None
            x, h = self.flat(x), self.flat(h)
        weight, left = (self.method("t", t) if flip else t for t, flip in zip((weight, left), operands.transposed))
        target = torch.ops.dorafx.dora_linear.default
        y = self.call(target, x, weight, h, left, g, bias, operands.scale, self.out_dtype())
        return self.method("reshape", y, tuple(shape)) if flat else y

    def _shaped(self, make: Callable[..., fx.Node], *operands: fx.Node | None) -> fx.Node:
        """Bring the operands to one shape, and the result to the site's."""
        assert self.site is not None
        if self.transposed:
            return self.method("t", make(*(None if o is None else self.flat(o) for o in operands)))
        if self.channels_first:
            out = make(*(None if o is None else self.method("movedim", o, 1, -1) for o in operands))
            return self.method("movedim", out, -1, 1)
        shape = self.tensor(self.site).shape
        present = [o for o in operands if o is not None]
        if all(sizes_of(self.tensor(o).shape) == sizes_of(shape) for o in present):
            return make(*operands)
        if self.batched:
            raise CannotEmit("the parts of the output have different shapes", ReasonKind.BATCHED_WEIGHTS)
        out = make(*(None if o is None else self.flat(o) for o in operands))
        if sizes_of(self.tensor(out).shape) == sizes_of(shape):
            return out
        for o in present:
            if sizes_of(self.tensor(o).shape) == sizes_of(shape):
                return self.method("reshape_as", out, o)
        if all(isinstance(s, int) for s in shape):
            return self.method("reshape", out, tuple(shape))
        tokens = self._sizes_of_tokens(shape[:-1], present)
        if tokens is not None:
            return self.method("reshape", out, *tokens, self.method("size", out, -1))
        what = "the parts of the output have different leading dimensions, and these are symbolic"
        raise CannotEmit(what, ReasonKind.SYMBOLIC_SHAPE)

    def _sizes_of_tokens(self, leading: torch.Size, operands: Iterable[fx.Node]) -> list[fx.Node | int] | None:
        """The leading sizes of the site's value ``[.., d]``, the symbolic ones read off the layer's input or an operand; None where these have
        others. (A product that is no longer needed has them, too, and would be computed for them.)"""
        node = self.lift.atom_of(self._input.atom).node if isinstance(self._input, Mat) else None
        found: dict[str, tuple[fx.Node, int]] = {}
        for read in (node, *operands):
            tensor = None if read is None else tensor_of(read)
            for axis, key in enumerate(() if tensor is None else sizes_of(tensor.shape[:-1])):
                assert read is not None
                found.setdefault(key, (read, axis))
        keys = sizes_of(leading)
        if any(not isinstance(size, int) and key not in found for size, key in zip(leading, keys)):
            return None
        sizes: list[fx.Node | int] = []
        for size, key in zip(leading, keys):
            if isinstance(size, int):
                sizes.append(size)
            else:
                read, axis = found[key]
                sizes.append(self.method("size", self.operand(read) if read is node else read, axis))
        return sizes


def _base_product(emit: Emitter, core: Chain, gemm: Gemm) -> fx.Node:
    """A product of the graph; made again from the weight before its cast where the backward then keeps no dense copy of the weight, as
    for PEFT's with a dropout in front of fp32 adapters."""
    copy = emit.copied[gemm.node]
    weight = _uncast_weight(emit, core, gemm)
    out, x, cast = (tensor_of(node) for node in (gemm.node, gemm.lhs, gemm.rhs))
    if weight is None or out is None or x is None or cast is None:
        return copy
    last = core[-1]
    assert isinstance(last, Mat)
    tensor = emit.tensor(weight)
    d_out = tensor.shape[0 if last.transposed else 1]
    if sizes_of(out.shape) != sizes_of((*x.shape[:-1], d_out)):
        return copy
    lhs = emit.operand(gemm.lhs)
    if out.dtype == tensor.dtype:
        # Autocast undoes the cast: the product is of the weight's own values.
        target = torch.nn.functional.linear if last.transposed else torch.matmul
        product = emit.graph.call_function(target, (lhs, weight))
        product.meta = dict(copy.meta)  # not from running it: the region's autocast is off here
        return product
    if out.dtype == x.dtype == cast.dtype and out.requires_grad:
        weight = weight if last.transposed else emit.method("t", weight)
        return emit.call(torch.ops.dorafx.cast_linear.default, lhs, weight)
    return copy


def _uncast_weight(emit: Emitter, core: Chain, gemm: Gemm) -> fx.Node | None:
    """The weight, if it is a frozen input of the graph that the product reads in a higher precision than its own."""
    last = core[-1]
    if gemm.bias is not None or gemm.convolution is not None or not isinstance(last, Mat) or last.atom.detached:
        return None
    node, lift = emit.lift.atom_of(last.atom).node, emit.lift
    weight, cast = tensor_of(node) if node is not None else None, tensor_of(gemm.rhs)
    if node is None or not is_leaf(node) or weight is None or cast is None:
        return None
    if weight.dim() != 2 or weight.requires_grad or is_torchao(weight) or placements(weight) is not None:
        return None
    if not weight.is_floating_point() or weight.dtype.itemsize >= cast.dtype.itemsize:
        return None
    assert emit.site is not None
    if not lift.written.isdisjoint((node, gemm.lhs)) or not dies(gemm.node, emit.site, emit.order):
        return None
    return emit.operand(node)
