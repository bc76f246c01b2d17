"""Near misses: what looks like DoRA and is left alone, with a reason that a person can act on."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import fx

from dorafx.graphs.inputs import is_leaf
from dorafx.graphs.operators import CONVOLUTIONS, arguments, canonical_name
from dorafx.graphs.provenance import operator_name, source_of
from dorafx.graphs.tensors import tensor_of
from dorafx.graphs.writes import memories
from dorafx.lift import AtomInfo, Lifter, Mat, MatrixValue, Value, holds_product
from dorafx.lift.algebra import Chain, Expr, Poly, Vanished, count_matrices
from dorafx.lift.values import VectorValue
from dorafx.log.kinds import ReasonKind

from .ancestors import is_behind

_NORMS = ("norm", "linalg_norm", "vector_norm")
_PRODUCTS = ("matmul", "bmm", "einsum")
_MOVES = ("view", "permute", "transpose", "t", "cast", "identity", "detach", "data", "getattr", "getitem", "expand")
_DEPTH = 6


@dataclass(frozen=True)
class Reason:
    """Why something that looked like DoRA was left alone.

    Attributes:
        text: names the operator, the operand that differs and the source line, as far as each is known.
        node: where.
        specific: whether it says more than that a form did not apply; a specific reason replaces one that is not.
        kind: for programs that read the log, and for what to do about it.
    """

    text: str
    node: fx.Node | None = None
    specific: bool = True
    kind: ReasonKind = ReasonKind.FORM


def _at(node: fx.Node) -> str:
    return source_of(node) or node.name


def described(node: fx.Node) -> str:
    """An operand as a person would find it: an input by its name, a value by its operator and where it is made."""
    return f"`{node.name}`" if is_leaf(node) else f"{operator_name(node)} at {_at(node)}"


def operator_at(node: fx.Node) -> str:
    """A node by its operator and where it is made."""
    return f"operator {operator_name(node)} at {_at(node)}"


def hidden_delta(lift: Lifter, info: AtomInfo, chains: list[Chain]) -> Reason | None:
    """A norm of ``W + something`` where the something is one unknown value: name the operator that hides the product."""
    for chain in chains:
        for factor in chain:
            node = lift.atom_of(factor.atom).node if isinstance(factor, Mat) else None
            if node is not None and lift.atom_of(factor.atom).kind == "batch":  # type: ignore[union-attr]
                node = _origin(node, lift.batches)  # rows that were cut into a batch: what made them hides the product
            if node is None or node.op not in ("call_function", "call_method"):
                continue
            rounding = lift.roundings.get(node)
            if rounding is not None and holds_product(lift.values.get(node)):
                dtype = str(rounding).removeprefix("torch.")
                return Reason(
                    f"the low-rank product made at {_at(node)} is rounded to {dtype} and then read with more digits; a rewrite "
                    "would leave the rounding out: cast the factors, or nothing",
                    node,
                    kind=ReasonKind.ROUNDED_PRODUCT,
                )
            if is_behind(lift, node, added=len(chains) > 1):
                if node in lift.written:
                    when = "before" if _is_written_before(lift, node, info.sites) else "after"
                    return Reason(
                        f"the sum made at {_at(node)} is written in place {when} the norm is taken",
                        node,
                        kind=ReasonKind.WRITTEN_IN_PLACE,
                    )
                for site in info.sites[:1]:
                    if (per_token := _delta_of_each_token(lift, site, node)) is not None:
                        return per_token
                return _cut_rows(node) or Reason(
                    f"{operator_at(node)} stands between the low-rank product and the norm",
                    node,
                    kind=ReasonKind.HIDDEN_DELTA,
                )
    return None


def _is_written_before(lift: Lifter, node: fx.Node, sites: list[fx.Node]) -> bool:
    """Whether the memory of a value is written before the first of some nodes that read it."""
    order = {n: i for i, n in enumerate(lift.graph.nodes)}
    first = min(map(order.__getitem__, sites), default=len(order))
    writers = next((memory.writers for memory in memories(lift.graph) if node in memory.values), [])
    return not writers or order[writers[0]] <= first


def vanished(lift: Lifter, terms: Iterable[Vanished], node: fx.Node | None) -> Reason:
    """The reason for terms that are zero: a rewrite would leave out their gradients (zeros) and their NaN."""
    nodes = sorted({n.name: n for v in terms if (n := lift.atom_of(v.atom).node) is not None}.items())
    what = ", ".join(described(n) for _, n in nodes) or "a part of it"
    return Reason(
        f"{what} is multiplied by zero, or cancels out: without it the rewrite would lose its gradient (of zeros) and its NaN; "
        "leave the term out of the program where neither is needed",
        node,
        kind=ReasonKind.VANISHING_TERM,
    )


def _cut_rows(node: fx.Node) -> Reason | None:
    """The reason for a reshape that splits each row of a product into several, as in PEFT's delta of a grouped convolution."""
    after, before = tensor_of(node), tensor_of(node.all_input_nodes[0])
    if canonical_name(node) != "view" or before is None or after is None or before.dim() != 2:
        return None
    rows, cut = before.shape[0], after.shape[0]
    if not isinstance(rows, int) or not isinstance(cut, int) or not rows or cut <= rows or cut % rows:
        return None
    return Reason(
        f"{operator_at(node)} cuts each row of the low-rank product into {cut // rows} (a grouped "
        f"convolution): by row it is a product of {cut // rows} times the rank, dearer than the dense one",
        node,
        kind=ReasonKind.GROUPED_CONVOLUTION,
    )


def unknown_delta(lift: Lifter, chains: list[Chain]) -> Reason | None:
    """A norm of ``W + something`` where the something is expanded from smaller parameters by an operator that is not a product of
    matrices: a Kronecker product, a scatter, a transform."""
    nodes = [lift.atom_of(chain[0].atom).node for chain in chains if len(chain) == 1 and isinstance(chain[0], Mat)]
    for node in nodes if len(nodes) > 1 and len(nodes) == len(chains) else ():
        tensor = tensor_of(node)
        if node in lift.batches and all((t := tensor_of(other)) is not None and t.dim() == 3 for other in nodes):
            return None  # known as a batch, and not as one matrix
        if node is None or tensor is None or node.op not in ("call_function", "call_method"):
            continue
        if node in lift.written:
            return Reason(
                f"the delta at {_at(node)} is written in place, and no product of factors",
                node,
                kind=ReasonKind.WRITTEN_IN_PLACE,
            )
        leaves = [t for leaf in _leaves(node) if (t := tensor_of(leaf)) is not None]
        if leaves and all(str(t.numel()) != str(tensor.numel()) for t in leaves):
            origin = _origin(node)
            dtypes = {
                str(t.dtype).removeprefix("torch.") for a in origin.all_input_nodes if (t := tensor_of(a)) is not None
            }
            if canonical_name(origin) in _PRODUCTS and len(dtypes) > 1:
                return Reason(
                    f"{operator_at(origin)} multiplies factors of different dtypes ({', '.join(sorted(dtypes))})",
                    origin,
                    kind=ReasonKind.MIXED_DTYPES,
                )
            return Reason(
                f"{operator_at(origin)} makes the delta, and is not known as a product of low-rank "
                "factors, which is all that a factored norm serves",
                origin,
                kind=ReasonKind.UNKNOWN_DELTA,
            )
    return None


def _leaves(node: fx.Node) -> set[fx.Node]:
    """The graph's inputs and attributes that a node is made of."""
    leaves: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if is_leaf(current):
            leaves.add(current)
        stack.extend(current.all_input_nodes)
    return leaves


def unknown_consumer(lift: Lifter, info: AtomInfo, atom_id: int) -> Reason | None:
    """The operator in which a norm gets lost on its way to the output; None where nobody reads it."""
    stack = list(info.sites)
    seen: set[fx.Node] = set()
    while stack:
        node = stack.pop(0)
        if node in seen:
            continue
        seen.add(node)
        for user in node.users:
            if user.op == "output":
                return Reason(
                    "the norm itself is an output of the program, and scales nothing in it",
                    node,
                    kind=ReasonKind.NORM_IS_OUTPUT,
                )
            value = lift.noted(user)
            term = value.expr if isinstance(value, MatrixValue) else value.poly if value is not None else None
            if (canonical_name(user) or "").endswith("_like"):
                continue  # takes the shape alone
            if term is not None and any(a.id == atom_id for a in lift.norms_in(term)):
                stack.append(user)
            elif value is not None:
                return _in_groups(user) or Reason(
                    f"{operator_at(user)} stands between the norm and what it scales",
                    user,
                    kind=ReasonKind.UNKNOWN_CONSUMER,
                )
    return None


def _in_groups(node: fx.Node) -> Reason | None:
    """What to say of a convolution with groups that takes a merged weight."""
    args = arguments(node, *CONVOLUTIONS[name]) if (name := canonical_name(node)) in CONVOLUTIONS else {}
    groups = args.get("groups", 1)
    if groups == 1:
        return None
    return Reason(
        f"{operator_at(node)} multiplies the merged weight in {groups} groups, which is no product with one matrix of patches: convolve with the weight and with the low-rank factors apart, and scale their sum",
        node,
        kind=ReasonKind.GROUPED_CONVOLUTION,
    )


def unknown_norms(lift: Lifter) -> Iterator[tuple[fx.Node, Reason]]:
    """Nodes that reduce an adapted weight ``W + s·B·A`` to a vector, but not by its row or column 2-norm."""
    rootless = _rootless_squares(lift)
    for node in lift.graph.nodes:
        if node.op not in ("call_function", "call_method") or not node.all_input_nodes:
            continue
        reason = _lost_squares(lift, node, rootless) if rootless else None
        reason = reason or _unknown_norm(lift, node)
        if reason is not None and node in lift.written:
            reason = Reason(f"the norm at {_at(node)} is written in place", node, kind=ReasonKind.WRITTEN_IN_PLACE)
        if reason is not None:
            yield node, reason


def _unknown_norm(lift: Lifter, node: fx.Node) -> Reason | None:
    name = canonical_name(node)
    if (reason := _norm_of_experts(lift, node)) is not None:
        return reason
    if (
        name in _NORMS
        and node not in lift.batches
        and (reason := _delta_of_each_token(lift, node, node.all_input_nodes[0])) is not None
    ):
        return reason
    out, result = tensor_of(node), lift.values.get(node)
    if out is None or node in lift.batches or (result is not None and not _is_unknown(lift, result, node)):
        return None
    for source in (_moved(lift, argument) for argument in node.all_input_nodes):
        value, before = lift.value(source), tensor_of(source)
        if not isinstance(value, MatrixValue) or len(value.expr.items) < 2 or before is None:
            continue
        # Of all squares, or of some that are neither a row's nor a column's.
        of_squares = value.squared and name in ("sum", "mean") and not _is_vector_of(out.shape, before.shape)
        is_norm = name in _NORMS or of_squares
        looks_so = is_norm or _is_vector_of(out.shape, before.shape) or _is_named_a_norm(node)
        scalar = not out.dim() and not is_norm and not _is_named_a_norm(node)
        if not looks_so or scalar or not _is_adapted(lift, value.expr):
            continue
        if is_norm:
            return Reason(_what_norm(node, before), node, kind=ReasonKind.OTHER_NORM)
        does = "makes a vector of" if _is_vector_of(out.shape, before.shape) else "reads"
        what = f"{operator_at(node)} {does} the adapted weight"
        return Reason(f"{what}, and is not known as a norm", node, kind=ReasonKind.UNKNOWN_NORM)
    return _norm_of_unknown(lift, node) if name in _NORMS and node not in lift.batches else None


def _norm_of_unknown(lift: Lifter, node: fx.Node) -> Reason | None:
    """A norm along axes that are no matrix's, of a value that an operator makes of the adapted weight."""
    result, out, value = lift.values.get(node), tensor_of(node), lift.values.get(node.all_input_nodes[0])
    if result is None or out is None or not out.dim() or not _is_unknown(lift, result, node):
        return None
    atoms = list(value.expr.atoms()) if isinstance(value, MatrixValue) else []
    hidden = lift.atom_of(atoms[0]).node if len(atoms) == 1 else None
    if hidden is None or hidden.op not in ("call_function", "call_method"):
        return None
    if not is_behind(lift, hidden, added=False, near=0):
        return None
    return Reason(
        f"{operator_at(hidden)} stands between the low-rank product and the norm at {_at(node)}",
        hidden,
        kind=ReasonKind.HIDDEN_DELTA,
    )


def _norm_of_experts(lift: Lifter, node: fx.Node) -> Reason | None:
    """An operator that makes less of a batch of adapted weights, and gives no norm of each one's rows or columns."""
    name, out = canonical_name(node), tensor_of(node)
    if node in lift.batches or out is None:
        return None
    for argument in node.all_input_nodes:
        source = _origin(argument, lift.batches)
        value, before = lift.batches.get(source), tensor_of(source)
        if not isinstance(value, MatrixValue) or before is None or not _is_adapted(lift, value.expr):
            continue
        batch, rows, columns = before.shape
        vectors = [(batch, size, *ones) for size in (rows, columns) for ones in ((), (1,))] + [(batch, 1, columns)]
        is_norm = name in _NORMS or (value.squared and name in ("sum", "mean"))
        if is_norm and source is not argument:
            what = f"{operator_at(argument)} stands between the experts' adapted weights and the norm"
            return Reason(f"{what}: take it along the last axis of the batch", node, kind=ReasonKind.BATCHED_WEIGHTS)
        if is_norm:
            return Reason(_what_norm(node, before), node, kind=ReasonKind.OTHER_NORM)
        if tuple(out.shape) in vectors or _is_named_a_norm(node):
            what = f"{operator_at(node)} reads the adapted weights of the experts, and is not known as a norm"
            return Reason(what, node, kind=ReasonKind.UNKNOWN_NORM)
    return None


def _origin(node: fx.Node, known: Container[fx.Node] = ()) -> fx.Node:
    """What a value is a view or cast of, or the first on the way there that is known."""
    while node not in known and canonical_name(node) in _MOVES and node.all_input_nodes:
        node = node.all_input_nodes[0]
    return node


def _moved(lift: Lifter, node: fx.Node) -> fx.Node:
    """What a value is a view or cast of, as far as the lifter knows no term of it."""
    while canonical_name(node) in _MOVES and node.op in ("call_function", "call_method") and node.all_input_nodes:
        value = lift.value(node)
        if isinstance(value, MatrixValue) and not _is_unknown(lift, value, node):
            break
        node = node.all_input_nodes[0]
    return node


def _is_unknown(lift: Lifter, value: Value, node: fx.Node) -> bool:
    """Whether a node's value is an indeterminate that stands for the node."""
    return any(
        lift.atom_of(a).node is node for a in (value.expr if isinstance(value, MatrixValue) else value.poly).atoms()
    )


def _is_named_a_norm(node: fx.Node) -> bool:
    """Whether an operator's name is that of one that normalises and returns a matrix, or a power, the first step of a norm of another
    order."""
    return canonical_name(node) == "pow" or any(part in operator_name(node) for part in ("norm", "cosine", "dot"))


def _rootless_squares(lift: Lifter) -> set[int]:
    """Sums of squares of adapted weights whose root nobody takes, by the ids of their atoms."""
    rooted = {(info.expr, info.side) for info in lift.atoms if info.kind == "norm"}
    return {
        atom_id
        for atom_id, info in enumerate(lift.atoms)
        if info.kind == "sumsq"
        and info.expr is not None
        and (info.expr, info.side) not in rooted
        and _is_adapted(lift, info.expr)
    }


def _lost_squares(lift: Lifter, node: fx.Node, rootless: set[int]) -> Reason | None:
    """Whether an operator reads a sum of squares of the adapted weight before its root is taken, as a reduction over devices
    does."""
    value = lift.noted(node)
    if isinstance(value, VectorValue) and _of_norms(lift, value.poly):
        return None
    for argument in node.all_input_nodes:
        operand = lift.noted(argument)
        if isinstance(operand, VectorValue) and any(atom.id in rootless for atom in operand.poly.atoms()):
            return Reason(
                f"{operator_at(node)} reads the sum of squares of the adapted weight before its root is taken",
                node,
                kind=ReasonKind.SQUARES_READ,
            )
    return None


def _of_norms(lift: Lifter, term: Poly) -> bool:
    """Whether a term still holds a norm or a sum of squares, or something made of one."""
    stack = list(term.atoms())
    while stack:
        info = lift.atom_of(stack.pop())
        if info.kind in ("norm", "sumsq"):
            return True
        if info.poly is not None:
            stack.extend(info.poly.atoms())
    return False


def _delta_of_each_token(lift: Lifter, node: fx.Node, source: fx.Node) -> Reason | None:
    """A norm of ``W [d_out, d_in]`` plus products ``[.., d_out, d_in]``: as many weights as there are tokens."""
    total, inputs = tensor_of(source), source.all_input_nodes
    if canonical_name(source) not in ("add", "sub") or total is None or total.dim() < 3 or len(inputs) != 2:
        return None
    shape = list(map(str, total.shape[-2:]))  # sizes may be symbols: no guard on them
    sides = [(n, t) for n in inputs if (t := tensor_of(n)) is not None and list(map(str, t.shape[-2:])) == shape]
    weights = [n for n, t in sides if t.dim() == 2 and (is_leaf(n) or lift.weights.depends_on_parameters_only(n))]
    products = [n for n, t in sides if t.dim() > 2 and _is_product(n)]
    if not weights or not products:
        return None
    if all(map(lift.weights.depends_on_parameters_only, products)):
        return Reason(
            f"the delta added to the weight at {_at(source)} is a batch (its shape is {list(total.shape)}), and the weight has no such "
            "axis: expand it to the delta's shape",
            node,
            kind=ReasonKind.BATCHED_WEIGHTS,
        )
    return Reason(
        f"the delta added to the weight at {_at(source)} is another for each token (its shape is {list(total.shape)}): a factored "
        "norm serves one delta a layer",
        node,
        kind=ReasonKind.DELTA_PER_TOKEN,
    )


def _is_product(node: fx.Node) -> bool:
    """Whether a node is a product of matrices, scaled or moved about."""
    for _ in range(_DEPTH):
        name = canonical_name(node)
        if name in _PRODUCTS:
            return True
        if name not in (*_MOVES, "mul", "div") or not node.all_input_nodes:
            return False
        node = node.all_input_nodes[0]
    return False


def _what_norm(node: fx.Node, operand: torch.Tensor) -> str:
    order_name = "p" if "p" in node.kwargs else "ord"
    of_squares = canonical_name(node) not in _NORMS
    args = arguments(node, "input", "dim") if of_squares else arguments(node, "input", order_name, "dim")
    order = None if of_squares else args.get(order_name)
    if order not in (None, 2, 2.0, "fro"):
        return f"the norm at {_at(node)} is of order {order}: DoRA's is the 2-norm"
    if args.get("dim") is None or operand.dim() == 2:
        return f"the norm at {_at(node)} is of the whole weight: DoRA's is by row or by column"
    return f"the norm at {_at(node)} is over dimensions {args['dim']} of a weight of {operand.dim()}: DoRA's is by row or by column"


def _is_adapted(lift: Lifter, expr: Expr) -> bool:
    """Whether a term is a matrix of parameters plus a product of parameters."""
    if len(expr.items) < 2:
        return False
    lengths = [count_matrices(chain) for (_, chain), _ in expr.items]
    return 1 in lengths and max(lengths) > 1 and lift.weights.is_parameter_term(expr)


def _is_vector_of(shape: Iterable[object], matrix: Iterable[object]) -> bool:
    long = [size for size in shape if size != 1]
    return len(long) == 1 and long[0] in tuple(matrix)
