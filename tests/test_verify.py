"""Translation validation: right rewrites pass, wrong ones are refused and the program stays right."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from dorafx.patterns.linear import Linear
from integration_support import assert_all_rewritten, assert_same_run, peft_model, peft_perceptron, run, tokens
from programs import LINEAR, Layer
from torch import fx

import dorafx
from dorafx import rewrite_log
from dorafx.rewriter import Emitter

QUICK = ("direct", "merged_weight_differentiable", "column_norm", "sequential_in_place")


def _slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [name if name in QUICK else _slow(name) for name in LINEAR])
def test_every_spelling_passes(name: str) -> None:
    layer = Layer()
    x = torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True)
    report = dorafx.verify(lambda value: LINEAR[name](layer, value), x)
    assert report, str(report)
    assert len(report.checks) >= 1
    assert max(check.error for check in report.checks) < 1e-12
    assert not rewrite_log().records, "a dry run leaves the process's log alone"


@pytest.mark.parametrize(
    ("kind", "dtype", "dropout"),
    [
        ("llama", torch.bfloat16, 0.0),
        _slow("llama", torch.bfloat16, 0.1),
        _slow("llama", torch.float32, 0.0),
        _slow("llama", torch.float32, 0.1),
        _slow("gpt2", torch.bfloat16, 0.0),
        _slow("gpt2", torch.float32, 0.1),
    ],
)
def test_peft(kind: str, dtype: torch.dtype, dropout: float) -> None:
    model = peft_model(kind, dtype=dtype, lora_dropout=dropout).train()
    report = dorafx.verify(model, input_ids=tokens())
    assert report.passed, str(report)
    assert [c.pattern for c in report.checks[-2:]] == ["whole graph", "norm prologue"]
    assert len(report.checks) - 2 == len(report.log.rewrites) > 3
    assert str(report).endswith(f"0 failed, largest difference {max(c.error for c in report.checks):.1e}")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_weight_in_float8(dtype: torch.dtype) -> None:
    """torch has no arithmetic for it, and does not say which values are finite."""
    w, a, b = torch.randn(16, 12).to(dtype), torch.randn(2, 12), torch.randn(16, 2)
    m = torch.rand(16) + 1

    def layer(x: torch.Tensor) -> torch.Tensor:
        wide = w.float()
        n = (wide + b @ a).norm(dim=1)
        return m / n * (torch.nn.functional.linear(x, wide) + x @ a.t() @ b.t())

    options = {"dorafx.codegen": "eager", "dorafx.verify": True, "dorafx.strict": True}
    x = torch.randn(3, 12)
    torch.testing.assert_close(torch.compile(layer, backend="dorafx", options=options)(x), layer(x))
    assert [r.status for r in rewrite_log().records] == ["rewritten"], str(rewrite_log())


def _sabotage(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    right = Linear.rewrite

    def rewrite(self: Linear, match: Any, plan: Any, emit: Emitter) -> fx.Node:
        replacement = right(self, match, plan, emit)
        if how == "scale":
            return emit.call(torch.mul, replacement, 1.001)
        if how == "gradient":
            return emit.method("detach", replacement)
        if how == "random":
            emit.call(torch.rand_like, replacement)
            return replacement
        if how == "nan":
            return emit.call(torch.nan_to_num, replacement)
        return emit.call(torch.add, replacement, emit.method("sum", replacement))

    monkeypatch.setattr(Linear, "rewrite", rewrite)


@pytest.mark.parametrize("how", ["scale", _slow("gradient"), _slow("leak")])
def test_wrong_rewrite_is_refused(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_perceptron().train()
    x = torch.randn(3, 24)
    expected = run(model, lambda: model(x))
    _sabotage(monkeypatch, how)
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.verify": True})
    assert_same_run(run(model, lambda: compiled(x)), expected)
    assert {r.pattern for r in rewrite_log().rewrites} == {"norm_only"}, "the norms themselves are right"
    expected_reason = "gradient flows" if how == "gradient" else "verification: "
    assert all(expected_reason in r.reason for r in rewrite_log().rewrites)
    report = dorafx.verify(model, x)
    assert not report
    assert {c.pattern for c in report.failures} == {"linear"}
    assert "FAILED  base_model.model.first  linear  verification" in str(report)


def test_wrong_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dorafx.rewriter import apply

    right = apply._emit_norm
    monkeypatch.setattr(apply, "_emit_norm", lambda *a: a[-1].call(torch.mul, right(*a), 1.01))
    model, x = peft_perceptron().train(), torch.randn(3, 24)
    expected = run(model, lambda: model(x))
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.verify": True})
    assert_same_run(run(model, lambda: compiled(x)), expected)
    assert not rewrite_log().rewrites
    assert len(rewrite_log().misses) == 2


def test_options(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_perceptron()
    dorafx.optimize(model, verify=True, strict=True, codegen="eager")
    model(torch.randn(3, 24))
    assert_all_rewritten(model)
    dorafx.restore(model)
    _sabotage(monkeypatch, "leak")
    with pytest.raises(ValueError, match=r"dorafx.verify: 'yes' is not True or False"):
        dorafx.optimize(model, verify="yes")  # type: ignore[arg-type]


def test_strict_raises_on_a_refused_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    from dorafx.rewriter import apply

    right = apply._emit_norm
    monkeypatch.setattr(apply, "_emit_norm", lambda *a: a[-1].call(torch.mul, right(*a), 1.01))
    compiled = torch.compile(
        peft_perceptron(),
        backend="dorafx",
        options={"dorafx.codegen": "eager", "dorafx.verify": True, "dorafx.strict": True},
    )
    # Dynamo wraps what a backend raises, with the name of the exception in its text.
    with pytest.raises(Exception, match=r"RewriteMissError: .* verification: outputs differ"):
        compiled(torch.randn(3, 24))


def test_the_generators_are_left_alone() -> None:
    model = peft_perceptron(lora_dropout=0.3).train()
    state = torch.get_rng_state()
    assert dorafx.verify(model, torch.ones(3, 24))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("how", "reason"),
    [("random", "other random numbers were drawn"), ("nan", "where the original gives")],
)
def test_what_only_a_whole_graph_shows(how: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = Layer(), torch.randn(5, 12, dtype=torch.float64)
    assert dorafx.verify(lambda value: _plain(layer, value), x)
    _sabotage(monkeypatch, how)
    report = dorafx.verify(lambda value: _plain(layer, value), x)
    assert any(c.pattern == "linear" and reason in c.reason for c in report.failures), str(report)
    assert not any(r.pattern == "linear" for r in report.log.rewrites)


def _plain(layer: Any, x: torch.Tensor) -> torch.Tensor:
    return next(iter(LINEAR.values()))(layer, x)


def test_a_stale_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from dorafx.runtime.store import NormStore

    entries: dict[Any, torch.Tensor] = {}

    def kept(self: Any, signature: str, *rest: Any) -> torch.Tensor | None:
        return entries.get(signature)

    def keep(self: Any, observed: Any, norm: torch.Tensor, *rest: Any) -> None:
        if observed is not None:
            entries[observed.key[0]] = norm

    monkeypatch.setattr(NormStore, "kept", kept)
    monkeypatch.setattr(NormStore, "keep", keep)
    layer, x = Layer(), torch.randn(1, 12, dtype=torch.float64)
    with torch.no_grad():
        report = dorafx.verify(lambda value: _plain(layer, value), x)
    assert any(c.pattern == "norm prologue" and "after parameters were written" in c.reason for c in report.failures)
    assert any(r.pattern == "norm prologue" for r in report.log.misses)


def test_gradients_that_are_nan_on_rows_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``n`` is zero the gradient of ``m`` is NaN; a rewrite that divides by no less than a small number loses it."""
    from dorafx.rewriter import apply

    right = apply._emit_norm
    layer, x = Layer(), torch.randn(5, 12, dtype=torch.float64)
    program = LINEAR["merged_weight_differentiable"]
    assert dorafx.verify(lambda value: program(layer, value), x)
    monkeypatch.setattr(apply, "_emit_norm", lambda *a: a[-1].call(torch.clamp_min, right(*a), 1e-30))
    report = dorafx.verify(lambda value: program(layer, value), x)
    assert any("on zeros" in c.reason and "where the original gives nan" in c.reason for c in report.failures), str(
        report
    )


def test_only_who_asks_pays() -> None:
    """Neither dorafx nor its backend imports what verifies."""
    lines = [
        "import sys, dorafx, dorafx.backend",
        "rooms = ('validation', 'graph_check', 'observation')",
        "sys.exit(any(f'dorafx.{r}' in sys.modules for r in rooms))",
    ]
    done = subprocess.run([sys.executable, "-c", "; ".join(lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_gradients_of_rounding_are_no_difference() -> None:
    """Of equal values an attention has no gradients of its scores: what is there is rounding, in any order of summation another."""
    layer = Layer()

    def program(x: torch.Tensor) -> torch.Tensor:
        scores = _plain(layer, x)
        return torch.softmax(scores * 1e-3, -1) @ torch.ones(10, 2, dtype=x.dtype)

    report = dorafx.verify(program, torch.randn(5, 12, dtype=torch.float64))
    assert report, str(report)


def test_observations_differ() -> None:
    from dorafx.observation import differences, observe

    p = torch.nn.Parameter(torch.randn(3, 4))
    x = torch.randn(2, 4)
    original = observe(lambda v: (v @ p.t(), v), (x,), [p])
    wrong = {
        "no longer shares memory": lambda v: (v @ p.t(), v.clone()),
        "no gradient": lambda v: ((v @ p.detach().t()).requires_grad_(), v),
        "other random numbers": lambda v: (torch.rand(1), (v @ p.t(), v))[1],
        "input 0 after the run": lambda v: (v.clone() @ p.t(), v.mul_(2)),
        "has strides": lambda v: ((p @ v.t()).t(), v),
        "dtype": lambda v: ((v @ p.t()).double(), v),
        "where the original raises no error": lambda v: v @ p,
    }
    assert not differences(original, observe(lambda v: (v @ p.t(), v), (x,), [p]))
    for sentence, program in wrong.items():
        seen = differences(original, observe(program, (x,), [p]))
        assert any(sentence in difference for difference in seen), (sentence, seen)
