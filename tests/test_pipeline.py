"""The pipeline itself: what importing it does, what it returns, and where the log's seconds come from."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from integration_support import captured_graph, peft_perceptron
from torch import fx

import dorafx
from dorafx import RewriteMissError, capture, pipeline, rewrite_log
from dorafx.options import Options
from dorafx.pipeline import STAGES, rewrite_graph

UNTOUCHED = """
import torch
from peft.tuners.lora import dora, layer, variants
from torch._dynamo.backends.distributed import DDPOptimizer

def state():
    functions = {id(v): (v.__code__, dict(v.__dict__)) for module in (dora, layer, variants) for kind in vars(module).values()
                 if isinstance(kind, type) for v in vars(kind).values() if hasattr(v, "__code__")}
    return functions, dict(vars(DDPOptimizer)), torch._dynamo.config.shallow_copy_dict()

before = state()
import dorafx, dorafx.pipeline
import sys
assert "dorafx.backend" not in sys.modules
assert state() == before
import dorafx.backend
assert state() != before, "the backend is the door with effects: this comparison sees them"
"""


def captured() -> fx.GraphModule:
    capture.install()
    return captured_graph(peft_perceptron(), torch.randn(3, 24))


def test_importing_the_road_changes_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", UNTOUCHED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_program_has_what_came_of_it() -> None:
    graph = captured()
    log = dorafx.RewriteLog()
    program = rewrite_graph(graph, Options(verify=True), 7, ("a", "b"), prologue=True, log=log)
    assert rewrite_log().records == []
    assert [r.graph for r in log.records] == [7] * 4
    assert sorted(r.site.split(".")[0] for r in log.records) == ["a", "a", "b", "b"]
    assert program.log.records == log.records and program.log.drawings == log.drawings
    assert len(program.norms) == 2 and program.error is None
    assert program.checks and all(check.passed for check in program.checks)


def test_the_log_has_the_seconds_of_each_station() -> None:
    graph = captured()
    for verify in (False, True):
        log = dorafx.RewriteLog()
        rewrite_graph(graph, Options(verify=verify), prologue=True, log=log)
        assert tuple(log.seconds) == STAGES
        spent = {stage for stage, seconds in log.seconds.items() if seconds > 0}
        assert spent == set(STAGES) - (set() if verify else {"verify"})
        again = dorafx.RewriteLog.from_json(log.to_json())
        assert again.seconds == log.seconds
        once = dict(log.seconds)
        log.extend((), seconds=once)
        assert log.seconds == {stage: 2 * seconds for stage, seconds in once.items()}
        log.clear()
        assert log.seconds == {}


@pytest.mark.parametrize("seconds", [[], {"plan": -1}, {"plan": "long"}, {"plan": True}, {"plan": float("nan")}])
def test_seconds_that_are_none(seconds: Any) -> None:
    import json

    with pytest.raises(ValueError, match=r"'seconds' must be an object|seconds of 'plan' must be a number from 0"):
        dorafx.RewriteLog.from_json(json.dumps({"dorafx_log": 2, "seconds": seconds}))


def test_what_is_raised_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("of a station")

    graph = captured()
    monkeypatch.setattr(pipeline, "make_plan", broken)
    log = dorafx.RewriteLog()
    with pytest.warns(dorafx.DorafxWarning, match="of a station"):
        program = rewrite_graph(graph, Options(), prologue=True, log=log)
    assert program.graph is graph and not program.norms
    assert isinstance(program.error, ZeroDivisionError)
    assert [r.status for r in log.records] == ["missed"] and "of a station" in log.records[0].reason
    with pytest.raises(ZeroDivisionError):
        rewrite_graph(graph, Options(strict=True), log=log)


def test_strict_raises_after_the_log_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def unlike(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (w + torch.tanh(b @ a)).norm(dim=1)

    graph = captured_graph(unlike, torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2))
    log = dorafx.RewriteLog()
    with pytest.raises(
        RewriteMissError, match="1 candidates were not rewritten; the first is the graph: operator tanh"
    ):
        rewrite_graph(graph, Options(strict=True), log=log)
    assert len(log.misses) == 1
