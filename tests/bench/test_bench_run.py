"""Runs: order, failures, and every suite for real on a tiny model."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dorafx.bench import plan, run
from dorafx.bench.clock import Clock
from dorafx.bench.implementations import Task
from dorafx.bench.plan import SUITES, Settings, cases_of
from dorafx.bench.processes import JobError
from dorafx.bench.quantized import WEIGHTS
from dorafx.bench.results import Results
from dorafx.bench.suites import norm
from dorafx.bench.worker import configuration, request_for
from dorafx.cli import main
from dorafx.errors import DorafxError

TINY = ["--hidden", "64", "--rank", "4", "--tokens", "16", "--layers", "1", "--seconds", "0", "--threads", "1"]
FIGURES = {
    "norm": {"time", "largest allocation", "temporaries", "error"},
    "compose": {"forward", "forward + backward"},
    "layer": {"forward", "training step"},
    "model": {"prefill", "first prefill", "training step", "step of 4 micro-batches"},
    "decode": {"one token"},
    "generate": {"a token, dynamic cache", "a token, static cache"},
    "memory": {"saved", "temporaries", "peak"},
    "compile": {"compilation", "graphs", "graph breaks"},
    "host": {"one token"},
    "pass": {"pass", "nodes", "pass a node"},
}


OF_ADAPTERS = {"first prefill", "training step", "step of 4 micro-batches"}


def tiny(suite: str, **changes: Any) -> Settings:
    return Settings((suite,), hidden=(64,), rank=(4,), tokens=16, layers=(1,), seconds=0, rounds=1, **changes)


@pytest.mark.slow
def test_norm_for_real(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "norm.json"
    assert main(["bench", "norm", *TINY, "--rounds", "2", "-o", str(out), "--json"]) == 0
    results = Results.from_json(capsys.readouterr().out)
    assert results == Results.read(out)
    assert [row.name for row in results.rows] == ["dorafx", "peft", "dense", "chunked"]
    for row in results.rows:
        assert set(row.metrics) == FIGURES["norm"]
        assert len(row.metrics["time"].rounds) == 2
        assert all(len(samples) >= 3 for samples in row.metrics["time"].rounds)
    assert results.rows[0].metrics["largest allocation"].median < results.rows[2].metrics["largest allocation"].median
    assert set(results.ceilings) == {"copy", "matmul"}
    assert results.environment["threads"] == 1
    assert results.environment["versions"]["torch"] == torch.__version__
    assert results.settings["hidden"] == [64]


@pytest.mark.parametrize("weights", WEIGHTS[1:])
def test_norm_of_a_quantised_weight(weights: str) -> None:
    """Every implementation computes the same norm, dorafx without the dense weight that the others form first."""
    if weights == "nf4":
        pytest.importorskip("bitsandbytes")
    (case,) = cases_of("norm", tiny("norm", weights=weights))
    assert case.label == f"64x64 r4, {weights}"
    found = {}
    for name in ("dorafx", "dense", "chunked", "peft"):
        torch.manual_seed(0)
        task = Task(name, case.parameters, Clock("cpu", 0), torch.float32)
        left, right = task.random(64, 4), task.random(4, 64)
        found[name] = norm._of_quantized(task, weights, left, right)()
        torch.testing.assert_close(found[name], found["dorafx"], rtol=1e-4, atol=1e-4)
    assert found["dorafx"].std() > 0
    ours, dense = (configuration(request_for(tiny("norm"), n, case), print)["figures"] for n in ("dorafx", "dense"))
    assert set(ours) == FIGURES["norm"] - {"error"}
    assert ours["largest allocation"][1][0] < 64 * 64 * 4 / 8 < dense["largest allocation"][1][0]


class Fake:
    """In place of ``run_job``: notes what was asked for."""

    def __init__(self, failing: str = "") -> None:
        self.asked: list[str] = []
        self.failing = failing

    def __call__(self, job: Any, request: dict[str, Any], **unused: Any) -> dict[str, Any]:
        self.asked.append(request["name"])
        if request["name"] == self.failing:
            raise JobError("OutOfMemoryError: too much")
        figures = {"time": ["s", [1.0]]} if request["suite"] != "ceilings" else {"copy": ["B/s", [1.0]]}
        return {"figures": figures, "facts": {}}


def test_rounds_are_interleaved_and_turn_around(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = Fake()
    monkeypatch.setattr(run, "run_job", fake)
    run.run_bench(Settings(("norm",), ("dense",), hidden=(64,), rank=(4,), rounds=3))
    assert fake.asked == ["ceilings", "dorafx", "dense", "ceilings", "dense", "dorafx", "ceilings", "dorafx", "dense"]


def test_a_failing_configuration_is_a_row(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake("peft")
    monkeypatch.setattr(run, "run_job", fake)
    out = tmp_path / "x.json"
    assert main(["bench", "norm", *TINY, "--rounds", "2", "--against", "peft", "dense", "-o", str(out)]) == 1
    assert fake.asked.count("peft") == 1  # not tried again
    assert fake.asked.count("dense") == 2
    rows = {row.name: row for row in Results.read(out).rows}
    assert rows["peft"].error == "OutOfMemoryError: too much"
    assert "peft failed: OutOfMemoryError: too much" in capsys.readouterr().out


def test_failing_ceilings_end_the_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(run, "run_job", Fake("ceilings"))
    assert main(["bench", "norm", *TINY]) == 2
    assert "matmul rate failed: OutOfMemoryError" in capsys.readouterr().err


def test_an_interrupted_run_leaves_the_rounds_it_has(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake()

    def stopping(*args: Any, **kwargs: Any) -> Any:
        if len(fake.asked) == 4:
            raise KeyboardInterrupt
        return fake(*args, **kwargs)

    monkeypatch.setattr(run, "run_job", stopping)
    out = tmp_path / "x.json"
    assert main(["bench", "norm", *TINY, "--against", "dense", "-o", str(out)]) == 130
    assert [len(row.metrics["time"].rounds) for row in Results.read(out).rows] == [1, 1]


def test_suites_that_need_peft_say_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    find: Callable[[str], object] = run.importlib.util.find_spec
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "peft" else find(name))
    assert main(["bench", "model", *TINY]) == 2
    assert capsys.readouterr().err.strip() == "dorafx: bench model needs peft: pip install 'dorafx[peft]'"


@pytest.mark.default_cases("compile")
@pytest.mark.parametrize("suite", list(SUITES))
def test_suites_without_inductor(suite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here and with eager codegen, which is quick; what they measure is checked, not how fast it is."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setattr(plan, "PASS_LAYERS", (1, 2))
    monkeypatch.setattr(plan, "HOST_LAYERS", 1)
    settings = tiny(suite, **({"codegen": "eager"} if suite not in ("norm", "pass") else {}))
    names = ["dorafx", *(n for n in SUITES[suite].allowed if n in ("peft", "dense", "chunked"))]
    for case in cases_of(suite, settings):
        answers = {name: configuration(request_for(settings, name, case), print) for name in names}
        found = {name: answer["figures"] for name, answer in answers.items()}
        if "layer" in suite or "size" in case.parameters:
            layers = case.parameters["size"]["layers"] if suite != "layer" and "size" in case.parameters else 1
            assert answers["dorafx"]["facts"]["rewritten"] == (1 if suite == "layer" else 7 * layers)
        for figures in found.values():
            assert set(figures) >= FIGURES[suite]
            assert set(case.work) <= set(figures)
            assert all(samples and min(samples) >= 0 for _, samples in figures.values())
        if suite == "compile":
            assert found["dorafx"]["graphs"][1] == [2.0]
            assert found["dorafx"]["graph breaks"][1] == [0.0]
            assert 0 < found["dorafx"]["share of the pass"][1][0] < 1
        if suite == "memory":
            assert found["dorafx"]["saved"][1] < found["peft"]["saved"][1]
        if suite == "host" and case.parameters["scope"] == "model":
            every, each = found["dorafx"]["kept norms"][1], found["dorafx"]["a kept norm"][1]
            assert [7 * seconds for seconds in each] == pytest.approx(every)


@pytest.mark.slow
def test_the_pass_in_a_process_of_its_own() -> None:
    """Where nothing else has made PEFT's layers traceable."""
    program = (
        "from dorafx.bench import plan; plan.PASS_LAYERS = (1,)\n"
        "from dorafx.bench.worker import configuration, request_for\n"
        "settings = plan.Settings(('pass',), seconds=0, rounds=1)\n"
        "(case,) = plan.cases_of('pass', settings)\n"
        "answer = configuration(request_for(settings, 'dorafx', case), lambda what: None)\n"
        "assert answer['facts']['rewritten'] == 7, answer\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_figures_of_layers_that_were_not_rewritten_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = importlib.import_module("dorafx.backend")
    monkeypatch.setattr(backend, "rewrite_graph", lambda gm, *args, **how: backend.Program(gm))
    settings = tiny("layer", codegen="eager")
    with pytest.raises(DorafxError, match="did not rewrite everything: no DoRA layer was found"):
        configuration(request_for(settings, "dorafx", cases_of("layer", settings)[0]), print)


def test_options_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointing keeps fewer bytes, and every micro-batch is a forward and a backward."""
    cases = {c.label: c for c in cases_of("memory", tiny("memory"))}
    case = next(c for label, c in cases.items() if label.startswith("hidden"))
    plain, checkpointed = (
        configuration(request_for(tiny("memory", checkpointing=flag), "peft", case), print)["figures"]["saved"][1][0]
        for flag in (False, True)
    )
    assert checkpointed < plain / 2
    (model,) = cases_of("model", tiny("model", micro_batches=3, checkpointing=True))
    once = cases_of("model", tiny("model"))[0]
    assert model.work["training step"].flops > 3 * once.work["training step"].flops


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("suite", list(SUITES))
def test_suites_for_real(suite: str, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    # Inductor takes minutes for the dozens of graphs of a stock model; the layer and the cold compilation have them.
    anchors = [a for a in SUITES[suite].allowed if a != "peft-inductor" or suite not in ("model", "decode", "memory")]
    against = ["--against", *anchors] if anchors else []
    assert main(["bench", suite, *TINY, "--rounds", "1", *against, "-o", str(out)]) == 0
    results = Results.read(out)
    assert {row.name for row in results.rows} == {"dorafx", *anchors}
    for row in results.rows:
        assert set(row.metrics) >= FIGURES[suite] - (OF_ADAPTERS if row.name == "merged" else set()), row.name
    if suite == "compile":
        graphs = {row.name: row.metrics["graphs"].median for row in results.rows}
        assert graphs["dorafx"] == graphs["lora"] < graphs["peft-inductor"]
    if suite == "memory":
        layer = {row.name: row.metrics["saved"].median for row in results.rows[: len(anchors) + 1]}
        d_out, tokens = results.rows[0].parameters["d_out"], 16
        # One [tokens, d_out] tensor for the magnitude's gradient, and vectors.
        assert layer["dorafx"] <= layer["lora"] + 4 * (tokens * d_out + 4 * d_out)
        assert layer["dorafx"] < layer["peft"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("suite", list(SUITES))
def test_suites_on_a_gpu(suite: str, tmp_path: Path) -> None:
    out = tmp_path / "x.json"
    assert main(["bench", suite, *TINY, "--rounds", "1", "--device", "cuda", "-o", str(out)]) == 0
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["settings"]["dtype"] == "bfloat16"
    assert all(row["metrics"] for row in document["rows"])
