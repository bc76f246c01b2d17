"""The tests find what they are there for: each of some twenty faults, planted in a copy of dorafx, fails the default run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import FAULTS, Fault

import dorafx

TESTS = Path(__file__).parents[1]
PACKAGE = Path(dorafx.__file__).parent


def copy_with(fault: Fault, folder: Path) -> None:
    """A copy of the package, its patterns included, with one fault in it."""
    shutil.copytree(PACKAGE, folder / "dorafx", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        PACKAGE.parent / "patterns", folder / "dorafx" / "patterns", ignore=shutil.ignore_patterns("__pycache__")
    )
    path = folder / "dorafx" / fault.file
    text = path.read_text(encoding="utf-8")
    assert text.count(fault.old) == 1, "the text that the fault changes"
    path.write_text(text.replace(fault.old, fault.new), encoding="utf-8")


@pytest.mark.parametrize("name", FAULTS)
def test_faults_can_be_planted(name: str) -> None:
    """Where a text has changed the fault is to be written anew, not to be planted in nothing."""
    text = (PACKAGE / FAULTS[name].file).read_text(encoding="utf-8")
    assert text.count(FAULTS[name].old) == 1


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("name", FAULTS)
def test_the_default_run_finds(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    copy_with(fault, tmp_path)
    run = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import dorafx, pytest; "
        f"assert dorafx.__file__.startswith({str(tmp_path)!r}), dorafx.__file__; sys.exit(pytest.main(sys.argv[1:]))"
    )
    arguments = [
        "-n",
        "0",
        "-x",
        "-q",
        "--show-capture=no",
        "-p",
        "no:cacheprovider",
        "-c",
        str(TESTS.parent / "pyproject.toml"),
    ]
    # What this run is limited to (DORAFX_SLOW_DEADLINE) is no limit of the one that it starts: one that skips finds nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("DORAFX_SLOW_")}
    result = subprocess.run(
        [sys.executable, "-c", run, *arguments, *(str(TESTS / test) for test in fault.tests)],
        cwd=tmp_path,
        env={**environment, "PYTHONDONTWRITEBYTECODE": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1, f"{result.stdout[-2000:]}\n{result.stderr[-1000:]}"
    print(next((line for line in result.stdout.splitlines() if line.startswith("FAILED")), ""))
