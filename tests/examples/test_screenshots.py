"""The pictures of the report in the guide: they are there, small, and a script takes them anew."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WIDTHS = {
    "report.png": 1280,
    "report-dark.png": 1280,
    "report-missed.png": 1280,
    "report-cut.png": 1040,
    "report-phone.png": 2 * 390 + 24,
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def width(picture: Path) -> int:
    head = picture.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return int(struct.unpack(">I", head[16:20])[0])


def run(*arguments: str, path: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", str(EXAMPLES / "site" / "screenshots.py"), *arguments]
    environment = os.environ if path is None else {**os.environ, "PATH": path}
    return subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)


@pytest.mark.parametrize("name", WIDTHS)
def test_the_guide_has_it(name: str) -> None:
    picture = EXAMPLES / "guide" / "images" / name
    assert width(picture) == WIDTHS[name]
    assert picture.stat().st_size < 200_000


@pytest.mark.slow
@pytest.mark.skipif(not (CHROMIUM and shutil.which("chromedriver")), reason="no Chromium with its driver is installed")
def test_they_are_taken_anew(tmp_path: Path) -> None:
    for module in ("selenium", "PIL", "peft", "transformers"):
        pytest.importorskip(module)
    done = run("--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert {picture.name: width(picture) for picture in tmp_path.glob("*")} == WIDTHS


def test_without_chromium_it_says_so(tmp_path: Path) -> None:
    done = run("--out", str(tmp_path), path=str(tmp_path))
    assert done.returncode == 1
    assert "screenshots.py needs Chromium with its driver, selenium and Pillow" in done.stderr
    assert not list(tmp_path.iterdir())
