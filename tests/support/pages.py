"""Pages that are made of the code and its tests: each is held to what makes it, and one command writes all of them again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["WRITE", "is_current"]

WRITE = "DORAFX_WRITE_PAGES=1 pytest -m page"
"""Writes every page; without the variable it fails where one is not current."""


def is_current(path: Path, text: str) -> None:
    """Assert that a page says ``text``; write it first, where pages are to be written."""
    if os.environ.get("DORAFX_WRITE_PAGES"):
        # At once: another test may be reading the page to write another part of it.
        written = path.with_name(f"{path.name}.{os.getpid()}.part")
        written.write_text(text, encoding="utf-8")
        written.replace(path)
    assert path.read_text(encoding="utf-8") == text, f"{path.name} is not current: {WRITE}"
