"""The terms that an explanation prints: what each layer computes, and a near miss beside the form that it comes closest to."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dorafx
from dorafx.match import Match, Reason, forms
from dorafx.recording import SiteTerms, form_terms


class Layer(nn.Module):
    def __init__(self, kind: str = "") -> None:
        super().__init__()
        self.kind = kind
        self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
        self.m = nn.Parameter(self.weight.norm(dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = 2 * (self.b @ self.a)
        adapted = self.weight + (torch.tanh(delta) if self.kind == "tanh" else delta)
        g = self.m / adapted.norm(p=1 if self.kind == "first order" else 2, dim=1).detach()
        if self.kind == "sigmoid":
            g = torch.cumsum(g.sigmoid(), 0)[-1]
        if self.kind == "merged":
            return F.linear(x, g[:, None] * adapted)
        low_rank = 2 * F.linear(F.linear(x, self.a), self.b)
        if self.kind == "base only":
            return g * F.linear(x, self.weight) + low_rank
        return g * (F.linear(x, self.weight) + low_rank)


class Model(nn.Module):
    def __init__(self, *kinds: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(kind) for kind in kinds])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(x)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def terms_of(kind: str) -> SiteTerms:
    (found,) = dorafx.explain(Model(kind), torch.randn(3, 8)).terms
    assert found.site == "layers.0"
    return found


OUTPUT = "relu(args)·weightᵀ·D(m·n⁻¹) + 2·relu(args)·aᵀ·bᵀ·D(m·n⁻¹)"
NORM = "detach(‖weight + 2·b·a‖)"


def test_a_layer_that_is_rewritten() -> None:
    assert terms_of("") == SiteTerms("layers.0", "linear", OUTPUT, NORM)


# fmt: off
MISSES = [
    ("tanh", "linear", OUTPUT, "detach(‖weight + tanh(2·b·a)‖)", "operator tanh at"),
    ("first order", "linear", "", "norm(weight + 2·b·a, p=1, dim=1)", "is of order 1"),
    ("sigmoid", "linear", "cumsum(sigmoid(m·‖weight + 2·b·a‖⁻¹), 0)[−1]", "‖weight + 2·b·a‖", "only the norm is rewritten: operator getitem at"),
    ("base only", "linear", "relu(args)·weightᵀ·D(m·n⁻¹) + 2·relu(args)·aᵀ·bᵀ", NORM, "not scaled by the same vector"),
]
# fmt: on


@pytest.mark.parametrize(("kind", "closest", "output", "norm", "reason"), MISSES)
def test_a_near_miss_has_the_closest_form_beside_it(
    kind: str, closest: str, output: str, norm: str, reason: str
) -> None:
    found = terms_of(kind)
    assert (found.pattern, found.output, found.norm) == ("", output, norm)
    assert reason in found.reason and found.closest == form_terms(closest)


def test_a_match_that_does_not_pay_is_no_near_miss() -> None:
    (found,) = dorafx.explain(Layer("merged"), torch.randn(3000, 8)).terms
    assert found.pattern == "linear" and "merged weight is cheaper" in found.reason and found.closest is None
    assert found.output.endswith("weightᵀ·D(m·n⁻¹) + 2·args·aᵀ·bᵀ·D(m·n⁻¹)")


def test_what_is_printed() -> None:
    found = dorafx.explain(Model("", "", "", "tanh"), torch.randn(3, 8))
    plain, with_terms = io.StringIO(), io.StringIO()
    found.print(plain)
    assert plain.getvalue() == f"{found}\n" and "⁻¹" not in plain.getvalue()
    found.print(with_terms, terms=True)
    assert with_terms.getvalue().startswith(plain.getvalue())
    text = with_terms.getvalue()[len(plain.getvalue()) :]
    # The graph names the values that layers are given, by variables of the program and numbers.
    assert re.sub(r"x_\d·", "x·", text) == (
        "layers.0  linear\n"
        f"  y = {OUTPUT}\n"
        f"  n = {NORM}\n"
        "layers.* x 2  linear\n"
        f"  y = {OUTPUT.replace('relu(args)', 'x')}\n"
        f"  n = {NORM}\n"
        f"layers.3  {found.misses[0].reason}\n"
        f"  found   y = {OUTPUT.replace('relu(args)', 'x')}\n"
        "  linear  y = x·Wᵀ·D(m·n⁻¹) + s·x·Aᵀ·Bᵀ·D(m·n⁻¹) + 𝟙·D(bias)\n"
        "  found   n = detach(‖weight + tanh(2·b·a)‖)\n"
        "  linear  n = detach(‖W + s·B·A‖)\n"
    )


FORMS = {
    "linear": ("x·Wᵀ·D(m·n⁻¹) + s·x·Aᵀ·Bᵀ·D(m·n⁻¹) + 𝟙·D(bias)", "detach(‖W + s·B·A‖)"),
    "linear_dropout": (
        "x·Wᵀ − dropped·Wᵀ + dropped·Wᵀ·D(m·n⁻¹) + s·dropped·Aᵀ·Bᵀ·D(m·n⁻¹) + 𝟙·D(bias)",
        "detach(‖W + s·B·A‖)",
    ),
    "linear_columns": ("x·D(m·n⁻¹)·Wᵀ + s·x·D(m·n⁻¹)·Aᵀ·Bᵀ", "‖W + s·B·A‖_col"),
    "linear_weight_delta": ("x·Wᵀ·D(m·n⁻¹) − x·Wᵀ + s·x·Aᵀ·Bᵀ·D(m·n⁻¹)", "detach(‖W + s·B·A‖)"),
    "embedding": ("onehot(i)·E·D(m·n⁻¹) + s·onehot(i)·A·B·D(m·n⁻¹)", "detach(‖E + s·A·B‖_col)"),
    "convolution": (
        "patches(channels(x))·flat(W)ᵀ·D(m·n⁻¹) + s·patches(channels(x))·flat(A)ᵀ·flat(B)ᵀ·D(m·n⁻¹)",
        "detach(‖flat(W) + s·flat(B)·flat(A)‖)",
    ),
}


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", FORMS)
def test_the_statements_of_the_forms(name: str, mode: Any) -> None:
    form_terms.cache_clear()
    with mode():
        found = form_terms(name)
    assert found is not None and (found.output, found.norm) == FORMS[name]


def test_every_form_of_dorafx_has_a_statement() -> None:
    assert {name for name, form in forms().items() if type(form).__module__.startswith("dorafx.")} == set(FORMS)


class WithoutStatement:
    def check(self, candidate: Any) -> Match | Reason:
        return Reason("no form of its own", candidate.node)

    def rewrite(self, match: Match, plan: Any, emit: Any) -> Any: ...


class WithAStatementOfItsOwn(WithoutStatement):
    @staticmethod
    def statement(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x

    @staticmethod
    def example() -> dict[str, torch.Tensor]:
        return {"x": torch.randn(3)}


@pytest.mark.parametrize("form", [WithoutStatement, WithAStatementOfItsOwn])
def test_a_form_that_cannot_be_shown(form: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dorafx.match.registry._FORMS", forms())
    name = f"shown_{form.__name__}"
    dorafx.pattern(name=name)(form)
    assert form_terms(name) is None
    assert form_terms("unknown") is None
