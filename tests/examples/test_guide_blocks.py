"""The code of pages of the guide runs, one block after another."""

from __future__ import annotations

import re
import sys
import types
import warnings
from pathlib import Path

import pytest

import dorafx

GUIDE = Path(__file__).parents[2] / "examples" / "guide"


@pytest.mark.parametrize("page", ["control", "reporting"])
def test_blocks(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (GUIDE / f"{page}.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType(page)
    monkeypatch.setitem(sys.modules, page, module)
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    for number, block in enumerate(blocks):
        file = tmp_path / f"{page}_{number}.py"
        file.write_text(block, encoding="utf-8")  # so that tracebacks show it
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            exec(compile(block, str(file), "exec"), vars(module))
    written = {path.name for path in tmp_path.iterdir()}
    assert written >= {"control": {"explanation.html", "explanation.json"}, "reporting": {"repro.py"}}[page]
    assert dorafx.rewrite_log().rewrites
