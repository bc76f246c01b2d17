"""The page about ``dorafx check``: its code runs, and its table has every kind of finding with its severity."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from dorafx.cli.main import main
from dorafx.preflight.findings import KINDS
from dorafx.preflight.peft_files import REFUSED_QUANTIZATION

GUIDE = Path(__file__).resolve().parents[2] / "examples" / "guide"
PAGE = (GUIDE / "check.md").read_text(encoding="utf-8")
ZERO_ROWS = (GUIDE / "zero-rows.md").read_text(encoding="utf-8")


def test_code() -> None:
    """Rows of zeros have a page of their own."""
    for page in (PAGE, ZERO_ROWS):
        torch._dynamo.reset()
        (block,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
        exec(block, {})


def test_commands(capsys: Any) -> None:
    """Every command is one that the parser takes; there is no adapter of that name."""
    commands = re.findall(r"^dorafx (check .*)$", PAGE, flags=re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        assert main(command.split()) == 2
        assert "there is no adapter 'ADAPTER'" in capsys.readouterr().err


def test_kinds() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (error|warning|note) \|", PAGE, flags=re.MULTILINE)
    assert rows == [(kind, severity) for kind, (severity, _) in KINDS.items()]
    assert all(method.upper() in PAGE for method in REFUSED_QUANTIZATION)
