"""Factors that the graph derives from parameters: their norms leave the graph with what derives them, and are watched by it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from integration_support import assert_close
from reuse_support import counts
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dorafx import rewrite_log

Factors = Callable[["Layer"], "tuple[torch.Tensor, torch.Tensor]"]


class Layer(nn.Module):
    """DoRA on a product of factors that are made of parameters."""

    def __init__(self, factors: Factors) -> None:
        super().__init__()
        shapes = {"w": (12, 10), "a": (3, 10), "b": (12, 3), "d": (3,), "e": (12,), "inner": (3, 3), "m": (12,)}
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape), requires_grad=name != "w"))
        self.register_buffer("mask", torch.tensor([1.0, 0.0, 1.0]))
        self.factors = factors

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, a = self.factors(self)
        norm = (self.w + 0.3 * (b @ a)).norm(dim=1).detach()
        return (F.linear(x, self.w) + 0.3 * F.linear(F.linear(x, a), b)) * (self.m / norm)


def compiled(layer: nn.Module) -> Callable[..., torch.Tensor]:
    made: Callable[..., torch.Tensor] = torch.compile(layer, backend="dorafx", options={"dorafx.codegen": "eager"})
    return made


DERIVED: dict[str, Factors] = {
    "VeRA": lambda s: (s.e[:, None] * s.b, s.d.unsqueeze(1) * s.a),
    "VeRA, views": lambda s: (s.e.view(-1, 1) * s.b, s.d.view(-1, 1).mul(s.a)),
    "rank slice": lambda s: (s.b[:, :2] * s.d[:2], s.a[:2]),
    "diag": lambda s: (torch.diag(s.e) @ s.b, torch.diag(s.d) @ s.a),
    "inner matrix": lambda s: (s.b.matmul(s.inner), s.d[0] * s.a),
    "stored transposed": lambda s: (s.b.t().contiguous().T, -s.a / s.d[:, None]),
    "masked": lambda s: (s.b * s.mask, (s.a - 1).transpose(0, 1).T * s.d[1]),
    "stacked": lambda s: (torch.cat([s.b, s.b], 1), torch.cat([s.a + 1, s.a * s.d[2]], 0)),
}


@pytest.mark.parametrize("name", DERIVED)
def test_reused_and_never_stale(name: str) -> None:
    layer = Layer(DERIVED[name])
    call, x = compiled(layer), torch.randn(1, 10)
    with torch.no_grad():
        for step in range(6):
            if step == 2:
                layer.d.mul_(1.5)
            elif step == 4:
                layer.d.data.copy_(layer.d.data + 0.5)  # moves no counter
            assert_close(call(x), layer(x), 1e-5)
    assert {(r.status, r.norm_placement, r.decision) for r in rewrite_log().records} == {("rewritten", "prologue", "")}
    assert counts() == (3, 3)


KEPT: dict[str, tuple[Factors, str]] = {
    "an unknown operator": (lambda s: (s.b, torch.sigmoid(s.d)[:, None] * s.a), "operator sigmoid at "),
    "an index that is a tensor": (lambda s: (s.b[:, s.mask.long()], s.a[s.mask.long()]), "operator getitem at "),
}


@pytest.mark.parametrize("name", KEPT)
def test_what_keeps_a_norm_in_the_graph_is_said(name: str) -> None:
    factors, said = KEPT[name]
    layer = Layer(factors)
    twin, x = copy.deepcopy(layer), torch.randn(1, 10)
    call = compiled(layer)
    with torch.no_grad():
        for _ in range(3):
            assert_close(call(x), twin(x), 1e-5)
    (record,) = rewrite_log().records
    assert (record.status, record.norm_placement) == ("rewritten", "graph")
    assert record.decision.startswith("norm kept in the graph: ") and said in record.decision
    assert "test_derived_factors.py:" in record.decision
    assert counts() == (0, 0)


@pytest.mark.parametrize(
    ("b", "placement"),
    [
        (lambda s: s.b @ s.inner, "prologue"),
        (lambda s: s.b @ s.inner @ s.narrow, "graph"),
    ],
    ids=["one dtype", "two"],
)
def test_products_under_autocast(b: Callable[[Layer], torch.Tensor], placement: str) -> None:
    """Before the graph they are computed without it; what only autocast can multiply stays in the graph."""
    layer = Layer(lambda s: (b(s), s.a))
    layer.narrow = nn.Parameter(torch.randn(3, 3).bfloat16())
    call, x = compiled(layer), torch.randn(1, 10)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            assert_close(call(x), layer(x), 2e-2)
    (record,) = rewrite_log().records
    assert record.norm_placement == placement
    assert ("runs in an autocast region" in record.decision) == (placement == "graph")


def test_a_weight_that_is_made_keeps_its_norm_in_the_graph() -> None:
    layer = Layer(lambda s: (s.b, s.a))
    layer.register_buffer("pattern", (torch.rand(12, 10) > 0.5).float())

    def masked(x: torch.Tensor) -> torch.Tensor:
        w = layer.w * layer.pattern
        norm = (w + 0.3 * (layer.b @ layer.a)).norm(dim=1).detach()
        return (F.linear(x, w) + 0.3 * F.linear(F.linear(x, layer.a), layer.b)) * (layer.m / norm)

    x = torch.randn(1, 10)
    with torch.no_grad():
        assert_close(torch.compile(masked, backend="dorafx", options={"dorafx.codegen": "eager"})(x), masked(x), 1e-5)
    assert [r.norm_placement for r in rewrite_log().rewrites] == ["graph"]
    assert "the weight is made by operator mul at " in rewrite_log().rewrites[0].decision


class Regions(nn.Module):
    """One checkpointed region writes what the norm of the next is computed from."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Layer(lambda s: (torch.mul(s.b, s.mask), s.a))

    def write(self, x: torch.Tensor) -> torch.Tensor:
        self.layer.mask.add_(0.5)
        return x * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = checkpoint(self.write, x, use_reentrant=False)
        y: torch.Tensor = checkpoint(self.layer, x, use_reentrant=False)
        return y


def test_a_write_in_one_region_is_seen_by_the_norm_of_the_next() -> None:
    model = Regions()
    twin, x = copy.deepcopy(model), torch.randn(1, 10)
    call = compiled(model)
    with torch.no_grad():
        for _ in range(3):
            assert_close(call(x), twin(x), 1e-5)
    assert [r.norm_placement for r in rewrite_log().rewrites] == ["graph"]
    assert "is written in place" in rewrite_log().rewrites[0].decision
