"""The term algebra: equal programs have equal terms, unequal ones do not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dorafx.lift import Atom, Diag, Expr, Mat, Poly
from dorafx.lift.algebra import MAX_TERMS, TooComplex, Vanished

X, W, A, B, M, N = (Atom(i) for i in range(1, 7))


def mat(atom: Atom) -> Expr:
    return Expr.mat(atom)


def test_identity_forward_is_the_product() -> None:
    eye = Expr.chain(())
    assert (eye @ mat(A).transposed() @ mat(B).transposed()).transposed() == mat(B) @ mat(A)


def test_delta_form_is_the_direct_form() -> None:
    inverse = Poly.var(N).reciprocal()
    assert inverse is not None
    g = Poly.var(M) * inverse
    base = mat(X) @ mat(W).transposed()
    lora = mat(X) @ mat(A).transposed() @ mat(B).transposed()
    delta_form = base + base.right_diag(g + Poly.const(-1.0)) + lora.right_diag(g).scaled(2.0)
    assert delta_form == (base + lora.scaled(2.0)).right_diag(g)
    assert delta_form != (base + lora.scaled(2.5)).right_diag(g)


def test_merged_weight_is_the_direct_form() -> None:
    g = Poly.var(M)
    merged = (mat(W) + mat(B) @ mat(A)).left_diag(g)
    direct = (mat(X) @ mat(W).transposed() + mat(X) @ mat(A).transposed() @ mat(B).transposed()).right_diag(g)
    assert mat(X) @ merged.transposed() == direct


def test_a_detached_atom_is_another_indeterminate() -> None:
    keep = frozenset({W.id})
    assert mat(B).detached(keep) != mat(B)
    assert mat(W).detached(keep) == mat(W)
    assert (mat(B) + mat(B).detached(keep).scaled(-1.0)).items != ()


def test_ratio() -> None:
    g = Poly.var(M) + Poly.const(2.0)
    ratio = g.scaled(3.0).ratio_to(g)
    assert ratio is not None
    assert ratio.constant == 3.0
    assert (g + Poly.var(N)).ratio_to(g) is None
    assert (Poly.var(M) + Poly.const(1.0)).ratio_to(g) is None


def test_growth_is_bounded() -> None:
    wide = Poly(())
    with pytest.raises(TooComplex):
        for i in range(MAX_TERMS + 1):
            wide = wide + Poly.var(Atom(100 + i))
    with pytest.raises(TooComplex):
        Expr.of({((), tuple(Mat(Atom(i)) for i in range(20))): 1.0})


polys = st.lists(st.tuples(st.sampled_from([X, M, N]), st.integers(-2, 2), st.integers(-3, 3)), max_size=3).map(
    lambda items: sum((Poly.of({((a, e),) if e else (): float(c)}) for a, e, c in items), Poly(()))
)


@given(polys, polys, polys)
def test_polynomials_are_a_commutative_ring(p: Poly, q: Poly, r: Poly) -> None:
    assert p + q == q + p
    assert p * q == q * p
    assert (p * (q + r)).items == (p * q + p * r).items
    assert (p + p.scaled(-1.0)).items == ()


@given(polys, polys)
def test_nothing_vanishes_without_a_trace(p: Poly, q: Poly) -> None:
    for made in (p + q, p * q, p.scaled(0.0), p + q.scaled(-1.0), p * q + (p * q).scaled(-1.0)):
        left = {*made.atoms(), *(v.atom for v in made.vanished)}
        assert left >= {*p.atoms()}
        assert all(v.divisor or v.atom not in {*made.atoms()} for v in made.vanished)


def test_what_cancels_is_remembered_until_something_stands_for_it() -> None:
    m, n = Poly.var(M), Poly.var(N)
    inverse = n.reciprocal()
    assert inverse is not None
    one = n * inverse
    assert one.items == Poly.const(1.0).items and one.constant is None
    assert one.vanished == {Vanished(N), Vanished(N, True)}
    assert (one + n).vanished == {Vanished(N, True)}  # 0/0 + 0 is NaN, and 1 + 0 is not
    assert (one + inverse).vanished == frozenset()
    gone = m + m.scaled(-1.0)
    assert gone.vanished == {Vanished(M)}
    assert gone + m == m
    assert (gone + m.detached()).vanished == {Vanished(M)}  # the detached twin has no gradient
    assert gone.detached() + m == m
    assert m.scaled(0.0).vanished == {Vanished(M, zeroed=True)}
    assert (m.scaled(0.0) + m).vanished == {Vanished(M, zeroed=True)}  # 0·inf + inf is NaN, and inf is not
    assert (mat(W) + mat(A).scaled(0.0)).vanished == {Vanished(A, zeroed=True)}
    assert (mat(W) @ Expr(())).vanished == {Vanished(W, zeroed=True)}
    assert mat(W).right_diag(one).vanished == one.vanished
    assert mat(W).right_diag(one).transposed().vanished == one.vanished
    base, g = mat(X) @ mat(W).transposed(), m * inverse
    assert base + base.right_diag(g + Poly.const(-1.0)) == base.right_diag(g)


exprs = st.lists(
    st.tuples(
        st.lists(st.sampled_from([Mat(X), Mat(W), Mat(W, True), Diag(((M, 1),)), Diag(((M, -1),))]), max_size=3),
        st.integers(-2, 2),
    ),
    max_size=2,
).map(lambda items: sum((Expr.chain(chain, float(c)) for chain, c in items), Expr(())))


@given(exprs, exprs, exprs)
def test_expressions_are_a_ring_with_transposition(p: Expr, q: Expr, r: Expr) -> None:
    def same(a: Expr, b: Expr) -> bool:
        return dict(k for k in a.items if k[1]) == dict(k for k in b.items if k[1])

    assert same((p @ q) @ r, p @ (q @ r))
    assert same(p @ (q + r), p @ q + p @ r)
    assert same((p @ q).transposed(), q.transposed() @ p.transposed())
