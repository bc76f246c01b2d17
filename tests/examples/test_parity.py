"""Training with dorafx goes where training with stock PEFT goes: the script in short, and what it measured at length."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"
LIMIT = 7.1e-4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_stay_together(dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "parity.json"
    small = ["--steps", "60", "--base-steps", "30", "--seeds", "0", "--hidden", "64", "--layers", "2", "--rank", "4"]
    command = [
        sys.executable,
        "-W",
        "ignore",
        str(BENCHMARKS / "parity.py"),
        *small,
        "--dtype",
        dtype,
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    (seed,) = json.loads(out.read_text())["seeds"]
    assert seed["rewritten"] == 14
    assert len(seed["stock"]) == len(seed["dorafx"]) == 60
    assert seed["difference"]["mean"] < LIMIT
    assert seed["stock"][-1] < seed["stock"][0]  # it learns
    assert out.with_suffix(".png").stat().st_size > 1000


def test_what_was_measured_at_length() -> None:
    document = json.loads((BENCHMARKS / "results" / "cpu-parity.json").read_text())
    assert [seed["seed"] for seed in document["seeds"]] == [0, 1, 2]
    assert all(len(seed["stock"]) == len(seed["dorafx"]) == 2000 for seed in document["seeds"])
    for seed in document["seeds"]:
        apart = [abs(a - b) for a, b in zip(seed["stock"], seed["dorafx"])]
        assert sum(apart) / len(apart) == pytest.approx(seed["difference"]["mean"])
        assert seed["difference"]["mean"] < LIMIT
    assert (BENCHMARKS / "results" / "cpu-parity.png").is_file()


def test_the_plot_is_drawn_again(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "parity.json"
    file.write_text((BENCHMARKS / "results" / "cpu-parity.json").read_text())
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "parity.py"), "--plot", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert file.with_suffix(".png").stat().st_size > 10_000
