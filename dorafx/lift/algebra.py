"""The term algebra: what a graph computes, in a normal form that does not depend on how it was written.

Two kinds of terms are enough for DoRA.

* :class:`Poly`, a commutative (Laurent) polynomial in vectors and scalars: ``m·n⁻¹ - 1``. Products are elementwise.
* :class:`Expr`, a sum of *chains*. A chain is a matrix product of factors, ``x · Wᵀ · D(m·n⁻¹)``, where ``D(v)`` is the
  diagonal matrix of a vector. Scaling rows or columns is a product with a diagonal, a transpose reverses a chain, the
  identity is the empty chain, and a bias is ``𝟙 · D(b)`` with ``𝟙`` a matrix of ones. So
  ``linear(linear(eye, A), B).T`` and ``B @ A`` are the same object, and so are the delta and the direct composition.

Indeterminates are :class:`Atom` s. ``detach`` is pushed down to them: an atom and its detached twin are two
indeterminates of equal value. Two polynomials that are equal in this algebra therefore agree in value *and* in every
derivative, which is what makes a rewrite by algebra preserve gradient flow without a separate argument.

A program is not quite such a polynomial. ``0·p``, ``b - b`` and ``u/u`` still give ``p``, ``b`` and ``u`` a gradient of zeros, where a
program without the term gives them none; and they are NaN where these are infinite or zero. So a term remembers what *vanished* from
it, unless something left in it has the same gradient and is NaN in the same places (``0·W + W`` is NaN where ``W`` is infinite). Such a
term is not equal to a term from which nothing vanished.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

# Products are distributed over sums, so without bounds terms could grow exponentially; with them the pass is linear in the number of
# nodes. A DoRA layer with a dropout, a bias and three summed low-rank chains has 9 terms of at most 6 factors.
MAX_TERMS = 24
MAX_FACTORS = 12
_MAX_VANISHED = 64


class TooComplex(Exception):
    """A term exceeds the bounds; the lifter makes an atom of the node instead."""


class Atom(NamedTuple):
    """An indeterminate: the value number of a node, a norm, or a function of other terms."""

    id: int
    detached: bool = False


ONES = Atom(0)
"""The matrix of ones whose product with ``D(b)`` broadcasts a bias over tokens."""

Mono = tuple[tuple[Atom, int], ...]
"""A commutative monomial: atoms with non-zero integer exponents, sorted."""


class Mat(NamedTuple):
    """A matrix factor of a chain."""

    atom: Atom
    transposed: bool = False


class Diag(NamedTuple):
    """A diagonal factor ``D(v)`` of a chain, ``v`` a monomial of vectors."""

    mono: Mono


Factor = Mat | Diag
Chain = tuple[Factor, ...]


class Vanished(NamedTuple):
    """An indeterminate that a program reads although it is in no term any more: it was multiplied by zero, or cancelled.

    ``divisor``: it was a divisor and cancelled: where it is zero, the program's value is NaN.
    ``zeroed``: it was multiplied by zero: where it is infinite, the program's value is NaN.
    """

    atom: Atom
    divisor: bool = False
    zeroed: bool = False


Lost = frozenset[Vanished]
_NOTHING: Lost = frozenset()


def _inverse(mono: Mono) -> Mono:
    return tuple((atom, -e) for atom, e in mono)


def _of_mono(mono: Mono) -> Iterator[Vanished]:
    for atom, exponent in mono:
        yield Vanished(atom)
        if exponent < 0:
            yield Vanished(atom, True)


def _of_chain(chain: Chain) -> Iterator[Vanished]:
    for factor in chain:
        if isinstance(factor, Diag):
            yield from _of_mono(factor.mono)
        elif factor.atom.id != ONES.id:
            yield Vanished(factor.atom)


def _remaining(lost: Iterable[Vanished], left: Iterable[Vanished]) -> Lost:
    """What of ``lost`` is not represented by anything ``left`` in a term. A detached twin has the same value, but no gradient."""
    lost = frozenset(lost)
    if not lost:
        return _NOTHING
    there = frozenset(left)

    def stands(v: Vanished) -> bool:
        if v.zeroed:
            return False
        # No gradient depends on whether something was a divisor.
        needs_gradient = not v.atom.detached and not v.divisor
        twins = (v.atom,) if needs_gradient else (Atom(v.atom.id), Atom(v.atom.id, True))
        return any(Vanished(twin, v.divisor) in there for twin in twins)

    lost = frozenset(v for v in lost if not stands(v))
    if len(lost) > _MAX_VANISHED:
        raise TooComplex
    return lost


def _detached_lost(lost: Lost, keep: frozenset[int]) -> Lost:
    return frozenset(v if v.atom.id in keep else v._replace(atom=Atom(v.atom.id, True)) for v in lost)


def _zeroed(parts: Iterable[Vanished]) -> Lost:
    return frozenset(v._replace(zeroed=True) for v in parts)


def _mono_mul(a: Mono, b: Mono, lost: set[Vanished]) -> Mono:
    """The product; ``lost`` receives what cancels."""
    if not a:
        return b
    if not b:
        return a
    exponents = dict(a)
    for atom, exponent in b:
        before = exponents.get(atom, 0)
        total = exponents[atom] = before + exponent
        if before * exponent < 0 and total >= 0:
            lost.add(Vanished(atom, True))
            if not total:
                lost.add(Vanished(atom))
    return tuple(sorted((atom, e) for atom, e in exponents.items() if e))


def _push(chain: list[Factor], factor: Factor, lost: set[Vanished]) -> None:
    """Append a factor, merging neighbouring diagonals; ``lost`` receives what cancels."""
    if isinstance(factor, Diag):
        if not factor.mono:
            return
        if chain and isinstance(chain[-1], Diag):
            merged = _mono_mul(chain[-1].mono, factor.mono, lost)
            chain.pop()
            if merged:
                chain.append(Diag(merged))
            return
    elif chain and isinstance(chain[-1], Mat) and factor.atom.id == chain[-1].atom.id == ONES.id:
        raise TooComplex  # 𝟙·𝟙 is a multiple of 𝟙 by the size of the inner dimension, which no term has
    chain.append(factor)


def is_ones(factor: Factor) -> bool:
    """Whether a factor is a matrix of ones, transposed or not."""
    return isinstance(factor, Mat) and factor.atom == ONES


def count_matrices(chain: Chain) -> int:
    """How many of a chain's factors are matrices: two of them make a product."""
    return sum(isinstance(factor, Mat) for factor in chain)


def transpose_chain(chain: Chain) -> Chain:
    """``(P·Q)ᵀ = Qᵀ·Pᵀ``; diagonals are their own transposes."""
    return tuple(Mat(f.atom, not f.transposed) if isinstance(f, Mat) else f for f in reversed(chain))


@dataclass(frozen=True)
class Poly:
    """A commutative polynomial over vectors and scalars, as ``{monomial: coefficient}`` without zero coefficients, and what
    vanished from it."""

    items: tuple[tuple[Mono, float], ...]
    vanished: Lost = _NOTHING

    @staticmethod
    def of(terms: dict[Mono, float], lost: Iterable[Vanished] = ()) -> Poly:
        if len(terms) > MAX_TERMS:
            raise TooComplex
        items = tuple(sorted((m, c) for m, c in terms.items() if c != 0))
        lost = {*lost, *(v for m, c in terms.items() if c == 0 for v in _of_mono(m))}
        return Poly(items, _remaining(lost, (v for m, _ in items for v in _of_mono(m))) if lost else _NOTHING)

    @staticmethod
    def const(value: float) -> Poly:
        return Poly.of({(): float(value)})

    @staticmethod
    def var(atom: Atom) -> Poly:
        return Poly((((((atom, 1),)), 1.0),))

    def __add__(self, other: Poly) -> Poly:
        terms = dict(self.items)
        for mono, c in other.items:
            terms[mono] = terms.get(mono, 0.0) + c
        return Poly.of(terms, self.vanished | other.vanished)

    def __mul__(self, other: Poly) -> Poly:
        terms: dict[Mono, float] = {}
        lost = {*self.vanished, *other.vanished}
        for m1, c1 in self.items:
            for m2, c2 in other.items:
                mono = _mono_mul(m1, m2, lost)
                terms[mono] = terms.get(mono, 0.0) + c1 * c2
        if not self.items or not other.items:
            lost |= _zeroed((*self.parts(), *other.parts()))
        return Poly.of(terms, lost)

    def scaled(self, factor: float) -> Poly:
        if not factor:
            return Poly.of({}, self.vanished | _zeroed(self.parts()))
        return Poly.of({m: c * factor for m, c in self.items}, self.vanished)

    @property
    def constant(self) -> float | None:
        """The value if this is a constant from which nothing vanished; else None."""
        if self.vanished:
            return None
        if not self.items:
            return 0.0
        if len(self.items) == 1 and not self.items[0][0]:
            return self.items[0][1]
        return None

    @property
    def is_monomial(self) -> bool:
        return len(self.items) == 1 and not self.vanished

    def reciprocal(self) -> Poly | None:
        """``1/self`` for a monomial; None for a sum (the lifter makes an atom of its reciprocal)."""
        if not self.is_monomial:
            return None
        mono, c = self.items[0]
        return Poly(((_inverse(mono), 1.0 / c),))

    def ratio_to(self, other: Poly) -> Poly | None:
        """The monomial ``q`` with ``self = q · other``, or None. It is used to find out whether all parts share one scaling. The program
        does not compute this quotient, so nothing vanishes."""
        if not self.items or len(self.items) != len(other.items):
            return None
        first, k = other.items[0]
        for mono, c in self.items:
            quotient = Poly(((_mono_mul(mono, _inverse(first), set()), c / k),))
            product = dict((other * quotient).items)
            if all(abs(product.get(m, 0.0) - v) <= 1e-9 * abs(v) for m, v in self.items) and len(product) == len(
                self.items
            ):
                return quotient
        return None

    def detached(self, keep: frozenset[int] = frozenset()) -> Poly:
        terms: dict[Mono, float] = {}
        lost = set(_detached_lost(self.vanished, keep))
        for mono, c in self.items:
            m = _detach_mono(mono, keep, lost)
            terms[m] = terms.get(m, 0.0) + c
        return Poly.of(terms, lost)

    def atoms(self) -> Iterator[Atom]:
        for mono, _ in self.items:
            for atom, _ in mono:
                yield atom

    def parts(self) -> Iterator[Vanished]:
        """What would vanish with this."""
        for mono, _ in self.items:
            yield from _of_mono(mono)


def _detach_mono(mono: Mono, keep: frozenset[int], lost: set[Vanished]) -> Mono:
    out: Mono = ()
    for atom, e in mono:
        out = _mono_mul(out, ((atom if atom.id in keep else Atom(atom.id, True), e),), lost)
    return out


@dataclass(frozen=True)
class Expr:
    """A sum of chains: ``Σ c · scalars · chain``, as sorted ``((scalars, chain), c)`` items, and what vanished from it."""

    items: tuple[tuple[tuple[Mono, Chain], float], ...]
    vanished: Lost = _NOTHING

    @staticmethod
    def of(terms: dict[tuple[Mono, Chain], float], lost: Iterable[Vanished] = ()) -> Expr:
        if len(terms) > MAX_TERMS or any(len(chain) > MAX_FACTORS for _, chain in terms):
            raise TooComplex
        items = tuple(sorted(((k, c) for k, c in terms.items() if c != 0), key=repr))
        lost = set(lost)
        for (scalars, chain), c in terms.items():
            if c == 0:
                lost.update(_of_mono(scalars), _of_chain(chain))
        expr = Expr(items)
        return Expr(items, _remaining(lost, expr.parts())) if lost else expr

    @staticmethod
    def chain(factors: Iterable[Factor], coefficient: float = 1.0) -> Expr:
        out: list[Factor] = []
        lost: set[Vanished] = set()
        for f in factors:
            _push(out, f, lost)
        return Expr.of({((), tuple(out)): coefficient}, lost) if lost else Expr(((((), tuple(out)), coefficient),))

    @staticmethod
    def mat(atom: Atom) -> Expr:
        return Expr.chain((Mat(atom),))

    @staticmethod
    def broadcast(vector: Poly) -> Expr:
        """``𝟙 · D(vector)``: a row vector added to every token."""
        return Expr.chain((Mat(ONES),)).right_diag(vector)

    @property
    def holds_product(self) -> bool:
        """Whether a product of two matrices is in the sum."""
        return any(count_matrices(chain) > 1 for (_, chain), _ in self.items)

    def without(self, lost: Lost) -> Expr:
        """The same value, in a program in which ``lost`` vanished too."""
        return Expr.of(dict(self.items), self.vanished | lost) if lost else self

    def __add__(self, other: Expr) -> Expr:
        terms = dict(self.items)
        for key, c in other.items:
            terms[key] = terms.get(key, 0.0) + c
        return Expr.of(terms, self.vanished | other.vanished)

    def scaled(self, factor: float) -> Expr:
        if not factor:
            return Expr.of({}, self.vanished | _zeroed(self.parts()))
        return Expr.of({k: c * factor for k, c in self.items}, self.vanished)

    def times_scalar(self, scalar: Poly) -> Expr:
        terms: dict[tuple[Mono, Chain], float] = {}
        lost = {*self.vanished, *scalar.vanished}
        for (s, chain), c in self.items:
            for mono, k in scalar.items:
                key = (_mono_mul(s, mono, lost), chain)
                terms[key] = terms.get(key, 0.0) + c * k
        if not self.items or not scalar.items:
            lost |= _zeroed((*self.parts(), *scalar.parts()))
        return Expr.of(terms, lost)

    def __matmul__(self, other: Expr) -> Expr:
        terms: dict[tuple[Mono, Chain], float] = {}
        lost = {*self.vanished, *other.vanished}
        for (s1, left), c1 in self.items:
            for (s2, right), c2 in other.items:
                chain = list(left)
                for i, factor in enumerate(right):
                    _push(chain, factor, lost)
                    if i and isinstance(factor, Mat):
                        chain.extend(right[i + 1 :])
                        break
                key = (_mono_mul(s1, s2, lost), tuple(chain))
                terms[key] = terms.get(key, 0.0) + c1 * c2
        if not self.items or not other.items:
            lost |= _zeroed((*self.parts(), *other.parts()))
        return Expr.of(terms, lost)

    def left_diag(self, vector: Poly) -> Expr:
        return self._diag(vector, left=True)

    def right_diag(self, vector: Poly) -> Expr:
        return self._diag(vector, left=False)

    def _diag(self, vector: Poly, left: bool) -> Expr:
        terms: dict[tuple[Mono, Chain], float] = {}
        lost = {*self.vanished, *vector.vanished}
        for (s, chain), c in self.items:
            for mono, k in vector.items:
                out: list[Factor] = []
                for factor in (Diag(mono), *chain) if left else (*chain, Diag(mono)):
                    _push(out, factor, lost)
                key = (s, tuple(out))
                terms[key] = terms.get(key, 0.0) + c * k
        if not self.items or not vector.items:
            lost |= _zeroed((*self.parts(), *vector.parts()))
        return Expr.of(terms, lost)

    def transposed(self) -> Expr:
        return Expr.of({(s, transpose_chain(chain)): c for (s, chain), c in self.items}, self.vanished)

    def detached(self, keep: frozenset[int] = frozenset()) -> Expr:
        terms: dict[tuple[Mono, Chain], float] = {}
        lost = set(_detached_lost(self.vanished, keep))
        for (s, chain), c in self.items:
            factors: list[Factor] = []
            for f in chain:
                if isinstance(f, Diag):
                    factors.append(Diag(_detach_mono(f.mono, keep, lost)))
                else:
                    atom = f.atom if f.atom.id in keep else Atom(f.atom.id, True)
                    factors.append(Mat(atom, f.transposed))
            key = (_detach_mono(s, keep, lost), tuple(factors))
            terms[key] = terms.get(key, 0.0) + c
        return Expr.of(terms, lost)

    def parts(self) -> Iterator[Vanished]:
        """What would vanish with this."""
        for (scalars, chain), _ in self.items:
            yield from _of_mono(scalars)
            yield from _of_chain(chain)

    def atoms(self) -> Iterator[Atom]:
        for (scalars, chain), _ in self.items:
            for atom, _e in scalars:
                yield atom
            for f in chain:
                if isinstance(f, Mat):
                    yield f.atom
                else:
                    for atom, _e in f.mono:
                        yield atom
