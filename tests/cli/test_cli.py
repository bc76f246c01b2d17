"""The command line: what it prints, where it writes, and its exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
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
    assert (answer["graphs"], answer["graph_breaks"], answer["breaks"]) == (1, 0, [])
    assert answer["records"][0]["pattern"] == "linear"
    page = script.with_name("page.html")
    assert main(["explain", f"{script}:build", "--html", str(page)]) == 0
    assert "<svg" in page.read_text(encoding="utf-8")
    capsys.readouterr()


def test_explain_exits_with_1_on_a_miss(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{script.parent / 'missing.py'}:build"]) == 1
    assert "operator tanh" in capsys.readouterr().out


def test_explain_prints_terms(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = f"{script.parent / 'missing.py'}:build"
    assert main(["explain", missing, "--terms"]) == 1
    assert "  found   n = detach(‖weight + tanh(b·a)‖)\n  linear  n = detach(‖W + s·B·A‖)\n" in capsys.readouterr().out
    assert main(["explain", f"{script}:build", "--terms", "--json"]) == 0
    (terms,) = json.loads(capsys.readouterr().out)["terms"]
    assert (terms["pattern"], terms["norm"], terms["closest"]) == ("linear", "detach(‖weight + b·a‖)", None)
    assert main(["explain", missing, "--json"]) == 1
    assert "terms" not in json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "not of the form FILE.py:CALLABLE, nor a folder"),
        ("{folder}", "there is no adapter_config.json in"),
        ("no/such.py:build", "there is no file"),
        ("{script}:biuld", "no callable 'biuld'; it has"),
        ("{script}:wrong", "must return"),
        ("{script}:not_a_tuple", "args must be a tuple, not Tensor"),
        ("{script}:failing", "KeyError: "),
        ("{script}:bad_shape", "RuntimeError('a and b must have same reduction dim"),
    ],
)
def test_wrong_targets(script: Path, target: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", target.format(script=script, folder=script.parent)]) == 2
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


def test_a_reader_may_leave_early(tmp_path: Path) -> None:
    log, page = tmp_path / "log.jsonl", tmp_path / "page.html"
    log.write_text('{"status": "missed", "site": "a.b", "reason": "why"}\n', encoding="utf-8")
    code = "import sys; from dorafx.cli import main; print('ready', flush=True); sys.stdin.read(); sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "report", str(log), "-o", str(page)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdin and process.stdout and process.stderr
        assert process.stdout.readline() == b"ready\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


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


def adapter(folder: Path, **changes: Any) -> Path:
    """The folder of a PEFT adapter as ``save_pretrained`` writes it, without weights."""
    from peft import LoraConfig

    settings = {"r": 4, "lora_alpha": 8, "use_dora": True, "target_modules": ["q_proj", "down_proj"], **changes}
    LoraConfig(**{"task_type": "CAUSAL_LM", "lora_dropout": 0.1, **settings}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig

    folder = tmp_path_factory.mktemp("base")
    # A 65B shape in two layers: nobody has the memory that its weights would need twice.
    sizes = {"hidden_size": 8192, "intermediate_size": 22016, "num_attention_heads": 64, "num_key_value_heads": 64}
    config = LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=32000, architectures=["LlamaForCausalLM"])
    config.save_pretrained(folder)
    return folder


def test_explain_an_adapter_without_its_weights(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapter(tmp_path / "adapter")
    command = ["explain", str(folder), "--base", str(base), "--tokens", "16", "--json"]
    assert main(command) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["graphs"] == 1
    found = {(r["site"].rpartition(".")[2], r["d_out"], r["d_in"], r["rank"], r["pattern"]) for r in answer["records"]}
    assert found == {("q_proj", 8192, 8192, 4, "linear"), ("down_proj", 8192, 22016, 4, "linear")}
    assert len(answer["records"]) == 4

    # In training, found by its name, its architecture taken from the base model's configuration.
    folder = adapter(tmp_path / "other", task_type=None, base_model_name_or_path=str(base))
    assert main(["explain", str(folder), "--tokens", "16", "--train", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {r["pattern"] for r in answer["records"]} == {"linear_dropout"}


def test_explain_says_what_an_adapter_lacks(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = adapter(tmp_path / "a" / "adapter", base_model_name_or_path="meta-llama/none-here")
    for options, message in (
        ([], "the base model, 'meta-llama/none-here', has no config.json in or beside"),
        (["--base", str(tmp_path)], "there is no config.json in"),
        (["--base", str(base), "--tokens", "0"], "--tokens must be at least 1"),
    ):
        assert main(["explain", str(folder), *options]) == 2
        error = capsys.readouterr().err.strip().splitlines()
        assert len(error) == 1 and message in error[0]
    (folder / "adapter_config.json").write_text("{", encoding="utf-8")
    assert main(["explain", str(folder), "--base", str(base)]) == 2
    assert "adapter_config.json: not JSON" in capsys.readouterr().err


@pytest.mark.slow
def test_explain_a_plain_lora_adapter_with_random_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    folder = adapter(tmp_path, use_dora=False)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": 32}
    LlamaConfig(**sizes, num_hidden_layers=1).save_pretrained(folder)
    assert main(["explain", str(folder), "--random-weights", "--tokens", "8"]) == 0
    output = capsys.readouterr()
    assert "no DoRA computation was found" in output.out
    assert "note: the adapter is no DoRA adapter" in output.err


@pytest.mark.parametrize("arguments", [[], ["explian"], ["explain"], ["report", "x", "--colour"]])
def test_wrong_usage_is_one_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("dorafx") and line.endswith("--help)")


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


OPERATORS = (
    "row_norm tiled", "row_norm factored", "row_norms", "row_norm backward",
    "compose", "compose backward", "compose_delta", "compose_delta backward",
)  # fmt: skip


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["passed"] is True
    checks = {c["name"]: c for c in answer["checks"]}
    for package in ("torch", "triton", "peft", "transformers"):
        assert "tests ran with" in checks[package]["detail"] or "not installed" in checks[package]["detail"]
    assert checks["a layer in PEFT's spelling"]["detail"] == "rewritten whole"
    for operator in OPERATORS:
        for dtype in ("float32", "bfloat16", "float16"):
            assert checks[f"{operator} cpu {dtype}"]["passed"]
    assert checks["backend cpu float32"]["passed"]
    polyfills = [c["name"] for c in answer["checks"] if c["group"] == "polyfills"]
    assert "peft.utils.integrations.dequantize_module_weight" in polyfills
    block = answer["bug_report"].splitlines()
    assert block[0] == "```text" and block[-1] == "```"
    assert "operators: 25 of 25 hold" in block or "cuda" in answer["bug_report"]
    assert not any(str(Path.home()) in line for line in block)
    assert "save_repro" in answer["how_to_report"] and "DORAFX_REPRO=FOLDER" in answer["how_to_report"]


def test_doctor_reports_an_operator_that_cannot_run_or_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dorafx.ops import reference

    def broken(*args: object) -> None:
        raise RuntimeError("no kernel image\nand more")

    right = reference.compose
    monkeypatch.setattr(reference, "row_norm", broken)
    monkeypatch.setattr(reference, "compose", lambda *args: right(*args) * 1.5)
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert "  FAIL  row_norm tiled cpu float32: RuntimeError: no kernel image\n" in output
    assert "  FAIL  compose cpu float32: relative error 3.3e-01, at most 1e-06 allowed\n" in output
    assert "  ok    compose_delta cpu float32: " in output
    report = output.partition("```text")[2]
    assert "save_repro" in report and "attach the script: https://" in report
    assert "  FAIL row_norm tiled cpu float32: RuntimeError: no kernel image\n" in report


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


def test_imports_print_nothing() -> None:
    """What a command imports may have much to say of itself (PEFT's own imports: of GPUs' libraries that are not there)."""
    done = subprocess.run(
        [sys.executable, "-c", "import dorafx, dorafx.backend, dorafx.bench.preloaded"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""
