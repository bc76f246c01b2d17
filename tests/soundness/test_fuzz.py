"""No random program may change its value or a gradient, and no DoRA among them may be passed over in silence."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from fuzz_programs import Operands, Spec, is_recognised, is_taken_apart, program, specs
from hypothesis import HealthCheck, assume, given, settings
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import dorafx
from dorafx import rewrite_log

TOLERANCE = 1e-10
QUICK = settings(
    max_examples=250, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
LONG = settings(max_examples=10_000, deadline=None, database=None, suppress_health_check=list(HealthCheck))


def pair(spec: Spec, p: Operands, x: torch.Tensor) -> tuple[Any, Any]:
    """The program as it is captured, and its rewrite. Dynamo keeps ``no_grad`` regions, which ``make_fx`` does not: what it
    captured is what its rewrite is held to."""

    def call(value: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return program(spec, p, value)

    if spec.capture == "dynamo":
        torch._dynamo.reset()
        options = {"dorafx.codegen": "eager"}
        compiled = torch.compile(call, backend="dorafx", fullgraph=True, dynamic=False, options=options)
        return call, compiled

    names = [n for n, _ in p.named_parameters()]

    def functional(value: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return torch.func.functional_call(_Program(spec, p), {f"p.{n}": t for n, t in zip(names, parameters)}, (value,))

    with torch.enable_grad():
        gm: fx.GraphModule = make_fx(functional, tracing_mode="fake")(x, *p.parameters())
    return gm, dorafx.rewrite(gm)


class _Program(torch.nn.Module):
    def __init__(self, spec: Spec, p: Operands) -> None:
        super().__init__()
        self.spec, self.p = spec, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return program(self.spec, self.p, x)


def evaluated(call: Any, x: torch.Tensor, leaves: list[torch.Tensor]) -> tuple[torch.Tensor, list[Any]]:
    y = call(x, *leaves[1:])
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return y.detach(), list(torch.autograd.grad(y.sin().sum(), wanted, allow_unused=True))


def check(spec: Spec) -> list[dorafx.Record]:
    """Values and gradients of a program and its rewrite agree; returns what the log says of it."""
    rewrite_log().clear()
    p = Operands(spec)
    x = torch.randn(*spec.leading, spec.d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    leaves = [x.requires_grad_(), *p.parameters()]
    original, rewritten = pair(spec, p, x)
    try:
        value, gradients = evaluated(original, x, leaves)
    except RuntimeError as error:
        # Written in place, but needed for a gradient: no program at all.
        assume("modified by an inplace operation" not in str(error))
        raise
    new_value, new_gradients = evaluated(rewritten, x, leaves)
    assert new_value.shape == value.shape and new_value.dtype == value.dtype
    torch.testing.assert_close(new_value, value, rtol=TOLERANCE, atol=TOLERANCE)
    for wanted, got in zip(gradients, new_gradients):
        assert (got is None) == (wanted is None), "gradient flow changed"
        if wanted is not None:
            torch.testing.assert_close(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)
    return list(rewrite_log().records)


def check_dora(spec: Spec, tally: Counter[str]) -> None:
    records = check(spec)
    # A flattened matrix with a side of one is a vector by its shape; nothing else may be passed over in silence.
    assert records or 1 in (spec.d_out, spec.d_in) or is_taken_apart(spec), "passed over in silence"
    assert not any("internal failure" in r.reason for r in records), records[0].reason
    whole = any(r.rewritten and r.pattern in ("linear", "linear_columns") for r in records)
    assert whole or all(r.reason for r in records)
    if is_recognised(spec):
        # A merged weight that is cheaper as it is stays, and the record says by how much.
        decided = any(r.decision for r in records)
        tally["rewritten" if whole else "merged is cheaper" if decided else "in part or missed"] += 1


def check_perturbed(spec: Spec) -> None:
    assert not any("internal failure" in r.reason for r in check(spec))


def test_dora_in_any_spelling() -> None:
    tally: Counter[str] = Counter()

    @QUICK
    @given(specs(perturbed=False))
    def fuzz(spec: Spec) -> None:
        check_dora(spec, tally)

    fuzz()
    print(f"\n{tally}")
    assert tally["in part or missed"] <= 0.01 * tally.total(), tally


@QUICK
@given(specs(perturbed=True))
def test_programs_that_are_not_dora(spec: Spec) -> None:
    check_perturbed(spec)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_in_any_spelling() -> None:
    tally: Counter[str] = Counter()

    @LONG
    @given(specs(perturbed=False))
    def fuzz(spec: Spec) -> None:
        check_dora(spec, tally)

    fuzz()
    print(f"\n{tally}")
    assert tally["in part or missed"] <= 0.01 * tally.total(), tally


@pytest.mark.slow
@pytest.mark.timeout(0)
@LONG
@given(specs(perturbed=True))
def test_many_that_are_not_dora(spec: Spec) -> None:
    check_perturbed(spec)
