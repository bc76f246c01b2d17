"""The page about ``dorafx check``: its table has every kind of finding with its severity."""

from __future__ import annotations

import re
from pathlib import Path

from dorafx.preflight.findings import KINDS
from dorafx.preflight.peft_files import REFUSED_QUANTIZATION

PAGE = (Path(__file__).resolve().parents[2] / "examples" / "guide" / "check.md").read_text(encoding="utf-8")


def test_kinds() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (error|warning|note) \|", PAGE, flags=re.MULTILINE)
    assert rows == [(kind, severity) for kind, (severity, _) in KINDS.items()]
    assert all(method.upper() in PAGE for method in REFUSED_QUANTIZATION)
