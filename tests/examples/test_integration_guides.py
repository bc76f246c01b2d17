"""The guides to other tools, to serving and to export: their Python runs as it stands there, one block after the other."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

GUIDE = Path(__file__).resolve().parents[2] / "examples" / "guide"
NEEDS = {
    "integrations.md": ("accelerate", "diffusers"),
    "serving.md": (),
    "export.md": ("onnx", "onnxscript", "onnxruntime"),
}
PRINTS = {"integrations.md": "{'backend': 'dorafx'}", "serving.md": "default 0.", "export.md": "(7, 5, 32)"}


@pytest.mark.default_cases("serving.md")
@pytest.mark.parametrize("page", NEEDS)
def test_blocks_run(page: str, tmp_path: Path) -> None:
    for package in NEEDS[page]:
        pytest.importorskip(package)
    text = (GUIDE / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(blocks) >= 2
    program = "\n".join(blocks)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert PRINTS[page] in done.stdout


@pytest.mark.parametrize("page", NEEDS)
def test_short_blocks_and_true_links(page: str) -> None:
    text = (GUIDE / page).read_text(encoding="utf-8")
    prose = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    for block in prose.split("\n\n"):
        if not block.startswith("|"):
            assert len(block.split()) <= 80, block
    for target in re.findall(r"\]\(([^)#]+)", prose):
        assert (GUIDE / target).exists(), target
    for target in re.findall(r"`((?:tests|examples)/[\w/.]+)`", text):
        assert (GUIDE.parents[1] / target).exists(), target
