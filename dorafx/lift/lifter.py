"""Lifts FX nodes to terms of the algebra, with one transfer function per operator family.

An operator that is not in the table becomes an atom: never an error, never a guess.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from enum import IntEnum
from typing import Any, Literal, TypeVar

import torch
from torch import fx

from dorafx._compat.graphs import is_inference_input
from dorafx.errors import in_a_line
from dorafx.graphs.equal_values import EqualValues
from dorafx.graphs.grad_mode import GradMode
from dorafx.graphs.inputs import attribute_id, is_leaf
from dorafx.graphs.operators import canonical_name, drops_nothing
from dorafx.graphs.tensors import may_require_grad, tensor_of
from dorafx.graphs.writes import attribute_of, storage_of, written_nodes

from .algebra import ONES, Atom, Chain, Diag, Expr, Mat, Poly, TooComplex, transpose_chain
from .quantized import Codes, dequantizes_by_a_cast, quantizes_activations
from .values import FLOAT_DTYPES, AtomInfo, Gemm, MatrixValue, Patches, Value, VectorValue, loses_accuracy, vector_axis
from .weights import Weights

_logger = logging.getLogger(__name__)  # TORCH_LOGS="+dorafx"

Observer = Callable[["Lifter", fx.Node, Value], Any]
Transfer = Callable[["Lifter", fx.Node], "Value | None"]
T = TypeVar("T")
E = TypeVar("E", Expr, Poly)
V = TypeVar("V", bound=MatrixValue | VectorValue)


class Reading(IntEnum):
    """The ways to read an operator, in the order in which they are tried: the first that gives a value is used."""

    BATCH = 0
    """As a step of a computation with a batch of weights; gives no value, but is noted in :attr:`Lifter.batches`."""
    STACK = 1
    """As a step of a sum over a stack of matrices, or of one matrix for all entries of a batch."""
    TAKEN_APART = 2
    """As a step of a product that a tracer decomposed, by the letters of its axes."""
    MATRIX = 3
    """As a matrix that became a vector by its shape and is brought back to the shape of the matrix."""
    OPERATOR = 4
    """By what the operator does."""
    MOVED = 5
    """As a tensor whose axes were only moved, by the letters of its axes."""
    ROW = 6
    """As a matrix of one row that becomes a vector by its shape."""


_TRANSFER: dict[str, dict[Reading, Transfer]] = {}


def transfer(*names: str, reading: Reading = Reading.OPERATOR) -> Callable[[Transfer], Transfer]:
    """Register a transfer function for the operators with these canonical names; each operator may have one for each reading.

    Raises:
        ValueError: an operator already has one for this reading.
    """

    def register(fn: Transfer) -> Transfer:
        for name in names:
            known = _TRANSFER.setdefault(name, {})
            if reading in known:
                raise ValueError(f"transfer: {name!r} is read by {known[reading].__name__} as {reading.name} already")
            known[reading] = fn
            _TRANSFER[name] = dict(sorted(known.items()))
        return fn

    return register


def transfers() -> dict[str, tuple[Transfer, ...]]:
    """The transfer functions of each operator, in the order in which they are tried."""
    return {name: tuple(known.values()) for name, known in _TRANSFER.items()}


class Lifter:
    """Terms for every node of one graph (not of its submodules).

    Args:
        graph: the graph; it is not changed.
        observer: called as ``observer(lifter, node, value)`` after each node, with a verdict whose ``value`` is "keep",
            "seal" (make the node an atom for everything downstream, because the matcher has recognised it) or "relift" (lift
            this node again, because an operand has been sealed).
        is_parameter: tells which placeholders and attributes are parameters or buffers.
    """

    def __init__(
        self,
        graph: fx.Graph,
        observer: Observer | None = None,
        is_parameter: Callable[[fx.Node], bool] | None = None,
    ) -> None:
        self.graph = graph
        self.observer = observer
        self.atoms: list[AtomInfo] = [AtomInfo("ones", requires_grad=False, parameter=True)]
        self.values: dict[fx.Node, Value | None] = {}
        self.weights = Weights(self.values, self.atom_of, self.norms_in, is_parameter)
        self.nodes: dict[Expr | Poly, list[fx.Node]] = {}
        """The nodes that hold a given term, in graph order, which can be reused as operands."""
        self.gemms: dict[Expr, list[Gemm]] = {}
        self._product_dtypes: dict[frozenset[Any], set[torch.dtype]] | None = None
        self.expanded: dict[fx.Node, VectorValue] = {}
        """Nodes that are a vector expanded along other axes, and the vector."""
        self.absolute: dict[fx.Node, MatrixValue] = {}
        """Nodes that are absolute values of a matrix, and the matrix."""
        self.stacked: dict[fx.Node, tuple[MatrixValue, int]] = {}
        """Nodes that stack several matrices along a new first axis; the sum of the matrices, and their number."""
        self.repeated: dict[fx.Node, MatrixValue] = {}
        """Nodes that repeat one matrix for each entry of a batch, and the matrix."""
        self.batches: dict[fx.Node, MatrixValue | VectorValue] = {}
        """Nodes that are a batch of matrices ``[batch, rows, cols]`` or of vectors, one for each expert, and their term. The axis of the
        batch comes first, and all factors of the term have it. It is in no other term: for :attr:`values` such a node is unknown."""
        self.roundings: dict[fx.Node, torch.dtype] = {}
        """Nodes whose term ignores that something in it was rounded to this dtype."""
        self.failures: dict[fx.Node, str] = {}
        """Nodes whose transfer function raised an exception: which one, and where."""
        self.subscripts: dict[fx.Node, Any] = {}
        """Nodes whose axes have letters (see ``transfer.rearranged``)."""
        self.written = written_nodes(graph)
        self._written_attributes: set[int | None] | None = None
        self._interned: dict[Any, Atom] = {}
        self._no_grad_ids: set[int] = {ONES.id}
        self._lifted: fx.Node | None = None
        self._unrounded: set[fx.Node] = set()
        self.unrecorded: set[fx.Node] = set()
        self._inference: set[fx.Node] = set()
        self._grad_mode = GradMode(graph)
        self._codes = Codes(self.weights.has_no_product_behind)
        self._equal = EqualValues(self.written, lambda node: self._attribute_of(node) or node)

    # -- the walk -----------------------------------------------------------------------------------------------------

    def run(self) -> Lifter:
        for node in self.graph.nodes:
            self.weights.follow(node)
            of_parameters = self.weights.depends_on_parameters_only(node)
            self._equal.follow(node, compare=self.weights.has_no_product_behind(node) or of_parameters)
            value = self.values[node] = self._lift_here(node)
            if value is None:
                continue
            if self.observer is not None:
                verdict = self.observer(self, node, value).value
                if verdict == "relift":
                    # An operand has been sealed: lifted again, the node contains its atom, and is shown to the observer again.
                    value = self.values[node] = self._lift_here(node)
                    verdict = self.observer(self, node, value).value if value is not None else "keep"
                if verdict == "seal":
                    self.seal(node)
                    value = self.values[node]
            if value is not None and node not in self.written and not self._is_new_leaf(node):
                key: Expr | Poly = value.expr if isinstance(value, MatrixValue) else value.poly
                if not isinstance(value, MatrixValue) or (not value.squared and self.holds_rows(value)):
                    self.nodes.setdefault(key, []).append(node)
                batch = self.batches.get(node)
                if isinstance(batch, MatrixValue) and not batch.squared:
                    self.nodes.setdefault(batch.expr, []).append(node)
                if isinstance(value, VectorValue) and value.row is not None:
                    self.nodes.setdefault(value.row, []).append(node)
        return self

    def seal(self, node: fx.Node) -> None:
        """Make the node's value an atom for everything downstream of here."""
        self.values[node] = self.atom_value(node)
        self.roundings.pop(node, None)
        self.batches.pop(node, None)

    def _lift_here(self, node: fx.Node) -> Value | None:
        self._lifted, self._unrounded = node, set()
        self.batches.pop(node, None)  # from an attempt before an operand was sealed
        value = self._lift(node)
        if self._is_inference_tensor(node):
            self._inference.add(node)
        self._lifted = None
        aside: tuple[dict[fx.Node, Any], ...] = (
            self.expanded,
            self.absolute,
            self.stacked,
            self.repeated,
            self.batches,
        )
        if self._unrounded and (value != self.atom_value(node) or any(node in table for table in aside)):
            dtypes = {self.roundings[argument] for argument in self._unrounded}
            self.roundings[node] = max({*dtypes, self.roundings.get(node, torch.float64)}, key=_spacing)
        if self.records_gradients or is_leaf(node) or _hands_back(node):
            return value
        self.unrecorded.add(node)
        return self.detach(value) if value is not None else None

    def _lift(self, node: fx.Node) -> Value | None:
        name = canonical_name(node)
        if self._grad_mode.follow(node, name):
            return None
        if node in self.written:
            return self.atom_value(node)
        known = _TRANSFER.get(name) if name is not None else None
        is_opaque = name is not None and (quantizes_activations(node, name) or dequantizes_by_a_cast(node, name))
        if name is not None and known is not None and not is_opaque:
            self.failures.pop(node, None)  # from an attempt before an operand was sealed
            try:
                for read in known.values():
                    value = read(self, node)
                    if value is not None:
                        return self.atom_value(node) if self._codes.are_scaled_by(node, name, value) else value
            except TooComplex:
                pass
            except Exception as error:
                self._failed(node, error)
        return self._function_of_norms(node) or self.atom_value(node)

    def _function_of_norms(self, node: fx.Node) -> VectorValue | None:
        """A vector for which there is no term, made of one with a norm in it by an operator that keeps its shape, such as a guard
        against zeros: an indeterminate that knows the norm."""
        tensor = tensor_of(node)
        if tensor is None or tensor.dtype not in FLOAT_DTYPES or node in self.failures:
            return None
        norms: set[Atom] = set()
        axes = set()
        for argument in node.all_input_nodes:
            value, before = self.value(argument), tensor_of(argument)
            if not isinstance(value, VectorValue) or value.axis is None or value.row is not None or before is None:
                continue
            same_shape = tuple(map(str, before.shape)) == tuple(map(str, tensor.shape))
            if same_shape and self.weights.is_weight_like(value.poly, self.weights.has_no_product_behind):
                norms |= self.norms_in(value.poly)
                axes.add(value.axis)
        if not norms or len(axes) != 1:
            return None
        atom = self._node_atom(node, may_require_grad(node))
        self.atoms[atom.id] = replace(self.atoms[atom.id], norms=frozenset(norm.id for norm in norms))
        return VectorValue(Poly.var(atom), axes.pop())

    def _failed(self, node: fx.Node, error: Exception) -> None:
        """A transfer function raised an exception. The node becomes an unknown value, as if its operator were not in the table; if DoRA
        depends on it, the matcher reports the failure."""
        _logger.debug("%s is left as an unknown value", node.format_node(), exc_info=error)
        message, where = in_a_line(error)
        self.failures[node] = f"{message} ({where})"

    # -- atoms --------------------------------------------------------------------------------------------------------

    def atom_value(self, node: fx.Node) -> Value | None:
        """The node as an indeterminate; None unless it is a floating tensor, a symbolic scalar or a size of a parameter."""
        tensor = tensor_of(node)
        if tensor is None:
            example = node.meta.get("example_value", node.meta.get("val"))
            if isinstance(example, (torch.SymFloat, torch.SymInt)):
                return VectorValue(Poly.var(self._node_atom(node, False)), None)
            if type(example) is int and self.weights.depends_on_parameters_only(node):
                # A size of a parameter is constant; that of an activation may change from call to call.
                return VectorValue(Poly.const(example), None)
            return None
        if tensor.dtype not in FLOAT_DTYPES:
            return None
        atom = self._node_atom(node, may_require_grad(node))
        if tensor.dim() == 0:
            return VectorValue(Poly.var(atom), None)
        if tensor.dim() == 1:
            return VectorValue(Poly.var(atom), -1)
        return MatrixValue(Expr.mat(atom))

    def _node_atom(self, node: fx.Node, requires_grad: bool) -> Atom:
        # If a node's storage is written, its value depends on when it is read, so no two reads may be taken as equal.
        key = ("node", self._equal.first(node)) if node not in self.written else None
        return self._intern(key, AtomInfo("node", requires_grad, self.weights.depends_on_parameters_only(node), node))

    def _attribute_of(self, node: fx.Node) -> tuple[str, int] | None:
        """The identity of what a ``get_attr`` node reads. Tracers create such a node for each use, and under several names for a tied
        tensor. None if some node of the graph writes to the tensor, because its value then depends on when it is read."""
        identity = attribute_id(node)
        if self._written_attributes is None:
            self._written_attributes = {attribute_id(n) for n in self.written}
        return ("attribute", identity) if identity is not None and identity not in self._written_attributes else None

    def onehot(self, indices: fx.Node, options: tuple[Any, ...]) -> Atom:
        """The one-hot rows for an embedding's indices. ``options`` decide which rows have a gradient."""
        key = ("onehot", indices, options) if indices not in self.written else None
        return self._intern(key, AtomInfo("onehot", requires_grad=False, of=indices))

    def laid_out(self, arg: Any, layout: Literal["filter", "channels"]) -> Expr | None:
        """The argument as a matrix in the layout of a convolution's weight or activations. If its term has another layout, or is a sum
        that depends on activations (see :meth:`operand`), it becomes an indeterminate of its own."""
        value, tensor = self.value(arg), tensor_of(arg)
        if tensor is None or tensor.dim() < 3 or tensor.dtype not in FLOAT_DTYPES:
            return None
        if isinstance(value, MatrixValue) and value.layout == layout and not value.squared:
            accepts = self.weights.has_no_product_behind if layout == "filter" else _refuses
            expr = value.expr
            if len(expr.items) == 1 or self.weights.is_weight_like(expr, accepts):
                return expr
        if layout == "filter" and (filters := self._weights_as_filters(arg, value, tensor)) is not None:
            return filters
        node: fx.Node = arg
        at = self.atom_of(self._node_atom(node, may_require_grad(node)))
        key: Any = (layout, self._equal.first(node)) if node not in self.written else None
        rounded = self._single(value) if isinstance(value, MatrixValue) else None
        rounds = self.atom_of(rounded.atom).rounds if rounded is not None and not rounded.transposed else None
        if rounds is not None and rounded is not None and key is not None:
            source = self.atom_of(next(rounds.atoms())).node
            whole = self.laid_out(source, layout) if self.atom_of(rounded.atom).node is not None else None
            dtype = self.atom_of(rounded.atom).dtype
            same = source is not None and str(tensor_of(source).shape) == str(tensor.shape)  # type: ignore[union-attr]
            if whole is not None and same:
                key, at = ("rounded", whole, dtype), replace(at, dtype=dtype, rounds=whole)
        return Expr.mat(self._intern(key, replace(at, kind=layout, sites=[])))

    def _weights_as_filters(self, node: fx.Node, value: Value | None, tensor: torch.Tensor) -> Expr | None:
        """A sum of weights of a tensor's shape, or another node's value that is handed on (a cast that does nothing, ``.data``)."""
        if not isinstance(value, MatrixValue) or value.squared or value.layout != "last":
            return None
        nodes = [self.atom_of(atom).node for atom in value.expr.atoms()]
        if node in nodes or node in self.written or self._is_new_leaf(node):
            return None
        filters = self.as_filters(value.expr, tensor)
        return filters if filters is not None and self.weights.is_made_of_weights(filters) else None

    def is_convolved(self, expr: Expr) -> bool:
        """Whether all products in a term, if any, have a convolution's input for their first factor; biases do not count."""
        heads = [chain[0] if chain else None for (_, chain), _ in expr.items]
        return all(
            isinstance(head, Mat) and self.atom_of(head.atom).kind in ("ones", "unfold", "channels") for head in heads
        )

    def holds_rows(self, value: MatrixValue) -> bool:
        """Whether a tensor lies as products do: tokens and channels, and not as a convolution's weight."""
        return value.layout in ("last", "batch") or (value.layout == "channels" and self.is_convolved(value.expr))

    def batch_atom(self, node: fx.Node) -> Atom | None:
        """A tensor of two or three axes as a batch of vectors or matrices along its first axis."""
        tensor = tensor_of(node)
        if tensor is None or tensor.dim() not in (2, 3) or tensor.dtype not in FLOAT_DTYPES:
            return None
        at = self.atom_of(self._node_atom(node, may_require_grad(node)))
        key = ("batch", self._equal.first(node)) if node not in self.written else None
        return self._intern(key, replace(at, kind="batch", sites=[]))

    def note_batch(self, node: fx.Node, value: MatrixValue | VectorValue) -> None:
        """Note the term of a node that is a batch."""
        kept = self.records_gradients or _hands_back(node)
        self.batches[node] = value if kept else self.detach(value)

    def noted(self, node: fx.Node) -> Value | None:
        """The term of a node; as a batch of weights or of vectors, if it is one."""
        return self.batches.get(node) or self.values.get(node)

    def note_rounding(self, node: fx.Node, dtype: torch.dtype) -> None:
        """Note that a node's term ignores a rounding to a dtype."""
        self.roundings[node] = max(dtype, self.roundings.get(node, dtype), key=_spacing)

    @staticmethod
    def _single(value: MatrixValue) -> Mat | None:
        """The matrix, if a value is a single one without any scaling; else None."""
        if value.squared or value.expr.vanished or len(value.expr.items) != 1:
            return None
        ((scalars, chain), c) = value.expr.items[0]
        return chain[0] if not scalars and c == 1.0 and len(chain) == 1 and isinstance(chain[0], Mat) else None

    def as_filters(self, expr: Expr, like: torch.Tensor) -> Expr | None:
        """A sum of indeterminates of this shape, in the layout of a convolution's weight; None for any other term."""
        total: Expr | None = None
        for (scalars, chain), c in expr.items:
            factor = chain[0] if len(chain) == 1 and not scalars else None
            if not isinstance(factor, Mat) or factor.transposed:
                return None
            tensor = tensor_of(node := self.atom_of(factor.atom).node)
            alike = tensor is not None and str(tensor.shape) == str(like.shape)
            filters = self.laid_out(node, "filter") if alike else None
            if filters is None:
                return None
            filters = self.detached(filters) if factor.atom.detached else filters
            total = filters.scaled(c) if total is None else total + filters.scaled(c)
        return total

    def unfold(self, activations: Expr, options: tuple[Any, ...], patches: Patches | None = None) -> Atom:
        """The patches that a convolution with these options takes of activations."""
        info = AtomInfo("unfold", self.requires_grad(activations), False, of=activations, patches=patches)
        return self._intern(("unfold", activations, options), info)

    def selection(self, start: int, rows: int, total: int) -> Atom:
        """``[total, rows]``: the columns of an identity that place rows from ``start`` on among zeros."""
        span = (start, rows, total - start - rows)
        info = AtomInfo("selection", requires_grad=False, parameter=True, rows=span)
        return self._intern(("selection", span), info)

    def norm_atom(
        self, kind: Literal["norm", "sumsq"], expr: Expr, side: Literal["row", "col"], double: bool, span: int = 1
    ) -> Atom:
        """The norms, or sums of squares, of the rows or columns of a matrix."""
        grad, parameter = self.requires_grad(expr), self.weights.is_parameter_term(expr)
        return self.intern(AtomInfo(kind, grad, parameter, expr=expr, side=side, span=span, double=double))

    def intern(self, info: AtomInfo) -> Atom:
        """The atom of a norm or function of terms; equal terms give equal atoms."""
        if info.poly is not None and info.poly.vanished:
            raise TooComplex  # the indeterminate would not show the gradients and NaNs of what vanished
        key = (info.kind, info.expr, info.poly, info.side, info.span, info.eps, info.double, info.rooted, info.dtype)
        return self._intern(key, info)

    def repeat_each(self, poly: Poly, span: int) -> Poly:
        """A vector along the input channels of filters as one along their columns, of which each channel has ``span``."""
        if span == 1:
            return poly
        if poly.vanished:
            raise TooComplex
        total = Poly(())
        for mono, c in poly.items:
            product = Poly.const(c)
            for atom, exponent in mono:
                product = product * Poly(((((self._repeat_each(atom, span), exponent),), 1.0),))
            total = total + product
        return total

    def _repeat_each(self, atom: Atom, span: int) -> Atom:
        if self.is_scalar(atom):
            return atom
        info, one = self.atom_of(atom), Poly.var(Atom(atom.id))
        repeated = AtomInfo("repeated", info.requires_grad, info.parameter, poly=one, span=span)
        return Atom(self.intern(repeated).id, atom.detached)

    def is_scalar(self, atom: Atom) -> bool:
        """Whether an indeterminate of vectors is a number."""
        info = self.atom_of(atom)
        if info.poly is not None:
            return all(map(self.is_scalar, info.poly.atoms()))
        tensor = tensor_of(info.node)
        return info.kind == "node" and (tensor is None or tensor.dim() == 0)

    def rounded(self, node: fx.Node, value: V, dtype: torch.dtype) -> V:
        """A value that a node casts to a dtype that cannot hold all of its values.

        A vector, or a single matrix, becomes an indeterminate of its own, which is the rounded value. The rounding of a sum or product
        of matrices is not part of the term. It is noted in :attr:`roundings`, and the term is used only for results that are no more
        accurate than that dtype.
        """
        if isinstance(value, VectorValue):
            if value.row is None:
                return replace(value, poly=self.rounded_vector(value.poly, dtype))
        elif (one := self._single(value)) is not None:
            at = self.atom_of(self._node_atom(node, self.requires_grad(value.expr)))
            kind = self.atom_of(one.atom).kind
            if kind in ("node", "filter", "channels"):
                info = replace(at, kind=kind, dtype=dtype, rounds=value.expr, sites=[])
                key = ("rounded", value.expr, dtype) if node not in self.written else None
                return replace(value, expr=Expr.mat(self._intern(key, info)))
        self.note_rounding(node, dtype)
        return value

    def rounded_vector(self, poly: Poly, dtype: torch.dtype) -> Poly:
        """A vector rounded to a dtype that cannot hold all of its values."""
        constant = poly.constant
        if constant is not None:
            return Poly.const(float(torch.tensor(constant, dtype=dtype)))
        info = AtomInfo(
            "rounded", self.requires_grad(poly), self.weights.is_parameter_term(poly), poly=poly, dtype=dtype
        )
        return Poly.var(self.intern(info))

    def unrounded(self, mat: Mat) -> Mat:
        """The matrix from which a factor was rounded; the factor itself if it was not rounded."""
        rounds = self.atom_of(mat.atom).rounds
        if rounds is None:
            return mat
        ((_, (source,)), _) = rounds.items[0]
        assert isinstance(source, Mat)
        return self.unrounded(Mat(source.atom, source.transposed != mat.transposed))

    def _intern(self, key: Any, info: AtomInfo) -> Atom:
        if key is not None and key in self._interned:
            return self._interned[key]
        atom = Atom(len(self.atoms))
        self.atoms.append(info)
        if not info.requires_grad:
            self._no_grad_ids.add(atom.id)
        if key is not None:
            self._interned[key] = atom
        return atom

    def atom_of(self, atom: Atom) -> AtomInfo:
        return self.atoms[atom.id]

    @staticmethod
    def name_of(node: fx.Node) -> str:
        """The operator's canonical name; empty if it has none."""
        return canonical_name(node) or ""

    # -- services for transfer functions ------------------------------------------------------------------------------

    def value(self, arg: Any) -> Value | None:
        """The term of an argument: a node's, or a Python number's."""
        if isinstance(arg, bool):
            return None
        if isinstance(arg, (int, float)):
            return VectorValue(Poly.const(arg), None)
        if not isinstance(arg, fx.Node):
            return None
        if arg in self.written:
            return self.atom_value(arg)
        value = self.values.get(arg)
        if not self._shows_rounding(arg):
            return value
        tensor = tensor_of(arg)
        if tensor is not None and isinstance(value, VectorValue) and value.row is None:
            return replace(value, poly=self.rounded_vector(value.poly, tensor.dtype))
        return self.atom_value(arg)

    def aside(self, table: dict[fx.Node, T], arg: Any) -> T | None:
        """The entry of an argument in one of the side tables (``expanded``, ``absolute``, ``stacked``, ``repeated``)."""
        known = table.get(arg) if isinstance(arg, fx.Node) else None
        return None if known is not None and self._shows_rounding(arg) else known

    def _shows_rounding(self, arg: fx.Node) -> bool:
        """Whether the node being lifted is more accurate than the dtype to which something in an argument was rounded."""
        dtype = self.roundings.get(arg)
        if dtype is None or self._lifted is None:
            return False
        tensor = tensor_of(self._lifted)
        if tensor is None or loses_accuracy(tensor.dtype, dtype):
            return True
        self._unrounded.add(arg)
        return False

    def vector(self, arg: Any) -> VectorValue | None:
        """The argument as a vector: a vector, or a matrix atom with a single row or column."""
        value = self.value(arg)
        if value is None or isinstance(value, VectorValue):
            return value
        tensor = tensor_of(arg)
        if tensor is None or value.squared or value.layout != "last" or len(value.expr.items) != 1:
            return None
        ((scalars, chain), c) = value.expr.items[0]
        if scalars or c != 1.0 or len(chain) != 1 or not isinstance(chain[0], Mat):
            return None
        # The activations of a single token have this shape too, but are no magnitude: they stay operands of products.
        axis = vector_axis(tensor.shape) if self.weights.is_weight_like(Expr.mat(chain[0].atom), is_leaf) else None
        if axis is None:
            return None
        return VectorValue(Poly.var(chain[0].atom), axis)

    def matrix(self, arg: Any) -> MatrixValue | None:
        value = self.value(arg)
        return value if isinstance(value, MatrixValue) and not value.squared and value.layout == "last" else None

    def operand(self, arg: Any, weight: bool = False) -> Expr | None:
        """The argument as an operand of a matrix product.

        A sum that depends on activations enters as an atom: its expansion would grow from layer to layer, and the input of a DoRA
        layer is one value, however it was computed. A sum of parameters is a weight that is being computed, and enters expanded; so is
        a sum of inputs of the graph if ``weight`` is set, for the second operand of a product, or if it is divided by its norm.
        """
        value = self.matrix(arg)
        if value is None and isinstance(self.value(arg), VectorValue):
            atom = self.atom_value(arg)  # a [1, d] or [d, 1] tensor that was read as a vector so far
            value = atom if isinstance(atom, MatrixValue) else None
        if value is None:
            return None
        accepts = self.weights.has_no_product_behind if weight or self.norms_in(value.expr) else _refuses
        if len(value.expr.items) > 1 and not self.weights.is_weight_like(value.expr, accepts):
            sealed = self.atom_value(arg)
            self._unrounded.discard(arg)
            return sealed.expr if isinstance(sealed, MatrixValue) else None
        return value.expr

    @property
    def records_gradients(self) -> bool:
        """Whether gradients are recorded at the node being lifted."""
        return self._grad_mode.records

    def _is_new_leaf(self, node: fx.Node) -> bool:
        """Whether a node is a view, created while no gradients are recorded, of a tensor that requires a gradient. Such a view is a new
        leaf: its gradient does not flow to the tensor."""
        tensor = tensor_of(node) if node in self.unrecorded else None
        return tensor is not None and tensor.requires_grad

    def can_be_saved(self, node: fx.Node, site: fx.Node) -> bool:
        """Whether the backward of what is computed at a site may save a node's value; it must not save an inference tensor."""
        return node not in self._inference or site in self.unrecorded or not self._grad_mode.may_record

    def _is_inference_tensor(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return is_inference_input(node)
        if node.op == "get_attr":
            value = attribute_of(node)
            return isinstance(value, torch.Tensor) and value.is_inference()
        if not (self._grad_mode.inference or self._inference):
            return False
        storage = storage_of(node)
        for argument in node.all_input_nodes:
            if storage is not None and storage == storage_of(argument):
                return argument in self._inference  # a view is what it is of, in either mode
        return self._grad_mode.inference

    def recorded(self, value: V) -> V:
        """The value as the node being lifted has it: detached if no gradients are recorded there."""
        return value if self.records_gradients else self.detach(value)

    def detach(self, value: V) -> V:
        if isinstance(value, MatrixValue):
            return replace(value, expr=self.detached(value.expr))
        row = self.detached(value.row) if value.row is not None else None
        return replace(value, poly=self.detached(value.poly), row=row)

    def detached(self, term: E) -> E:
        """A term without gradients. Atoms that require no gradient stay as they are."""
        return term.detached(frozenset(self._no_grad_ids))

    def product_dtypes(self, chain: Chain) -> set[torch.dtype]:
        """The dtypes in which the graph multiplies the factors of a chain, of its transpose, or of multiples of these; empty if it does
        not. For a scaled product fp16 is reported as fp32: fp16 may hold the scaled values, but not the factors themselves."""
        if self._product_dtypes is None:
            self._product_dtypes = {}
            products = [(term, gemm.node) for term, gemms in self.gemms.items() for gemm in gemms]
            # Products that are no matrix products, such as a column times a row.
            products += [(term, node) for term, nodes in self.nodes.items() for node in nodes if isinstance(term, Expr)]
            for term, node in products:
                if len(term.items) != 1:
                    continue
                (((scalars, factors), coefficient),) = term.items
                product = _either_way(factors)
                if any(self._product_held_by(operand) == product for operand in node.all_input_nodes):
                    continue  # the node only casts, views or scales a product that an operand has already
                tensor = tensor_of(node)
                dtype = torch.float32 if tensor is None else tensor.dtype
                if dtype == torch.float16 and (scalars or coefficient != 1.0):
                    dtype = torch.float32
                self._product_dtypes.setdefault(product, set()).add(dtype)
        return self._product_dtypes.get(_either_way(chain), set())

    def _product_held_by(self, node: fx.Node) -> frozenset[Any] | None:
        """The chain of which a node's value is a multiple; None if the value is not a single chain."""
        value = self.values.get(node)
        if not isinstance(value, MatrixValue) or len(value.expr.items) != 1:
            return None
        (((_, factors), _),) = value.expr.items
        return _either_way(factors)

    def requires_grad(self, term: Expr | Poly) -> bool:
        return any(self.atom_of(a).requires_grad and not a.detached for a in term.atoms())

    def norms_in(self, term: Expr | Poly) -> set[Atom]:
        """The norm atoms in a term, at any depth."""
        norms: set[Atom] = set()
        for atom in term.atoms():
            info = self.atom_of(atom)
            if info.kind == "norm":
                norms.add(Atom(atom.id))
            elif info.poly is not None:
                norms |= self.norms_in(info.poly)
            if info.norms:
                norms.update(map(Atom, info.norms))
        return norms


def _either_way(chain: Chain) -> frozenset[Any]:
    """A key that is equal for a chain and its transpose, detached or not."""

    def key(factor: Mat | Diag) -> Any:
        if isinstance(factor, Mat):
            return factor.atom.id, factor.transposed
        return tuple(sorted((atom.id, exponent) for atom, exponent in factor.mono))

    return frozenset(tuple(map(key, c)) for c in (chain, transpose_chain(chain)))


def _hands_back(node: fx.Node) -> bool:
    """Whether an operator returns its argument itself, as ``contiguous`` and ``to`` may. While no gradients are recorded, such a result
    still requires a gradient if the argument does; a computed result does not."""
    if canonical_name(node) == "dropout" and drops_nothing(node):
        return True  # a fake dropout returns another tensor
    result = tensor_of(node)
    return result is not None and any(tensor_of(argument) is result for argument in node.all_input_nodes)


def _refuses(_: fx.Node) -> bool:
    return False


def _spacing(dtype: torch.dtype) -> float:
    """The distance between neighbouring values of a dtype, near 1."""
    return float(torch.finfo(dtype).eps)
