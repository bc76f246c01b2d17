"""The index of the examples holds each file, and says of each script what its first lines say."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
INDEX = (EXAMPLES / "README.md").read_text(encoding="utf-8")
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("*.py"))
ROW = re.compile(r"^\| \[([^]]+)\]\(([^)]+)\) \| (.+?) \| (.+?) \|(?: (.+?) \|)?$", re.MULTILINE)
ROWS = {target: cells for _, target, *cells in ROW.findall(INDEX)}


def test_every_file_is_in_the_index() -> None:
    measuring = {
        f"benchmarks/{path.name}" for path in (EXAMPLES / "benchmarks").iterdir() if path.suffix in (".py", ".sh")
    }
    assert set(ROWS) - {"guide", "benchmarks", "site"} == {*SCRIPTS, *measuring, "site/screenshots.py"}
    for notebook in EXAMPLES.glob("*.ipynb"):
        assert f"]({notebook.name})" in INDEX


def test_scripts_stand_apart_from_results_and_pages() -> None:
    beside = {path.name for path in EXAMPLES.iterdir() if path.is_file()} - set(SCRIPTS)
    # The site's configuration stands where MkDocs looks for it.
    assert beside - {"README.md", "notebook.ipynb", "mkdocs.yml"} == set()
    assert not [path for path in (EXAMPLES / "guide").rglob("*.py")]
    assert {path.suffix for path in (EXAMPLES / "benchmarks" / "results").iterdir()} <= {".json", ".png"}


@pytest.mark.parametrize("name", SCRIPTS)
def test_first_lines_say_what_it_shows_and_how_long_it_takes(name: str) -> None:
    text = ast.get_docstring(ast.parse((EXAMPLES / name).read_text(encoding="utf-8")))
    assert text is not None
    shows, lead, *_ = text.split("\n\n")
    found = re.match(
        r"Takes about (\d+ (?:s|min)) on two CPU cores\. Needs (.+?)(?:; downloads nothing)?\.(?:\n|$)", lead
    )
    assert found is not None, lead
    assert ROWS[name] == [" ".join(shows.split()), *found.groups()]


def test_links_lead_to_files() -> None:
    targets = re.findall(r"\]\(([^)#:]+)\)", INDEX)
    assert [t for t in targets if not (EXAMPLES / t).exists()] == []
