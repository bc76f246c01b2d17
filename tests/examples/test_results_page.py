"""The page of measurements says what the files beside it hold."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from pages import is_current

from dorafx.bench.results import Metric, Results, Row

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("page", BENCHMARKS / "page.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.page
def test_is_current(script: Any) -> None:
    is_current(script.PAGE, script.page(BENCHMARKS / "results"))


@pytest.mark.page
def test_the_readme_is_current(script: Any) -> None:
    text = script.README.read_text(encoding="utf-8")
    lines = script.what_you_get(script.read(BENCHMARKS / "results"))
    is_current(script.README, script.with_region(text, lines))


def test_the_picture_of_the_readme_shows_its_table(script: Any) -> None:
    """``python examples/benchmarks/page.py`` draws it anew; what it shows stands in its metadata."""
    from PIL import Image

    files = script.read(BENCHMARKS / "results")
    with Image.open(script.PICTURE) as picture:
        assert json.loads(picture.info["Description"]) == script.compared(files)
    table = "\n".join(script.what_you_get(files)).replace("*", "")
    for what, figures in script.compared(files).items():
        assert f"| {what} | {' | '.join(figures)} |" in table


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
    assert "| prefill repeated | at most 1.03x |  | unmeasured |" in text
    assert "| norm 4096x4096 r16 | at most 0.02 ms (H200) |  | unmeasured |" in text


def test_the_worst_case_counts(script: Any, tmp_path: Path) -> None:
    shutil.copy(BENCHMARKS / "results" / "cpu-model.json", tmp_path)
    path = tmp_path / "cpu-model.json"
    results = Results.from_json(path.read_text(encoding="utf-8"))
    figures = {(row.suite, row.name): row.metrics for row in results.rows}
    wanted = figures["model", "dorafx"]["prefill"].median / figures["model", "lora"]["prefill"].median
    assert f"| prefill repeated | at most 1.03x | {wanted:.2f}x |" in script.page(tmp_path)
    assert script.ratio({"cpu-model": results}, "model", "prefill", "lora", wanted * 0.99).reached is False
    assert script.ratio({"cpu-model": results}, "model", "prefill", "peft", 0, 100).reached is False


QWEN = "qwen3-32b, 4 layers, r384, 4096 tokens"


def row(suite: str, case: str, name: str, parameters: dict[str, Any] | None = None, **medians: float) -> Row:
    metrics = {
        key.replace("_", " "): Metric("B" if key == "peak" else "s", [[value]]) for key, value in medians.items()
    }
    return Row(suite, case, name, parameters or {}, metrics)


def on_gpu(*rows: Row, time: str = "2026-01-01", **settings: Any) -> Results:
    environment = {"device": "NVIDIA H200", "time": time, "versions": {"torch": "2.11.0", "triton": "3.6.0"}}
    return Results({"device": "cuda", **settings}, environment, rows=list(rows))


def verdicts(lines: list[str]) -> dict[str, str]:
    return {what.strip(): f"{measured.strip()} | {want.strip()}" for _, what, measured, want, _ in (
        line.split("|") for line in lines if line.count("|") == 4 and not line.startswith("| |") and "---" not in line
    )}  # fmt: skip


def test_a_part_of_the_measurements_gives_a_part_of_the_table(script: Any) -> None:
    micro = on_gpu(
        row("norm", "8192x8192 r384", "dorafx", time=1.2e-4, time__host=1.0, temporaries=0.0),
        row("norm", "8192x8192 r384, fp32 factors", "dorafx", {"factors": "float32"}, time=1e-6),
        row("norm", "8192x8192 r384", "peft", time=8e-4),
    )
    model = on_gpu(
        row("model", f"{QWEN}, bf16 adapters", "dorafx", prefill=0.1, peak=100.0),
        row("model", f"{QWEN}, bf16 adapters", "lora", prefill=0.1, peak=99.0),
        row("model", f"{QWEN}, bf16 adapters", "peft", prefill=0.5),
        row("model", f"{QWEN}, autocast, fp32 adapters", "dorafx", prefill=0.115),
        row("model", f"{QWEN}, autocast, fp32 adapters", "lora", prefill=0.1),
        Row("model", f"{QWEN}, autocast, fp32 adapters", "peft", left_out="no time"),
    )
    lines = list(script.on_a_gpu({"gpu-micro": micro, "gpu-model": model}))
    assert lines[0].startswith("On NVIDIA H200 (torch 2.11.0, Triton 3.6.0), bf16")
    found = verdicts(lines)
    assert found["norm 8192x8192 r384 (bf16)"] == "120 us | at most 0.13 ms (H200): reached"  # not that of fp32 factors
    inference = "32B-shaped model, r384, 4096 tokens, against stock PEFT: inference"
    assert found[inference] == "5.0x | at least 4x faster: reached"
    assert found["prefill, against plain LoRA"] == "1.15x | at most 1.12x: not reached"  # the worst case counts
    peak = "peak memory of a training step, 32B-shaped, against plain LoRA"
    assert found[peak] == "1.01x | at most 1.02x: reached"
    (unmeasured,) = [line for line in lines if line.startswith("Not measured: ")]
    assert "norm 4096x4096 r16" in unmeasured and "prefill, against plain LoRA" not in unmeasured
    assert "| | dorafx | plain LoRA | PEFT |" in lines and "| | dorafx | PEFT |" in lines
    assert f"| model {QWEN}, bf16 adapters: prefill | 100 ms | 100 ms | 500 ms |" in lines
    assert f"| model {QWEN}, autocast, fp32 adapters: prefill | 115 ms | 100 ms |  |" in lines
    assert not any("host" in line for line in lines)


def test_a_ratio_is_of_one_run_the_last_that_has_it(script: Any) -> None:
    case = f"{QWEN}, CUDA graphs"
    first = on_gpu(row("decode", case, "dorafx", one_token=2.0), row("decode", case, "lora", one_token=1.0))
    second = on_gpu(
        row("decode", case, "dorafx", one_token=1.0), row("decode", case, "lora", one_token=1.0), time="2026-01-02"
    )
    alone = on_gpu(row("decode", case, "dorafx", one_token=9.0), time="2026-01-03")
    files = {"gpu-a": second, "gpu-b": first, "gpu-c": alone}
    assert script.ratio(files, "decode", "one token", "lora", 1.05).measured == "1.00x"


def test_dry_runs_and_other_devices_count_for_nothing(script: Any) -> None:
    fast = row("norm", "8192x8192 r384", "dorafx", time=1e-6)
    dry = on_gpu(fast, quick=True)
    cpu = on_gpu(fast)
    cpu.settings["device"] = "cpu"
    assert list(script.on_a_gpu({"gpu-dry": dry, "gpu-cpu": cpu})) == [script.NOTHING]
    assert list(script.measured_on({"gpu-dry": dry, "gpu-cpu": cpu}, cuda=False)) == ["gpu-cpu"]


def test_what_dora_takes_over_lora(script: Any) -> None:
    case = "llama-3-8b, 4 layers, r16, 2048 tokens"
    files = {
        "gpu-decode": on_gpu(
            row("overhead", case, "dorafx", one_token=1.02, training_step=2.1),
            row("overhead", case, "lora", one_token=1.0, training_step=2.0),
            row("overhead", case, "peft", one_token=2.4),
        )
    }
    lines = list(script.on_a_gpu(files))
    assert (
        f"DoRA through dorafx takes over plain LoRA: one token +2.0% ({case}); training step +5.0% ({case})." in lines
    )
    assert f"stock PEFT's DoRA takes over plain LoRA: one token +140.0% ({case})." in lines


def test_the_readme_says_what_one_gains_on_the_best_device_that_was_measured(script: Any) -> None:
    """A row needs all three of one run and case; whole models count before layers, and a GPU before a CPU."""
    assert list(script.what_you_get({})) == ["Nothing has been measured yet: `dorafx bench --help`."]
    cpu = [
        row("model", "hidden 1024, 2 layers, r128", name, training_step=time, first_prefill=3.0)
        for name, time in (("dorafx", 1.1), ("peft", 3.0), ("lora", 1.0))
    ]
    single = [row("memory", "2816x1024 r128", name, peak=1024.0) for name in ("dorafx", "peft", "lora")]
    model = [row("memory", "hidden 1024, 2 layers, r128", name, peak=2048.0) for name in ("dorafx", "peft", "lora")]
    on_cpu = Results(
        {"device": "cpu"}, {"threads": 2, "versions": {"torch": "2.13.0+cpu"}}, rows=[*cpu, *single, *model]
    )
    lines = list(script.what_you_get({"cpu": on_cpu}))
    assert "| training step | 3 s | **1.1 s** | 1 s |" in lines
    assert "| peak memory of a training step | 2 KiB | **2 KiB** | 2 KiB |" in lines
    assert not any("token" in line for line in lines)
    assert "2 CPU cores, torch 2.13.0, float32" in lines[-2] and "has changed takes 3 s" in lines[-1]
    assert lines[-1].endswith("**Not measured on a GPU yet.**")
    shown = [
        {"name": f"PEFT DoRA, {name}", "step": step, "graphs": graphs}
        for name, step, graphs in (("Inductor", 2.0, 64), ("dorafx", 1.0, 3))
    ]
    *_, last = script.what_you_get({"cpu": on_cpu, "cpu-demo": {"results": shown}})
    assert "takes 2 s by Inductor, in 64 graphs, and 1 s by dorafx, in 3." in last
    decoding = [
        row("decode", QWEN, name, one_token=time) for name, time in (("dorafx", 1.0), ("peft", 9.0), ("lora", 1.0))
    ]
    lines = list(script.what_you_get({"cpu": on_cpu, "gpu": on_gpu(*decoding)}))
    assert lines[2:3] == ["| one token (decoding) | 9 s | **1 s** | 1 s |"]
    assert "NVIDIA H200, torch 2.11.0, bf16" in lines[-2] and "Not measured" not in lines[-1]
    lines = list(script.what_you_get({"cpu": on_cpu, "gpu": on_gpu(*decoding[:2])}))
    assert "CPU cores" in lines[-2]


def test_only_the_marked_region_is_written(script: Any) -> None:
    text = f"before\n{script.BEGIN}\nold\nlines\n{script.END}\nafter\n"
    new = script.with_region(text, ["new"])
    assert new == f"before\n{script.BEGIN}\nnew\n{script.END}\nafter\n"
    assert script.with_region(new, ["new"]) == new
    for broken in ("no marks", script.BEGIN, text + text):
        with pytest.raises(ValueError, match="there is no region between"):
            script.with_region(broken, ["new"])
