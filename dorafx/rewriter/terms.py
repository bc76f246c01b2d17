"""Terms back to nodes of a new graph, reusing what the graph already computes: vectors, products, and sums of them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import fx

from dorafx._compat.distributed import placements
from dorafx.graphs.shapes import sizes_of
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Atom, AtomInfo, Diag, Expr, Gemm, Lifter, Mat, Poly
from dorafx.lift.algebra import ONES, Chain, Mono, is_ones, transpose_chain
from dorafx.match import Match

from .convolved import convolved
from .nodes import CannotEmit, NodeEmitter


class TermEmitter(NodeEmitter):
    """Emits terms into a copy of the lifted graph.

    Args:
        lift, graph, copied: see :class:`NodeEmitter`.
        norms: makes the vector of a norm atom for an emitter: ``[d_out]``, fp32 or fp64.
    """

    def __init__(
        self, lift: Lifter, graph: fx.Graph, copied: dict[fx.Node, fx.Node], norms: Callable[[Atom, Any], fx.Node]
    ) -> None:
        super().__init__(lift, graph, copied)
        self._norms = norms
        self.transposed = False
        """Whether the site has tokens by column, and what is emitted for it has them by row."""
        self.channels_first = False
        """Whether the columns of activations lie along the second axis, as a convolution's do."""
        self._input: Mat | Diag | None = None
        self.batched = False
        """Whether weights and vectors are batches, with that axis first, and activations are ``[batch, tokens, d]``."""
        self.compute_dtype = torch.float32
        self._precisely = False
        self._vectors: dict[tuple[Any, ...], fx.Node] = {}
        self._products: dict[Chain, fx.Node] = {}
        self._inputs: dict[tuple[Mat, Poly], fx.Node] = {}

    def begin(self, site: fx.Node, match: Match | None = None) -> None:
        """Start the replacement of an original node, a norm or the composition of a match: everything is emitted just before it."""
        self.site = site
        self.transposed = match is not None and match.transposed
        self.channels_first = match is not None and match.channels_first
        self._input = match.base[0] if match is not None and match.base else None
        self.batched = match is not None and match.norm.batch is not None
        self._vectors.clear()
        self._products.clear()
        self._inputs.clear()
        tensor = tensor_of(site)
        self.compute_dtype = torch.float64 if tensor is not None and tensor.dtype == torch.float64 else torch.float32

    @contextmanager
    def precisely(self, dtype: torch.dtype) -> Iterator[None]:
        """Make factors, products and vectors in at least ``dtype``, whatever the site's value is in."""
        saved = self.compute_dtype, self._precisely, self._vectors, self._products
        self.compute_dtype, self._precisely = torch.promote_types(dtype, self.compute_dtype), True
        self._vectors, self._products = {}, {}
        try:
            yield
        finally:
            self.compute_dtype, self._precisely, self._vectors, self._products = saved

    # -- vectors ------------------------------------------------------------------------------------------------------

    def vector(self, poly: Poly) -> fx.Node:
        """A polynomial in vectors as a ``[d]`` tensor (or scalar) of the compute dtype, fp32 or fp64, or fp64 where an atom is."""
        key = ("poly", poly)
        if key not in self._vectors:
            total: Any = None
            for mono, c in poly.items:
                term: Any = self._monomial(mono)
                if term is None:
                    term = c
                elif c != 1.0:
                    term = self._arithmetic("mul", term, c)
                if total is None:
                    total = term
                elif isinstance(total, float) and isinstance(term, float):
                    total += term
                elif isinstance(total, float):
                    total = self._arithmetic("add", term, total)
                else:
                    total = self._arithmetic("add", total, term)
            if not isinstance(total, fx.Node):
                raise CannotEmit("a scaling is a constant")
            self._vectors[key] = total
        return self._vectors[key]

    def _monomial(self, mono: Mono) -> fx.Node | None:
        product: fx.Node | None = None
        for atom, exponent in sorted(mono, key=lambda item: -item[1]):
            factor = self._vector_atom(atom)
            for _ in range(abs(exponent)):
                if product is not None:
                    product = self._arithmetic("mul" if exponent > 0 else "truediv", product, factor)
                elif exponent > 0:
                    product = factor
                else:
                    product = self._arithmetic("truediv", 1.0, factor)
        return product

    def _arithmetic(self, name: str, *operands: Any) -> fx.Node:
        """An operation on tensors, or on symbolic numbers alone, of which torch's functions would make a tensor of fp32."""
        if not any(tensor_of(o) is not None for o in operands):
            return self.call(getattr(operator, name), *operands)
        if name == "truediv":
            numerator, divisor = operands
            return self.call(torch.reciprocal, divisor) if numerator == 1.0 else self.call(torch.div, *operands)
        return self.call(getattr(torch, name), *operands)

    def _vector_atom(self, atom: Atom) -> fx.Node:
        key = ("atom", atom)
        if key in self._vectors:
            return self._vectors[key]
        info = self.lift.atom_of(atom)
        if info.kind == "norm":
            node = self._norms(atom, self)
        elif info.kind == "node":
            node = self.atom(atom)
            if tensor_of(node) is not None:
                if self.tensor(node).dim() > 1:
                    node = self.method("reshape", node, -1)
                node = self._wide(node)
        elif info.kind == "batch":
            node = self.atom(atom)
            node = self._wide(node if self.tensor(node).dim() == 2 else self.method("flatten", node, 1))
        elif info.kind == "sumsq" or info.poly is None:
            raise CannotEmit("a sum of squares is used without its root")
        else:
            node = self._function(info, self.vector(info.poly))
        if info.kind not in ("node", "batch") and atom.detached and tensor_of(node) is not None:
            node = self.method("detach", node)
        self._vectors[key] = node
        return node

    def _function(self, info: AtomInfo, value: fx.Node) -> fx.Node:
        """What an atom makes of a vector."""
        if info.kind == "reciprocal":
            return self._arithmetic("truediv", 1.0, value)
        if info.kind == "clamp_min":
            return self.call(torch.clamp_min, value, info.eps)
        if info.kind == "maximum":
            return self.call(torch.maximum, value, self.call(torch.full_like, value, info.eps))
        if info.kind == "repeated":
            return self.call(torch.repeat_interleave, value, info.span)
        assert info.kind == "rounded" and info.dtype is not None
        if tensor_of(value) is None:
            raise CannotEmit("a number that is a symbol is rounded")
        return self._wide(self.cast(value, info.dtype))

    def existing_vector(self, atom: Atom) -> fx.Node:
        """A vector as the graph itself computes it, in the compute dtype."""
        node = self._existing(Poly.var(atom))
        if node is None:
            raise CannotEmit("a norm that the output is scaled by is no value of the graph")
        return self._wide(self.method("reshape", node, -1) if self.tensor(node).dim() > 1 else node)

    def _wide(self, node: fx.Node) -> fx.Node:
        """In the compute dtype; what is fp64 stays so, also where the site's value is narrower."""
        return self.cast(node, torch.promote_types(self.tensor(node).dtype, self.compute_dtype))

    # -- products -----------------------------------------------------------------------------------------------------

    def _existing(self, expr: Expr | Poly) -> fx.Node | None:
        """The last node before the site that holds a term: the one whose dtype the products around it use."""
        assert self.site is not None
        for node in reversed(self.lift.nodes.get(expr, ())):
            if self.order[node] < self.order[self.site] and node not in self.lift.written and self._as_wide(expr, node):
                return self.copied[node]
        return None

    def _as_wide(self, expr: Expr | Poly, node: fx.Node) -> bool:
        """Whether a value has the size that :meth:`product` gives its term. Terms do not record how many columns
        ``X·𝟙`` has, or rows ``𝟙·X``: a program may have it in several sizes, and :meth:`product` makes one column, or row."""
        tensor = tensor_of(node)
        if isinstance(expr, Poly) or tensor is None:
            return True
        chains = [chain for (_, chain), _ in expr.items]
        for end, size in zip((0, -1), (1, 1, *tensor.shape)[-2:]):
            if all(chain and is_ones(chain[end]) for chain in chains) and not (isinstance(size, int) and size == 1):
                return False
        return True

    def product(self, chain: Chain) -> fx.Node:
        """A chain as a node: reused where the graph has it, else one product on the longest prefix that it has."""
        if chain not in self._products:
            self._products[chain] = self._product(chain)
        return self._products[chain]

    def _product(self, chain: Chain) -> fx.Node:
        if self.batched:
            return self._product_of_batches(chain)
        existing = self._existing(Expr.chain(chain))
        if existing is not None:
            return self.precise(existing) if len(chain) == 1 else existing
        flipped = self._existing(Expr.chain(transpose_chain(chain))) if self.transposed and len(chain) > 1 else None
        if flipped is not None:
            return self.method("t", flipped)
        for gemm in self.lift.gemms.get(Expr.chain(chain), ()):
            assert self.site is not None
            if self.order[gemm.node] < self.order[self.site] and self._as_wide(Expr.chain(chain), gemm.node):
                return self._again(gemm)
        head = chain[0] if chain else None
        if isinstance(head, Mat) and self.lift.atom_of(head.atom).kind in ("channels", "unfold"):
            return convolved(self, chain)
        if len(chain) == 1 and isinstance(chain[0], Mat):
            return self.precise(
                self.method("t", self.matrix(chain[0].atom)) if chain[0].transposed else self.atom(chain[0].atom)
            )
        if not chain or (len(chain) == 1 and is_ones(chain[0])):
            raise CannotEmit("an identity or a matrix of ones stands alone in the product")
        if self._is_selection(chain[0]):
            return self._placed(self.flat(self.product(chain[1:])), chain[0], 0)
        prefix, last = chain[:-1], chain[-1]
        if self._is_selection(last):
            return self._placed(self.product(prefix), last, -1)
        if is_ones(last):
            return self._summed(prefix)
        if isinstance(last, Diag):
            vector = self.vector(Poly(((last.mono, 1.0),)))
            node = self.product(prefix)
            return self.call(torch.mul, node, self.cast(vector, self.tensor(node).dtype))
        if isinstance(prefix[-1], Diag) and len(prefix) == 1:
            vector = self.vector(Poly(((prefix[-1].mono, 1.0),)))
            node = self.flat(self.product((last,)))
            column = self.method("unsqueeze", self.cast(vector, self.tensor(node).dtype), -1)
            return self.call(torch.mul, column, node)
        if len(prefix) > 1 and is_ones(prefix[-1]):
            return self._multiply_sum(self._summed(prefix[:-1]), last)
        return self._multiply(self.product(prefix), last)

    def _product_of_batches(self, chain: Chain) -> fx.Node:
        existing = self._existing(Expr.chain(chain))
        if existing is not None:
            return existing
        last = chain[-1] if chain else None
        if last is None or is_ones(last) or (len(chain) == 1 and isinstance(last, Diag)):
            raise CannotEmit("a product of batches has a factor that is no value of the graph")
        if isinstance(last, Diag):
            return self.scaled(self.product(chain[:-1]), Poly(((last.mono, 1.0),)))
        matrices = self.atom(last.atom)
        matrices = self.method("transpose", matrices, -2, -1) if last.transposed else matrices
        if len(chain) == 1:
            return self.precise(matrices)
        left = self.product(chain[:-1])
        return self.call(torch.matmul, left, self.cast(matrices, self.tensor(left).dtype))

    def _is_selection(self, factor: Mat | Diag) -> bool:
        return isinstance(factor, Mat) and self.lift.atom_of(factor.atom).kind == "selection"

    def _placed(self, node: fx.Node, selection: Mat | Diag, axis: Literal[0, -1]) -> fx.Node:
        """A value with its rows (axis 0, ``S·X``) or columns (``X·Sᵀ``) among zeros; of the transposed selection, the selected ones alone."""
        assert isinstance(selection, Mat)
        before, rows, after = self.lift.atom_of(selection.atom).rows
        if selection.transposed == (axis == 0):
            return self.method("narrow", node, axis, before, rows)
        return self.call(torch.nn.functional.pad, node, (before, after) if axis else (0, 0, before, after))

    def precise(self, factor: fx.Node) -> fx.Node:
        """A factor of a product, in fp64 where the site's value is, and in the dtype of :meth:`precisely`."""
        return self._wide(factor) if self._precisely or self.compute_dtype == torch.float64 else factor

    def _again(self, gemm: Gemm) -> fx.Node:
        """A product of the graph, without its bias."""
        lhs, rhs = self.operand(gemm.lhs), self.operand(gemm.rhs)
        if self.batched:
            raise CannotEmit("a product of batches has something added to it")
        if gemm.convolution is not None:
            product = self.call(gemm.convolution, lhs, rhs, None, *gemm.options)
        else:
            product = self.call(torch.nn.functional.linear if gemm.rhs_transposed else torch.matmul, lhs, rhs)
        return self.method("detach", product) if gemm.detached else product

    def _summed(self, chain: Chain) -> fx.Node:
        """``chain · 𝟙``: sums over the last axis, ``[.., 1]``."""
        if len(chain) == 1 and isinstance(chain[0], Diag):
            return self.method("unsqueeze", self.vector(Poly(((chain[0].mono, 1.0),))), -1)
        if isinstance(chain[-1], Diag):
            left = self.product(chain[:-1])
            vector = self.cast(self.vector(Poly(((chain[-1].mono, 1.0),))), self.tensor(left).dtype)
            return self.call(torch.matmul, left, self.method("unsqueeze", vector, -1))
        return self.call(torch.sum, self.product(chain), -1, True)

    def _multiply(self, left: fx.Node, factor: Mat) -> fx.Node:
        right = self.cast(self.matrix(factor.atom), self.tensor(left).dtype)
        if factor.transposed:
            return self.call(torch.nn.functional.linear, left, right)
        return self.call(torch.matmul, left, right)

    def _multiply_sum(self, column: fx.Node, factor: Mat) -> fx.Node:
        """``column · 𝟙 · factor``, which is the column times the sum of the factor's rows."""
        matrix = self.cast(self.matrix(factor.atom), self.tensor(column).dtype)
        return self.call(torch.mul, column, self.call(torch.sum, matrix, 1 if factor.transposed else 0))

    def expression(self, expr: Expr) -> fx.Node:
        """A sum of chains as a node, reused where the graph has it."""
        existing = self._existing(expr)
        if existing is not None:
            return existing
        total: fx.Node | None = None
        bias = Poly(())
        for (scalars, chain), c in expr.items:
            if chain[:1] == (Mat(ONES),) and len(chain) == 2 and isinstance(chain[1], Diag):
                bias = bias + Poly(((chain[1].mono, c),)) * Poly(((scalars, 1.0),))
                continue
            term = self.product(chain)
            scale = Poly(((scalars, c),))
            if scale.constant != 1.0:
                term = self.scaled(term, scale)
            total = term if total is None else self._added(total, term)
        if total is None:
            raise CannotEmit("a sum of nothing but biases")
        if bias.items:
            total = self.call(torch.add, total, self._along_columns(self.vector(bias), total))
        return total

    def _added(self, total: fx.Node, term: fx.Node) -> fx.Node:
        """The sum of two products. One graph may hold one of them as ``[batch, length, d]`` and the other as ``[tokens, d]``."""
        if sizes_of(self.tensor(total).shape) != sizes_of(self.tensor(term).shape):
            if self.channels_first:
                raise CannotEmit("two convolutions that are added have different shapes")
            total, term = self.flat(total), self.flat(term)
        return self.call(torch.add, total, term)

    def scaled(self, node: fx.Node, scale: Poly) -> fx.Node:
        constant = scale.constant
        if constant is not None:
            return self.call(torch.mul, node, constant)
        factor = self.vector(scale)
        return self.call(
            torch.mul, node, self._along_columns(factor, node) if tensor_of(factor) is not None else factor
        )

    def scaled_input(self, node: fx.Node, scale: Poly) -> fx.Node:
        dtype = self.tensor(node).dtype
        return self.cast(self.scaled(self._wide(node), scale), dtype)

    def product_of_scaled(self, head: Mat, scale: Poly, tail: Chain) -> fx.Node:
        if self.lift.atom_of(head.atom).kind in ("channels", "unfold"):
            return convolved(self, (head, *tail), scale)
        if (head, scale) not in self._inputs:
            self._inputs[head, scale] = self.scaled_input(self.product((head,)), scale)
        return self.multiplied(self._inputs[head, scale], tail)

    def multiplied(self, node: fx.Node, chain: Chain) -> fx.Node:
        for factor in chain:
            if isinstance(factor, Diag):
                node = self.scaled(node, Poly(((factor.mono, 1.0),)))
            else:
                node = self._multiply(node, factor)
        return node

    def _along_columns(self, vector: fx.Node, node: fx.Node) -> fx.Node:
        """A vector ``[d]`` in a value's dtype, shaped to lie along its columns. A scalar decides no dtype, and is not rounded."""
        if self.tensor(vector).dim() == 0 and self.tensor(node).dim() > 0 and placements(self.tensor(node)) is None:
            return vector
        vector = self.cast(vector, self.tensor(node).dtype)
        if self.batched:
            return self.across_tokens(vector)
        if not self.channels_first or self.tensor(vector).dim() == 0:
            return vector
        return self.method("reshape", vector, (-1,) + (1,) * (self.tensor(node).dim() - 2))

    def across_tokens(self, vector: fx.Node) -> fx.Node:
        """A vector as it scales activations; that of a batch ``[batch, d]`` has an axis of tokens then."""
        return self.method("unsqueeze", vector, 1) if self.batched and self.tensor(vector).dim() == 2 else vector

    # -- shapes and dtypes -----------------------------------------------------------------------------------------------

    def flat(self, node: fx.Node) -> fx.Node:
        """A matrix with one axis of rows: a graph may hold a term in several shapes."""
        value = self.tensor(node)
        if value.dim() == 1:
            return self.method("unsqueeze", node, 0)  # a single token
        return node if value.dim() == 2 else self.method("flatten", node, 0, -2)

    def matrix(self, atom: Atom) -> fx.Node:
        """A weight with two axes: factors may be stacked in one parameter of three, of which the graph takes a view."""
        return self.flat(self.atom(atom))

    def out_dtype(self) -> torch.dtype:
        assert self.site is not None
        return self.tensor(self.site).dtype
