"""README and guide: every code block runs, and no paragraph, list item or table cell is longer than one reads at once."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from page_blocks import blocks_of, complaints, long_texts, run_page, texts_of

import dorafx
from dorafx.match import forms

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "examples" / "guide"
PAGES = {page.stem: page for page in [ROOT / "README.md", *sorted(GUIDE.glob("*.md"))]}
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
EXTRAS = frozenset(
    re.findall(
        r"^(\w+) = \[", PROJECT.partition("[project.optional-dependencies]")[2].partition("\n[")[0], re.MULTILINE
    )
)
NEEDS = {
    "integrations": ("accelerate", "diffusers"),
    "quantised": ("bitsandbytes",),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}
"""Packages that not every environment has."""
SLOW = {
    "benchmarks",
    "benchmarks-gpu",
    "check",
    "control",
    "export",
    "generation",
    "integrations",
    "log",
    "quickstart",
    "reporting",
}
"""Pages whose blocks take more than some ten seconds, for the slow run."""

WRITTEN = {"control": ("explanation.html", "explanation.json"), "reporting": ("repro.py",)}
"""Files that a page's blocks promise."""
PRINTED = {"integrations": "{'backend': 'dorafx'}", "serving": "default 0.", "export": "(7, 5, 32)"}
"""What they print."""
REWRITES = {"control", "reporting"}
"""Pages after which the process's log has rewrites."""


def _runs(page: str) -> bool:
    try:
        return any(block.code for block in blocks_of(PAGES[page].read_text(encoding="utf-8")))
    except ValueError:
        return True  # which the test of this page then says


# The README's run in tests/examples/test_readme.py, which reads what they print.
RUNNING = [
    pytest.param(page, marks=pytest.mark.slow if page in SLOW else ())
    for page in PAGES
    if page != "README" and _runs(page)
]


@pytest.mark.parametrize("page", RUNNING)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(600)
def test_blocks_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    monkeypatch.setattr(
        "dorafx.match.registry._FORMS", dict(forms())
    )  # a form that a page registers is no other test's
    run_page(PAGES[page], tmp_path)
    assert PRINTED.get(page, "") in capsys.readouterr().out
    for written in WRITTEN.get(page, ()):
        assert (tmp_path / written).exists(), written
    if page in REWRITES:
        assert dorafx.rewrite_log().rewrites


@pytest.mark.parametrize("page", PAGES)
def test_blocks_are_what_they_seem(page: str) -> None:
    """What runs instead of a block is the same but for sizes; extras of dorafx that are installed exist; and each has a language."""
    text = PAGES[page].read_text(encoding="utf-8")
    assert not complaints(text, EXTRAS)
    without = [f"line {block.line}" for block in blocks_of(text) if block.shown and not block.language]
    assert not without, f"blocks without a language: {without}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_exist(page: str) -> None:
    """Files of the repository that are named in backquotes."""
    named = re.findall(r"`((?:dorafx|examples|patterns|tests)/[\w/.-]+)`", PAGES[page].read_text(encoding="utf-8"))
    assert not [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES)
def test_no_long_texts(page: str) -> None:
    long = long_texts(PAGES[page].read_text(encoding="utf-8"))
    assert not long, "\n".join(long)


def test_commands_that_are_not_run_are_those_of_ci() -> None:
    """How the README says that one sets up and tests: CI does the same, with options of its own."""
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    shown = [
        block.shown for block in blocks_of(PAGES["README"].read_text(encoding="utf-8")) if ".venv/bin" in block.shown
    ]
    parts = {part.strip() for block in shown for line in block.splitlines() for part in line.split("#")[0].split("&&")}
    assert "python3 -m venv .venv" in parts and "python3 -m venv .venv" in ci
    assert ".venv/bin/pip install -e '.[test]'" in parts and ".venv/bin/pip install -q -e '.[test]'" in ci
    assert ".venv/bin/pytest" in parts and re.search(r"^\.venv/bin/pytest( --durations=\d+)?$", ci, re.MULTILINE)
    assert ".venv/bin/dorafx demo" in parts  # tests/cli/test_cli.py runs it


PAGE = """# A page

<!-- run
x = 1
-->

```python
y = x + 1
print(y)
```

1. An item

   <!-- run instead
   sizes = [1, 2]
   -->

   ```python
   sizes = [1024, 2048]
   ```

```bash
python3 -m venv .venv && .venv/bin/pip install -e '.[test]'
echo one \\
  two > file.txt   # a comment
.venv/bin/python -c "print(3)" >> file.txt
```

<!-- not run: wants eight GPUs -->
```python
import nowhere
```

<!-- run
z = sum(sizes) + y
-->

```text
no code
```
"""


def test_how_blocks_run(tmp_path: Path) -> None:
    page = tmp_path / "a-page.md"
    page.write_text(PAGE, encoding="utf-8")
    folder = tmp_path / "folder"
    folder.mkdir()
    module = run_page(page, folder)
    assert (module.y, module.z) == (2, 5)
    assert (folder / "file.txt").read_text() == "one two\n3\n"
    assert Path.cwd() != folder
    assert [b.reason for b in blocks_of(PAGE) if b.reason] == ["wants eight GPUs"]
    assert (folder / "page_a_page.py").read_text().splitlines()[7] == PAGE.splitlines()[7] == "y = x + 1"


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("```python\n1 / 0\n```\n", ZeroDivisionError),
        ("```bash\nfalse\necho on\n```\n", RuntimeError),
        ("<!-- run instead\n1\n-->\n\nText.\n\n```python\n1\n```\n", ValueError),
        ("<!-- run instead\n1\n-->\n", ValueError),
        ("<!-- not run -->\n```python\n1\n```\n", ValueError),
        ("<!-- run this\n1\n-->\n", ValueError),
    ],
)
def test_what_is_wrong_raises(code: str, error: type[Exception], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(code, encoding="utf-8")
    with pytest.raises(error):
        run_page(page, tmp_path)


def test_what_runs_instead_is_the_same_code() -> None:
    page = "<!-- run instead\ntrain(steps=2)\n-->\n```python\nmodel.train(steps=2000)\n```\n"
    assert complaints(page, EXTRAS) == ["line 2: what runs instead lacks model"]
    page = "<!-- run instead\ndorafx demo --hidden 64\n-->\n```bash\ndorafx demo --hidden 4096 --layers 3\n```\n"
    assert complaints(page, EXTRAS) == ["line 2: what runs instead lacks --layers"]
    assert complaints("```bash\npip install 'dorafx[bench,nothing]'\n```\n", EXTRAS) == ["line 2: no extra nothing"]


def test_lengths_of_texts() -> None:
    text = "# A title\n\nOne [two](three.md) `four five`\nsix.\n\n- a\n\n  b\n  - c d\n\n| e f | g |\n|---|---|\n| h<br>i | j |\n\n> k\n>\n> l\n"
    words = [words.split() for _, words in texts_of(text)]
    assert words == [
        ["A", "title"],
        ["One", "two", "four", "five", "six."],
        ["c", "d"],
        ["a", "b"],
        ["e", "f"],
        ["g"],
        ["h", "i"],
        ["j"],
        ["k", "l"],
    ]
    assert long_texts("one " * 81) and not long_texts("one " * 80)
    assert long_texts("!!! note\n\n    " + "one " * 81 + "\n") == [
        "line 3: 81 words: one one one one one one one one …"
    ]
