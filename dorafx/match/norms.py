"""Is a norm a DoRA norm? Split ``‖W + Σ s·chain‖`` into the dense weight and two factors, or say what is in the way."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import fx

from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Atom, AtomInfo, Diag, Expr, Lifter, Mat
from dorafx.lift.algebra import Chain, Mono, is_ones
from dorafx.log.kinds import ReasonKind

from .near_misses import Reason, described, hidden_delta, unknown_delta, vanished


@dataclass(frozen=True)
class LowRank:
    """One chain of the delta, cut at its smallest inner dimension: ``coefficient · scalars · left · right``. In a column times
    a row, ``D(column)·𝟙·D(row)``, both sides include the matrix of ones: the left as a column of ones, the right as a row."""

    coefficient: float
    scalars: Mono
    left: Chain
    right: Chain
    rank: int


@dataclass(frozen=True)
class NormFactors:
    """``n = sqrt(eps + rowsum((W + Σ delta)²))``: what the factored norm of one site is computed from.

    Attributes:
        atom: stands for the norm in terms.
        info: what the lifter knows of it: side, epsilon, the nodes that compute it.
        weight: ``W [d_out, d_in]``.
        weight_coefficient: what W is multiplied by.
        delta: the low-rank products.
        d_out, d_in: rows and columns; of a norm by columns those of the transpose.
        batch: how many weights there are, of a batch of them; None for a single one.
    """

    atom: Atom
    info: AtomInfo
    weight: Mat
    weight_coefficient: float
    delta: tuple[LowRank, ...]
    d_out: int
    d_in: int
    batch: int | None = None

    @property
    def rank(self) -> int:
        """Of all low-rank products together."""
        return sum(part.rank for part in self.delta)

    @property
    def dense_atom(self) -> Atom:
        """What stands for W in terms."""
        return self.weight.atom


def _size(lift: Lifter, mat: Mat) -> tuple[int, int] | None:
    info = lift.atom_of(mat.atom)
    if info.kind == "selection":
        return (info.rows[1], sum(info.rows)) if mat.transposed else (sum(info.rows), info.rows[1])
    node = info.node
    tensor = tensor_of(node)
    if tensor is None or not all(isinstance(s, int) for s in tensor.shape):
        return None
    if tensor.dim() < 2:
        return None
    if info.kind == "batch":
        if tensor.dim() != 3:
            return None
        rows, cols = (int(size) for size in tensor.shape[1:])
        return (cols, rows) if mat.transposed else (rows, cols)
    cut = 1 if info.kind == "filter" else tensor.dim() - 1
    if cut > 1 and not lift.weights.is_weight(mat.atom):
        return None  # activations
    rows, cols = (math.prod(int(s) for s in part) for part in (tensor.shape[:cut], tensor.shape[cut:]))
    return (cols, rows) if mat.transposed else (rows, cols)


def split_norm(lift: Lifter, atom: Atom) -> NormFactors | Reason | None:
    """The factors of a norm atom; a :class:`Reason` for a near miss; None for a norm that has nothing to do with DoRA
    (of one matrix, a weight norm or an RMS norm; of activations)."""
    split = _split(lift, atom)
    return None if isinstance(split, Reason) and not _is_of_a_weight(lift, atom) else split


def _is_of_a_weight(lift: Lifter, atom: Atom) -> bool:
    """Whether a norm is made of weights alone, or of a sum in which a weight stands by itself. Others are of activations, such as two
    layers' outputs that are added and normalised."""
    expr = lift.atom_of(atom).expr
    assert expr is not None
    alone = (chain[0] for (_, chain), _ in expr.items if len(chain) == 1)
    return lift.weights.is_made_of_weights(expr) or any(
        isinstance(f, Mat) and lift.weights.is_made_of_weights(Expr.mat(f.atom)) for f in alone
    )


def _split(lift: Lifter, atom: Atom) -> NormFactors | Reason | None:
    info = lift.atom_of(atom)
    assert info.expr is not None
    expr = info.expr if info.side == "row" else info.expr.transposed()
    if expr.vanished:
        adapted = (
            expr.items
            and lift.weights.is_parameter_term(expr)
            and all(lift.atom_of(v.atom).parameter for v in expr.vanished)
        )
        return vanished(lift, expr.vanished, _site(info)) if adapted else None
    if len(expr.items) < 2:
        chains: list[Chain] = [chain for (_, chain), _ in expr.items if len(chain) == 1]
        return hidden_delta(lift, info, chains) if lift.weights.is_parameter_term(expr) else None
    dense: list[tuple[Chain, float]] = []
    delta: list[LowRank] = []
    for (scalars, chain), c in expr.items:
        mats = [f for f in chain if isinstance(f, Mat)]
        ones = [i for i, f in enumerate(chain) if is_ones(f)]
        if ones and 0 < ones[0] < len(chain) - 1:
            delta.append(LowRank(c, scalars, chain[: ones[0] + 1], chain[ones[0] :], 1))  # a column times a row
            continue
        if len(mats) == 1 and not scalars:
            dense.append((chain, c))
            continue
        if len(mats) < 2:
            # A number before a delta is not what is wrong with it.
            alone: list[Chain] = [part for (_, part), _ in expr.items if len(part) == 1]
            hidden = hidden_delta(lift, info, [chain]) or unknown_delta(lift, alone)
            if hidden is not None and len(chain) == 1:
                return hidden
            operands = _operand_names(lift, [chain], scalars)
            what = f" ({operands})" if operands else ""
            return Reason(
                f"the norm's operand has a scaled or diagonal part{what} besides the weight",
                _site(info),
                kind=ReasonKind.SCALED_WEIGHT,
            )
        part = _cut(lift, chain, c, scalars)
        if part is None:
            if any(map(is_ones, chain)):
                return Reason("a factor of the delta is one row repeated", _site(info), kind=ReasonKind.NOT_EMITTED)
            what = "a factor of the delta has a symbolic or non-matrix shape"
            return Reason(what, _site(info), kind=ReasonKind.SYMBOLIC_SHAPE)
        delta.append(part)
    if not delta:
        chains = [chain for chain, _ in dense]
        hidden = hidden_delta(lift, info, chains)
        return hidden or (unknown_delta(lift, chains) if lift.weights.is_made_of_weights(expr) else None)
    if len(dense) != 1:
        operands = _operand_names(lift, [chain for chain, _ in dense])
        what = f"{len(dense)} dense matrices ({operands})" if dense else "no dense weight"
        return Reason(
            f"the norm is of a sum with {what} beside the low-rank product; one is supported",
            _site(info),
            kind=ReasonKind.OTHER_SUMMANDS,
        )
    ((weight, c),) = dense
    if any(isinstance(f, Diag) for f in weight):
        what = "the weight inside the norm is itself scaled by a vector"
        return Reason(what, _site(info), kind=ReasonKind.SCALED_WEIGHT)
    (mat,) = weight
    assert isinstance(mat, Mat)
    size = _size(lift, mat)
    if size is None:
        what = "the weight inside the norm has a symbolic shape or is not a matrix"
        return Reason(what, _site(info), kind=ReasonKind.SYMBOLIC_SHAPE)
    if sum(part.rank for part in delta) >= min(size) and not lift.weights.is_weight(mat.atom):
        return None  # activations: a residual stream plus a layer's output, normalised
    at = lift.atom_of(mat.atom)
    batch = tensor_of(at.node) if at.kind == "batch" else None
    return NormFactors(atom, info, mat, c, tuple(delta), *size, None if batch is None else int(batch.shape[0]))


def _operand_names(lift: Lifter, chains: list[Chain], scalars: Mono = ()) -> str:
    """What chains are made of: the graph's inputs by name, everything else with its operator and where it is computed."""
    atoms = [
        atom for chain in chains for f in chain for atom in ([f.atom] if isinstance(f, Mat) else [a for a, _ in f.mono])
    ]
    nodes = [lift.atom_of(atom).node for atom in (*(a for a, _ in scalars), *atoms)]
    return ", ".join(dict.fromkeys(described(node) for node in nodes if node is not None))


def _cut(lift: Lifter, chain: Chain, c: float, scalars: Mono) -> LowRank | None:
    """Cut a chain where its inner dimension is smallest."""
    last = chain[-1]
    if is_ones(last):
        return None  # terms do not record how many columns it has
    best: tuple[int, int] | None = None
    positions = [i for i, f in enumerate(chain) if isinstance(f, Mat)]
    for i in positions[:-1]:
        factor = chain[i]
        assert isinstance(factor, Mat)
        size = _size(lift, factor)
        if size is None:
            return None
        if best is None or size[1] < best[0]:
            best = (size[1], i + 1)
    assert best is not None
    return LowRank(c, scalars, chain[: best[1]], chain[best[1] :], best[0])


def _site(info: AtomInfo) -> fx.Node | None:
    return info.sites[0] if info.sites else None
