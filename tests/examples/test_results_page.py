"""The page of measurements says what the files beside it hold."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dorafx.bench.results import Results

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("page", BENCHMARKS / "page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_is_current(script: Any) -> None:
    assert (BENCHMARKS / "results" / "RESULTS.md").read_text(encoding="utf-8") == script.page(BENCHMARKS / "results"), (
        "run python examples/benchmarks/page.py"
    )


def test_verdicts_follow_the_figures(script: Any, tmp_path: Path) -> None:
    """A pass that took four seconds is not reached; what has no file is unmeasured."""
    document = json.loads((BENCHMARKS / "results" / "cpu-pass.json").read_text(encoding="utf-8"))
    what = "the pass (lift to rewrite), 64 layers as one graph | at most 3 s"
    for seconds, verdict in ((2.0, "2 s | reached"), (4.0, "4 s | not reached")):
        for row in document["rows"]:
            if row["case"] == "64 layers":
                row["metrics"]["pass"]["rounds"] = [[seconds] * 3]
        (tmp_path / "cpu-pass.json").write_text(json.dumps(document), encoding="utf-8")
        assert f"| {what} | {verdict} |" in script.page(tmp_path)
    text = script.page(tmp_path)
    assert "| prefill, the same | at most 1.15x |  | unmeasured |" in text
    assert "| norm 4096x4096 r16 | at most 0.02 ms (H200) |  | unmeasured |" in text


def test_the_worst_case_counts(script: Any, tmp_path: Path) -> None:
    shutil.copy(BENCHMARKS / "results" / "cpu-model.json", tmp_path)
    path = tmp_path / "cpu-model.json"
    results = Results.from_json(path.read_text(encoding="utf-8"))
    figures = {(row.suite, row.name): row.metrics for row in results.rows}
    wanted = figures["model", "dorafx"]["prefill"].median / figures["model", "lora"]["prefill"].median
    assert f"| prefill, the same | at most 1.15x | {wanted:.2f}x |" in script.page(tmp_path)
    assert script.ratio({"cpu-model": results}, "model", "prefill", "lora", wanted * 0.99).reached is False
    assert script.ratio({"cpu-model": results}, "model", "prefill", "peft", 0, 100).reached is False
