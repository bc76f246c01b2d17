"""Weight deltas that a program uses by themselves, columns that are scaled in part, and merged layers that follow each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from programs import Layer, Program, S, lora
from same_results import check_everything, graph_of

import dorafx
from dorafx import rewrite_log

PROGRAMS: dict[str, tuple[Program, list[str]]] = {}


def becomes(*forms: str) -> Callable[[Program], Program]:
    """A program, and the forms that its layers are, in order."""

    def register(program: Program) -> Program:
        PROGRAMS[program.__name__] = program, list(forms)
        return program

    return register


def adapted(p: Layer) -> torch.Tensor:
    return p.W + S * (p.B @ p.A)


def delta(p: Layer) -> torch.Tensor:
    """``W' - W``, the norm by row."""
    V = adapted(p)
    return p.m_column * V / V.norm(dim=1, keepdim=True) - p.W


def column_scaling(p: Layer) -> torch.Tensor:
    return p.m_in / adapted(p).norm(dim=0, keepdim=True)


@becomes("linear_weight_delta")
def alone(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, delta(p))


@becomes("linear_weight_delta")
def with_its_own_bias(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, delta(p), p.bias)


@becomes("linear_weight_delta")
def norm_detached(p: Layer, x: torch.Tensor) -> torch.Tensor:
    V = adapted(p)
    return F.linear(x, V * (p.m / V.norm(dim=1).detach())[:, None] - p.W)


@becomes("linear_weight_delta")
def before_a_layer_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.W, p.b) + F.layer_norm(F.linear(x, delta(p)), (p.d_out,))


@becomes("linear_weight_delta")
def gated_by_a_number(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.W) + p.d[0].tanh() * F.linear(x, delta(p))


@becomes("linear_weight_delta")
def gated_by_a_vector(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.W, p.bias) + p.b.sigmoid() * F.linear(x, delta(p))


@becomes("linear_weight_delta")
def in_part(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.W) + 0.8 * F.linear(x, delta(p))


@becomes("linear_weight_delta")
def minus_a_part_of_the_weight(p: Layer, x: torch.Tensor) -> torch.Tensor:
    V = adapted(p)
    return F.linear(x, p.m_column * V / V.norm(dim=1, keepdim=True) - 0.5 * p.W)


@becomes("linear_weight_delta")
def of_an_input_with_dropout(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.W, p.bias) + 0.5 * F.linear(x * (x.detach() > 0), delta(p))


@becomes("linear_columns", "linear")
def rows_and_columns_added(p: Layer, x: torch.Tensor) -> torch.Tensor:
    columns = adapted(p) * column_scaling(p) - p.W
    return F.linear(x, p.W) + F.linear(x, delta(p)) + F.linear(x, columns)


@becomes("linear_columns")
def columns_in_part(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, adapted(p) * (0.6 * (column_scaling(p) - 1) + 1), p.bias)


@becomes("linear_columns")
def columns_in_part_of_a_detached_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = p.m_in / adapted(p).norm(dim=0, keepdim=True).detach()
    return F.linear(x, adapted(p) * torch.lerp(torch.ones_like(g), g, 0.6))


@becomes("linear_columns")
def weight_delta_by_columns(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, adapted(p) * column_scaling(p) - p.W)


@becomes("linear_columns")
def weight_delta_by_columns_in_part(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = 0.6 * (column_scaling(p) - 1) + 1
    return F.linear(x, p.W, p.bias) + F.linear(x, adapted(p) * g - p.W)


@becomes("linear_columns")
def weight_delta_by_columns_of_an_input_with_dropout(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.W, p.bias) + F.linear(x * (x.detach() > 0), adapted(p) * column_scaling(p) - p.W)


def merged(p: Layer, x: torch.Tensor) -> torch.Tensor:
    V = adapted(p)
    return F.linear(x, p.m_column * V / V.norm(dim=1, keepdim=True), p.bias)


def merged_back(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """Another layer ``d_out -> d_in``, of the same parameters."""
    V = p.W.T + S * (p.A.T @ p.B.T)
    return F.linear(x, p.m_in.T * V / V.norm(dim=1, keepdim=True))


@becomes("linear", "linear")
def merged_after_merged(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return merged_back(p, merged(p, x))


@becomes("linear", "linear")
def merged_after_merged_around_a_residual(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return x + merged_back(p, merged(p, x))


@becomes("linear", "linear")
def merged_after_merged_and_reshaped(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return merged_back(p, merged(p, x).reshape(-1, p.d_out))


@becomes("linear", "linear")
def one_merged_weight_twice(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return merged(p, merged_back(p, merged(p, x)))


@becomes("linear", "linear_weight_delta")
def weight_delta_after_merged(p: Layer, x: torch.Tensor) -> torch.Tensor:
    V = p.W.T + S * (p.A.T @ p.B.T)
    return F.linear(merged(p, x), p.m_in.T * V / V.norm(dim=1, keepdim=True) - p.W.T)


@pytest.mark.default_cases("inductor-gated_by_a_vector", "inductor-columns_in_part", "inductor-one_merged_weight_twice", *(f"eager-{name}" for name in PROGRAMS))  # fmt: skip
@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_rewritten_whole(name: str, codegen: str) -> None:
    """Values, strides and gradients, with and without gradients recorded."""
    program, expected = PROGRAMS[name]
    for grad in (True, False):
        rewrite_log().clear()
        check_everything(program, Layer(), torch.randn(2, 5, 12, dtype=torch.float64), codegen, grad)
        records = rewrite_log().records
        assert [(r.status, r.pattern, r.reason) for r in records] == [("rewritten", form, "") for form in expected]


@pytest.mark.parametrize("name", PROGRAMS)
def test_single_tokens(name: str) -> None:
    program, expected = PROGRAMS[name]
    check_everything(program, Layer(), torch.randn(1, 12, dtype=torch.float64))
    assert [r.pattern for r in rewrite_log().rewrites] == expected


def _products_of_its_own(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = p.m / adapted(p).norm(dim=1)
    return g * F.linear(x, p.W) + lora(p, x)


def test_products_that_the_program_has_are_left_alone() -> None:
    """The norm is all that there is to gain."""
    check_everything(_products_of_its_own, Layer(), torch.randn(3, 12, dtype=torch.float64))
    ((status, form, kind),) = [(r.status, r.pattern, r.kind) for r in rewrite_log().records]
    assert (status, form, kind) == ("rewritten", "norm_only", "unequal-scaling")


def test_each_use_of_one_merged_weight_is_rewritten() -> None:
    """The log has a record a norm; each layer has a composition of its own."""
    p = Layer()
    graph = graph_of(lambda x: one_merged_weight_twice(p, x), x=torch.randn(3, 12, dtype=torch.float64))
    new = dorafx.rewrite(graph)
    composed = [node for node in new.graph.nodes if node.target is torch.ops.dorafx.compose.default]
    norms = [node for node in new.graph.nodes if node.target is torch.ops.dorafx.row_norm.default]
    assert (len(composed), len(norms)) == (3, 2)
