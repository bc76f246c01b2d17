"""The script that runs PEFT's own tests with dorafx: what it counts, and when it fails."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("peft_suite.py")
TESTS = """
import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model


def dora(inject=False):
    config = LoraConfig(target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    return inject_adapter_in_model(config, model) if inject else get_peft_model(model, config)


@pytest.mark.parametrize("inject", [False, True])
def test_dora_forward(inject):
    model = dora(inject)
    assert torch.isfinite(model(torch.randn(20, 8))).all()


def test_dora_added():
    model = dora()
    model.add_adapter("other", LoraConfig(target_modules=["0"], use_dora=True))
    assert model(torch.randn(20, 8)).shape == (20, 8)


def test_dora_that_nobody_passes():
    raise AssertionError


def test_of_something_else():
    raise AssertionError
"""
STOCK_ONLY = """

def test_dora_stock_only():
    assert all(module._compiled_call_impl is None for module in dora().modules() if "Linear" == type(module).__name__)
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("stock_only", [False, True])
def test_outcomes(tmp_path: Path, stock_only: bool) -> None:
    file = tmp_path / "test_of_peft.py"
    file.write_text(TESTS + (STOCK_ONLY if stock_only else ""), encoding="utf-8")
    result = run(str(file))
    lines = result.stdout.splitlines()
    counts = json.loads(lines[0].removeprefix("with dorafx: "))
    assert counts["models"] >= 4 and counts["rewritten"] >= 3 and counts["missed"] == []
    extra = int(stock_only)
    assert json.loads(lines[-1]) == {
        "tests": 4 + extra,
        "passed without dorafx": 3 + extra,
        "of these passed with it": 3,
        "passed with dorafx only": 0,
    }
    assert result.returncode == extra
    assert ("passes without dorafx only (failed): " in result.stdout) == stock_only


def test_file_that_is_not_there(tmp_path: Path) -> None:
    result = run(str(tmp_path / "test_nothing.py"))
    assert result.returncode == 2 and "no such file" in result.stderr
