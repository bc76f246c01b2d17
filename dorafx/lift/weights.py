"""What is a weight: which nodes and terms come from parameters alone, and which may where a graph does not name its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import fx

from dorafx.graphs.inputs import is_leaf, looks_like_parameter
from dorafx.graphs.operators import canonical_name
from dorafx.graphs.tensors import tensor_of

from .algebra import Atom, Expr, Poly
from .values import FLOAT_DTYPES, AtomInfo, Value, VectorValue

_CONSTANTS = frozenset({"arange", "eye", "full", "ones", "tensor", "zeros"})
_PRODUCTS = frozenset({"matmul", "bmm", "linear", "addmm", "einsum", "embedding", "multi_dot", "conv", "convolution"})


class Weights:
    """Tells weights from activations, in the nodes and terms of one graph.

    Args:
        values: the terms of the nodes that were lifted so far.
        atom_of: what is known of an indeterminate.
        norms_in: the norms in a term, at any depth.
        is_parameter: tells which placeholders and attributes are parameters or buffers; by their names if it is not given.
    """

    def __init__(
        self,
        values: Mapping[fx.Node, Value | None],
        atom_of: Callable[[Atom], AtomInfo],
        norms_in: Callable[[Poly], set[Atom]],
        is_parameter: Callable[[fx.Node], bool] | None,
    ) -> None:
        self._values = values
        self._atom_of = atom_of
        self._norms_in = norms_in
        self._is_parameter = is_parameter or looks_like_parameter
        self._of_parameters: dict[fx.Node, bool] = {}
        self._names_parameters = False
        self._productless: dict[fx.Node, bool] = {}

    def follow(self, node: fx.Node) -> None:
        """Take in the next node of the graph, before it is lifted."""
        if is_leaf(node):
            self._of_parameters[node] = self._is_parameter(node)
            self._names_parameters |= self._of_parameters[node] and _may_be_parameter(node)
        elif node.all_input_nodes:
            self._of_parameters[node] = all(self._of_parameters.get(n, False) for n in node.all_input_nodes)
        else:
            self._of_parameters[node] = canonical_name(node) in _CONSTANTS

    def depends_on_parameters_only(self, node: fx.Node) -> bool:
        """Whether a node is computed only from parameters and buffers that the graph names, and constants."""
        return self._of_parameters.get(node, False)

    def is_parameter_term(self, term: Expr | Poly) -> bool:
        """Whether a term contains nothing but parameters, buffers, and what is computed from them."""
        return all(self._atom_of(a).parameter for a in term.atoms())

    def is_weight(self, atom: Atom) -> bool:
        """Whether an indeterminate is a parameter, or is computed from parameters, or from inputs of the graph without any product.
        Activations are computed with products."""
        info = self._atom_of(atom)
        return info.parameter or (info.node is not None and self.has_no_product_behind(info.node))

    def is_made_of_weights(self, expr: Expr) -> bool:
        """Whether a term contains no activations. If the graph names its parameters, a term of parameters contains none; otherwise a
        term of values that are computed without products."""
        if self._names_parameters:
            return self.is_parameter_term(expr)
        return self.is_weight_like(expr, self.has_no_product_behind)

    def is_weight_like(self, term: Expr | Poly, accepts: Callable[[fx.Node], bool]) -> bool:
        """Whether a term is computed from parameters and accepted nodes only."""
        return all(self._atom_is_weight_like(atom, accepts) for atom in term.atoms())

    def _atom_is_weight_like(self, atom: Atom, accepts: Callable[[fx.Node], bool]) -> bool:
        info = self._atom_of(atom)
        if info.parameter or info.kind in ("onehot", "unfold"):
            return info.parameter
        if info.node is not None:
            return accepts(info.node)
        return all(self.is_weight_like(term, accepts) for term in (info.expr, info.poly) if term is not None)

    def has_no_product_behind(self, node: fx.Node) -> bool:
        """Whether a node is computed without products but those in norms of weights, of which the terms are known."""
        if node not in self._productless:
            self._productless[node] = canonical_name(node) not in _PRODUCTS and all(
                self._productless.get(argument, False) or self._has_norms_of_weights(argument)
                for argument in node.all_input_nodes
            )
        return self._productless[node]

    def _has_norms_of_weights(self, node: fx.Node) -> bool:
        value = self._values.get(node)
        if not isinstance(value, VectorValue) or not self._norms_in(value.poly):
            return False
        return self.is_weight_like(value.poly, self.has_no_product_behind)


def _may_be_parameter(node: fx.Node) -> bool:
    """Whether an attribute may be a parameter, and not a constant of indices or a number, which tracers also turn into attributes."""
    return (tensor := tensor_of(node)) is None or (tensor.dtype in FLOAT_DTYPES and tensor.dim() > 0)
