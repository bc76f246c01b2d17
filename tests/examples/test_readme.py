"""README.md: short enough to read, and what it says that dorafx prints is printed."""

from __future__ import annotations

import io
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from page_blocks import blocks_of, run_page
from torch import nn

import dorafx

README = Path(__file__).resolve().parents[2] / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_one_reads_it_in_five_minutes() -> None:
    assert len(TEXT.splitlines()) <= 150
    assert len(TEXT.split()) <= 1500
    assert max(map(len, TEXT.splitlines())) <= 140


def _printed(starts: str) -> str:
    """The text block that begins so, its lines joined."""
    (block,) = [b for b in blocks_of(TEXT) if b.language == "text" and b.shown.startswith(starts)]
    return block.shown


@pytest.mark.filterwarnings("ignore")
def test_what_its_blocks_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    run_page(README, tmp_path)
    printed = capsys.readouterr().out.splitlines()
    for line in _printed("1 graph").splitlines():
        assert line in printed


def _of_the_miss() -> str:
    """What is printed of a model with a layer that is left alone, on one line, without folders and the place in brackets."""
    from readme_names import MyLayer

    explanation = dorafx.explain(nn.Sequential(OrderedDict(head=MyLayer())), torch.randn(3, 64))
    with io.StringIO() as file:
        explanation.print(terms=True, file=file)
        printed = file.getvalue()
    return " ".join(re.sub(r"\S*readme_names\.py:\d+", "model.py:14", re.sub(r"\s+\[[^]]*\]", "", printed)).split())


def test_what_it_says_of_a_miss() -> None:
    assert " ".join(_printed("missed").split()) in _of_the_miss()


def test_what_it_says_of_terms() -> None:
    """The form is that of linear layers, as ``terms`` prints it beside a near miss."""
    printed = _of_the_miss()
    for line in _printed("y = ").splitlines():
        assert f"linear {line}" in printed
