"""The notebook runs from top to bottom, and the outputs that are stored in it are those of such a run."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
from notebooks import execute, printed

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOTEBOOK = EXAMPLES / "notebook.ipynb"
STORE = "DORAFX_WRITE_PAGES=1 pytest -m slow tests/examples/test_notebook.py"
"""Runs the notebook and stores its outputs in it."""

nbformat = pytest.importorskip("nbformat")


def holds_what_it_promises(notebook: Any) -> None:
    """Before and after, the log, the report inline, a miss, and how it was mended."""
    text = printed(notebook)
    assert re.search(r"stock PEFT: \d+ ms a training step", text), text
    assert re.search(r"dorafx: \d+ ms a training step, before \d+ ms: \d+\.\d\d times as fast", text), text
    assert "14 modules rewritten, 0 missed" in text
    differences = [float(found) for found in re.findall(r"largest difference(?: of a logit)?: ([\d.e+-]+\d)", text)]
    assert len(differences) == 2 and max(differences) < 1e-4, differences
    assert "0 modules rewritten, 2 missed" in text
    flowing = " ".join(text.split())
    assert "is rounded to bfloat16 and then read with more digits" in flowing
    assert "what to do: Cast the factors" in flowing and "up: rounded-product, at cell.py:" in flowing
    assert "2 modules rewritten, 0 missed" in text.partition("rounded-product")[2]
    (report,) = [
        output.data["text/html"]
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "display_data"
    ]
    assert report.startswith("<iframe srcdoc=") and "&lt;svg" in report
    streams = {o.name for cell in notebook.cells for o in cell.get("outputs", []) if o.output_type == "stream"}
    assert streams == {"stdout"}, "a warning is shown to the reader"
    assert not re.search(r"ipykernel_|/home/|/tmp/|/Users/|[\w]/lib/python3", nbformat.writes(notebook))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs(tmp_path: Path) -> None:
    pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = execute(NOTEBOOK, tmp_path, seconds=800)
    if os.environ.get("DORAFX_WRITE_PAGES"):
        nbformat.write(notebook, NOTEBOOK)
    holds_what_it_promises(notebook)


def test_its_outputs_are_stored() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    holds_what_it_promises(notebook)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in codes] == list(range(1, len(codes) + 1)), f"run it whole: {STORE}"
    assert not any("execution" in cell.metadata for cell in codes), "time stamps change with every run"


def test_its_links_lead_to_files() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    assert links
    assert [link for link in links if not (EXAMPLES / link).exists()] == []
