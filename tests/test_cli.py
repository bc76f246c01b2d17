"""The command line: what it prints, where it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dorafx.cli import main

MODEL = """
import torch
from torch import nn
import torch.nn.functional as F


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 6), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(8, 2))
        self.m = nn.Parameter(self.weight.norm(dim=1))

    def forward(self, x):
        n = (self.weight + torch.{between}(self.b @ self.a)).norm(dim=1).detach()
        return self.m / n * (F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b))


def build():
    return Layer(), (torch.randn(3, 6),)


def wrong():
    return 3
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "mymodel.py"
    path.write_text(MODEL.replace("{between}", "clone"), encoding="utf-8")
    (tmp_path / "missing.py").write_text(MODEL.replace("{between}", "tanh"), encoding="utf-8")
    return path


def test_explain(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{script}:build"]) == 0
    assert "1 graphs, 0 graph breaks" in capsys.readouterr().out
    assert main(["explain", f"{script}:build", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["graphs"] == 1
    assert answer["records"][0]["pattern"] == "linear"


def test_explain_exits_with_1_on_a_miss(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{script.parent / 'missing.py'}:build"]) == 1
    assert "operator tanh" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "not of the form FILE.py:CALLABLE"),
        ("no/such.py:build", "there is no file"),
        ("{script}:biuld", "no callable 'biuld'; it has"),
        ("{script}:wrong", "must return"),
    ],
)
def test_wrong_targets(script: Path, target: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", target.replace("{script}", str(script))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"status": "missed", "site": "a.b", "reason": "why"}\n', encoding="utf-8")
    page = tmp_path / "page.html"
    assert main(["report", str(log), "-o", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["missed"] == 1
    assert "a.b" in page.read_text(encoding="utf-8")
    log.write_text("rubbish", encoding="utf-8")
    assert main(["report", str(log)]) == 2
    assert "not a dorafx log" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "absent.json")]) == 2


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    checks = {c["name"]: c for c in answer}
    assert checks["torch"]["passed"]
    assert checks["row_norm cpu float32"]["passed"]
    assert "peft.utils.integrations.dequantize_module_weight" in [c["detail"] for c in answer]


@pytest.mark.slow
def test_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The main job on a tiny model, through the installed console script."""
    script = Path(sys.executable).with_name("dorafx")
    command = [
        str(script),
        "demo",
        "--hidden",
        "64",
        "--layers",
        "1",
        "--rank",
        "4",
        "--tokens",
        "16",
        "--repeats",
        "1",
        "--json",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stderr
    results = {r["name"]: r for r in json.loads(done.stdout)["results"]}
    ours, stock = results["PEFT DoRA, dorafx"], results["PEFT DoRA, Inductor"]
    assert (ours["breaks"], ours["rewrites"], ours["misses"]) == (0, 7, 0)
    assert stock["breaks"] > 20
    assert ours["graphs"] == results["plain LoRA, Inductor"]["graphs"]
    assert ours["max_difference"] < 1e-4
    for name in ("log.json", "report.html", "results.json"):
        assert (tmp_path / "dorafx-demo" / name).stat().st_size > 100


def test_demo_refuses_wrong_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--hidden", "100"]) == 2
    assert "hidden must be a multiple of 64" in capsys.readouterr().err
    assert main(["demo", "--repeats", "0"]) == 2
