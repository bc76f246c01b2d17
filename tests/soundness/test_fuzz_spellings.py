"""No random program may change its value or a gradient, and no DoRA among them may be passed over in silence."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from fuzz_programs import ROUNDED, Operands, Spec, exemption, program, specs
from hypothesis import HealthCheck, assume, given, settings
from same_results import defects
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import dorafx
from dorafx import rewrite_log

TOLERANCE = 1e-10
FORMS = ("linear", "linear_columns", "linear_dropout", "convolution", "embedding")
QUICK = settings(
    max_examples=50, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
# The same programs in every run, so that a failure can be had again; others with DORAFX_FUZZ_FRESH=1.
LONG = settings(QUICK, max_examples=10_000, derandomize="DORAFX_FUZZ_FRESH" not in os.environ)


def pair(spec: Spec, p: Operands, x: torch.Tensor) -> tuple[Any, Any]:
    """The program as it is captured, and its rewrite. Dynamo and export keep ``no_grad`` regions, which the other tracers do not:
    what they captured is what their rewrite is held to."""

    def call(value: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return program(spec, p, value)

    if spec.capture == "dynamo":
        torch._dynamo.reset()
        options = {"dorafx.codegen": "eager"}
        compiled = torch.compile(call, backend="dorafx", fullgraph=True, dynamic=False, options=options)
        return call, compiled

    if spec.capture == "export":
        with torch.enable_grad():
            exported = torch.export.export(_Program(spec, p), (x,))
        return of_input(exported.module()), of_input(dorafx.rewrite(exported).module())
    if spec.capture == "symbolic_trace":
        traced = symbolically(spec, p)
        if traced is not None:
            return of_input(traced), of_input(dorafx.rewrite(traced, x))
    names = [n for n, _ in p.named_parameters()]

    def functional(value: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return torch.func.functional_call(_Program(spec, p), {f"p.{n}": t for n, t in zip(names, parameters)}, (value,))

    with torch.set_grad_enabled(spec.capture != "make_fx without gradients"):
        gm: fx.GraphModule = make_fx(functional, tracing_mode="fake")(x, *p.parameters())
    return gm, dorafx.rewrite(gm)


def of_input(module: Any) -> Any:
    """A module that holds its parameters, called as one that takes them."""
    return lambda value, *parameters: module(value)


def symbolically(spec: Spec, p: Operands) -> fx.GraphModule | None:
    """The program as ``fx.symbolic_trace`` sees it; None where it asks for a shape, which that tracer does not know."""
    try:
        return fx.symbolic_trace(_Program(spec, p))
    except (TypeError, fx.proxy.TraceError):
        return None


class _Program(torch.nn.Module):
    def __init__(self, spec: Spec, p: Operands) -> None:
        super().__init__()
        self.spec, self.p = spec, p

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return program(self.spec, self.p, x)


def largest(t: torch.Tensor) -> float:
    return max(1.0, float(t.abs().amax())) if t.numel() else 1.0


def evaluated(
    call: Any, x: torch.Tensor, leaves: list[torch.Tensor], size: float = 0
) -> tuple[torch.Tensor, list[Any]]:
    """The value, and the gradients of the sines of its elements over ``size``: a sine of thousands has no digits left."""
    torch.manual_seed(3)  # a dropout draws the same mask in both
    y = call(x, *leaves[1:])
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    loss = (y / (size or largest(y.detach()))).sin().sum()
    return y.detach(), list(torch.autograd.grad(loss, wanted, allow_unused=True))


def assert_same(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """To a tolerance of the largest element: a program with a small divisor cancels numbers as large as that."""
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance * largest(wanted))


def check(spec: Spec) -> list[dorafx.Record]:
    """Values and gradients of a program and its rewrite agree; returns what the log says of it."""
    rewrite_log().clear()
    p = Operands(spec)
    x = torch.randn(*spec.leading, spec.d_in, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    try:
        program(spec, p, x)
    except RuntimeError:
        assume(False)  # a perturbation that does not fit these sizes: no program at all
    leaves = [x.requires_grad_(), *p.parameters()]
    original, rewritten = pair(spec, p, x)
    try:
        value, gradients = evaluated(original, x, leaves)
    except RuntimeError as error:
        # Written in place, but needed for a gradient: no program at all.
        assume("modified by an inplace operation" not in str(error))
        raise
    new_value, new_gradients = evaluated(rewritten, x, leaves, largest(value))
    assert new_value.shape == value.shape and new_value.dtype == value.dtype
    tolerance = 1e-4 if spec.cast in ROUNDED else TOLERANCE
    assert_same(new_value, value, tolerance)
    for wanted, got in zip(gradients, new_gradients):
        assert (got is None) == (wanted is None), "gradient flow changed"
        if wanted is not None:
            assert_same(got, wanted, tolerance)
    return list(rewrite_log().records)


@dataclass
class Report:
    """What became of the programs of a run."""

    wrong: int = 0
    """Programs whose rewrite has another value or gradient; hypothesis runs more of them to find a small one, and fails."""
    counts: Counter[str] = field(default_factory=Counter)
    misses: list[str] = field(default_factory=list)

    exempt: Counter[str] = field(default_factory=Counter)
    """Programs that were not rewritten whole and need not be, by the reason for it."""

    @property
    def recall(self) -> float:
        """Rewritten whole, among the unbroken programs that must be."""
        return self.counts["whole"] / max(self.counts["whole"] + self.counts["missed"], 1)

    @property
    def recall_of_all(self) -> float:
        """Rewritten whole, among all unbroken programs but those that the cost model decided against."""
        decided = self.counts["whole"] + self.counts["missed"] + self.exempt.total()
        return self.counts["whole"] / max(decided, 1)

    def __str__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.counts.items())
        total = self.counts.total() + self.exempt.total() + self.wrong
        lines = [f"{total} programs, {self.wrong} wrong rewrites: {counts}"]
        if self.counts["whole"]:
            lines.append(
                f"rewritten whole: {self.recall:.2%} of those that must be ({len(self.misses)} missed), "
                f"{self.recall_of_all:.2%} of all ({self.exempt.total()} exempt)"
            )
        lines += [f"{count} exempt: {reason}" for reason, count in self.exempt.most_common()]
        return "\n".join([*lines, *self.misses])


def checked(spec: Spec, report: Report) -> list[dorafx.Record]:
    try:
        return check(spec)
    except AssertionError:
        report.wrong += 1
        raise


def check_dora(spec: Spec, report: Report) -> None:
    records = checked(spec, report)
    # A flattened matrix with a side of one is a vector by its shape; nothing else may be passed over in silence.
    assert records or 1 in (spec.d_out, spec.d_in), "passed over in silence"
    assert not defects(records)
    layers = [r.rewritten and r.pattern in FORMS for r in records]
    assert all(r.reason for r, whole in zip(records, layers) if not whole)
    # Some compositions take a norm of their own, and leave the one that the program begins with to nobody.
    whole = sum(layers) > (spec.shared != "nothing")
    if whole:
        report.counts["whole"] += 1
    elif any("factored products cost" in r.decision for r in records):
        report.counts["merged weight is cheaper"] += 1
    elif reason := exemption(spec):
        report.exempt[reason] += 1
    else:
        report.counts["missed"] += 1
        report.misses.append(f"{spec}: {[r.reason for r in records]}")


def check_perturbed(spec: Spec, report: Report) -> None:
    records = checked(spec, report)
    assert not defects(records)
    report.counts["rewritten in its sound part" if any(r.rewritten for r in records) else "left alone"] += 1


def fuzz(amount: settings, perturbed: bool) -> Report:
    report = Report()

    @amount
    @given(specs(perturbed=perturbed))
    def run(spec: Spec) -> None:
        (check_perturbed if perturbed else check_dora)(spec, report)

    try:
        run()
    finally:
        print(f"\n{report}")
    return report


def test_programs_of_large_numbers() -> None:
    """Found by the fuzzer, and right: scaled twice by the inverse, its values are of the size of thousands."""
    chosen = (
        "linalg.norm",
        "B @ A",
        "addmm",
        "none",
        "nothing",
        "direct",
        "none",
        "plain",
        "none",
        "plain",
        "transposed",
    )
    check(Spec(4, 4, 3, (4,), *chosen, False, ("scaled twice", "inverse scaling"), "make_fx"))


def test_dora_in_any_spelling() -> None:
    assert fuzz(QUICK, perturbed=False).recall >= 0.99


def test_programs_that_are_not_dora() -> None:
    fuzz(QUICK, perturbed=True)


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_in_any_spelling() -> None:
    assert fuzz(LONG, perturbed=False).recall >= 0.99


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_many_that_are_not_dora() -> None:
    fuzz(LONG, perturbed=True)
