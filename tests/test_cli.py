"""The command line: what it prints, where it writes, and its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dorafx.cli import main

MODEL = """
from __future__ import annotations

from dataclasses import dataclass

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


@dataclass
class Config:
    size: int = 5


def bad_shape():
    print("building")
    return nn.Linear(3, Config().size), (torch.randn(2, 7),)


def failing():
    raise KeyError("first\\nsecond")


def not_a_tuple():
    return Layer(), torch.randn(3, 6)


class Closed(nn.Module):
    def forward(self):
        return torch.ones(2) + 1


def bare():
    return Closed()


def noisy():
    print("noise")
    return build()
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "mymodel.py"
    path.write_text(MODEL.replace("{between}", "clone"), encoding="utf-8")
    (tmp_path / "missing.py").write_text(MODEL.replace("{between}", "tanh"), encoding="utf-8")
    return path


def test_explain(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{script}:build"]) == 0
    assert "1 graph, 0 graph breaks" in capsys.readouterr().out
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
        ("{script}:not_a_tuple", "args must be a tuple, not Tensor"),
        ("{script}:failing", "KeyError: "),
        ("{script}:bad_shape", "RuntimeError('a and b must have same reduction dim"),
    ],
)
def test_wrong_targets(script: Path, target: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", target.replace("{script}", str(script))]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.strip().splitlines()) == 1


def test_explain_keeps_what_the_model_prints_out_of_the_json(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{script}:noisy", "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["graphs"] == 1
    assert "noise" in output.err


def test_explain_a_model_without_arguments(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{script}:bare"]) == 0
    assert "1 graph, 0 graph breaks" in capsys.readouterr().out


def test_debug_shows_the_traceback(script: Path) -> None:
    with pytest.raises(KeyError):
        main(["explain", f"{script}:failing", "--debug"])


def test_a_script_does_not_replace_a_loaded_module(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "json.py").write_text(
        "import torch\n\ndef build():\n    return torch.ones, ((2,),)\n", encoding="utf-8"
    )
    before = sys.modules["json"]
    main(["explain", f"{tmp_path / 'json.py'}:build"])
    capsys.readouterr()
    assert sys.modules["json"] is before


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
    for operator in ("row_norm", "compose", "compose_delta"):
        assert checks[f"{operator} cpu float32"]["passed"]
    assert "peft.utils.integrations.dequantize_module_weight" in [c["detail"] for c in answer]


def test_doctor_reports_an_operator_that_cannot_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dorafx.ops import reference

    def broken(*args: object) -> None:
        raise RuntimeError("no kernel image\nand more")

    monkeypatch.setattr(reference, "row_norm", broken)
    assert main(["doctor"]) == 1
    assert "FAIL  row_norm cpu float32: RuntimeError: no kernel image\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("version", "parts"), [("2.13.0+cpu", (2, 13)), ("2.12rc1", (2, 12)), ("5", (5, 0)), ("x", (0, 0))]
)
def test_versions(version: str, parts: tuple[int, int]) -> None:
    from dorafx.doctor import _parts

    assert _parts(version) == parts


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells a peak that is not inherited")
def test_peak_memory_is_the_process_own() -> None:
    ballast = bytearray(400 << 20)
    light = (
        "import importlib.util as u, sys; s = u.spec_from_file_location('m', sys.argv[1]); m = u.module_from_spec(s); "
    )
    light += "s.loader.exec_module(m); print(m.peak_resident_bytes())"
    from dorafx.bench import memory

    done = subprocess.run([sys.executable, "-c", light, memory.__file__], capture_output=True, text=True, check=True)
    assert int(done.stdout) < len(ballast) // 4
    own = memory.peak_resident_bytes()
    assert own is not None
    assert own > len(ballast)


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


def _dies(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGTERM)
    return {}


def _raises(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    raise ValueError("it broke")


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("job", "message"), [(_dies, "ended by signal 15"), (_raises, "ValueError: it broke")])
def test_demo_says_how_a_configuration_ended(
    job: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dorafx.demo.run", job)
    assert main(["demo", "--out", str(tmp_path / "out"), "--json"]) == 2
    assert f"the configuration 'PEFT DoRA, eager' failed: {message}" in capsys.readouterr().err


def test_demo_refuses_wrong_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--hidden", "100"]) == 2
    assert "hidden must be a multiple of 64" in capsys.readouterr().err
    assert main(["demo", "--repeats", "0"]) == 2
