"""A norm that is computed by way of a low-rank product has a record, however many operators stand in between, and is found in one walk."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from programs import Layer
from same_results import check_same
from torch import fx

from dorafx import rewrite_log
from dorafx.lift import Lifter
from dorafx.match import ancestors


def far(t: torch.Tensor) -> torch.Tensor:
    for _ in range(12):
        t = torch.tanh(t)
    return t


def scaled(p: Layer, x: torch.Tensor, v: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return F.linear(x, v * (p.m / n)[:, None])


def far_before_the_sum(p: Layer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + far(p.B @ p.A)
    return scaled(p, x, v, v.norm(dim=1))


def far_behind_the_sum(p: Layer, x: torch.Tensor) -> torch.Tensor:
    v = far(p.W + p.B @ p.A)
    return scaled(p, x, v, v.norm(dim=1))


def far_and_of_three_axes(p: Layer, x: torch.Tensor) -> torch.Tensor:
    v = far(p.W + p.B @ p.A)
    return scaled(p, x, v, v.view(5, 2, 12).norm(dim=2).view(10))


def far_and_by_squares(p: Layer, x: torch.Tensor) -> torch.Tensor:
    v = far(p.W + p.B @ p.A)
    return scaled(p, x, v, v.square().sum(1).add(1e-6).sqrt())


@pytest.mark.parametrize("program", [far_before_the_sum, far_behind_the_sum, far_and_of_three_axes, far_and_by_squares])
def test_every_depth_has_a_record(program: Callable[[Layer, torch.Tensor], torch.Tensor]) -> None:
    check_same(program, Layer(), torch.randn(4, 12, dtype=torch.float64, requires_grad=True))
    assert [(r.status, r.kind) for r in rewrite_log().records] == [("missed", "hidden-delta")]
    assert "operator tanh" in rewrite_log().misses[0].reason


def product_of_weights_alone(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return x / far(p.W.t() @ p.W).norm(dim=1)


def distance_from_an_identity(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return x + far(p.W.t() @ p.W - torch.eye(12, dtype=x.dtype)).norm(dim=1)


def activations_beside_a_table(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.normalize(far(F.linear(x, p.W)) + p.W[:4, :10].sum(), dim=-1)


@pytest.mark.parametrize("program", [product_of_weights_alone, distance_from_an_identity, activations_beside_a_table])
def test_what_is_no_adapted_weight_has_none(program: Callable[[Layer, torch.Tensor], torch.Tensor]) -> None:
    check_same(program, Layer(), torch.randn(4, 12, dtype=torch.float64, requires_grad=True))
    assert rewrite_log().records == []


def test_each_node_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[fx.Node] = []
    of_arguments = ancestors._of_arguments

    def counted(
        lift: Lifter, node: fx.Node, operands: list[fx.Node], known: dict[fx.Node, ancestors._Behind]
    ) -> ancestors._Behind:
        looked.append(node)
        return of_arguments(lift, node, operands, known)

    monkeypatch.setattr(ancestors, "_of_arguments", counted)

    def program(p: Layer, x: torch.Tensor) -> torch.Tensor:
        v = far(p.W + p.B @ p.A)
        for _ in range(6):
            x = scaled(p, x, v, v.norm(dim=1))[:, :1] + x
            v = far(v)
        return x

    check_same(program, Layer(), torch.randn(4, 12, dtype=torch.float64, requires_grad=True))
    assert len(rewrite_log().records) == 6
    assert looked and len(looked) == len(set(looked))
