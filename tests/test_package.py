"""The wheel and the source distribution hold everything, and a wheel is enough for ``torch.compile(backend="dorafx")``."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Where there is no Triton (macOS, Windows), and without an import of dorafx.
USE = """
import sys
sys.modules["triton"] = None
import torch
import torch.nn.functional as F

w, a, b, x = (torch.randn(*s) for s in ((20, 24), (3, 24), (20, 3), (4, 24)))

def layer(x):
    return (F.linear(x, w) + x @ a.T @ b.T) / (w + b @ a).norm(dim=1)

assert not any(name.split(".")[0] == "dorafx" for name in sys.modules)
compiled = torch.compile(layer, backend="dorafx", fullgraph=True, options={"dorafx.codegen": "eager"})
torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)

import dorafx, dorafx.patterns, dorafx.ops.dispatch
assert [r.pattern for r in dorafx.rewrite_log().rewrites] == ["linear"]
assert not dorafx.ops.dispatch.available()
print(dorafx.__file__, dorafx.patterns.__file__)
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist and a wheel, built of a copy of the sources."""
    source, out = tmp_path_factory.mktemp("source") / "dorafx", tmp_path_factory.mktemp("dist")
    hidden = shutil.ignore_patterns(".git", ".venv", "__pycache__", "*.egg-info", "build", ".*_cache", "shared")
    shutil.copytree(ROOT, source, ignore=hidden)
    for kind in ("sdist", "wheel"):
        build = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
        command = [sys.executable, "-W", "ignore", "-c", build, str(out)]
        done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    return out


DATA = {"dorafx/py.typed", *(f"dorafx/log/report.{kind}" for kind in ("html", "css", "js"))}


def _modules() -> set[str]:
    here = {str(p.relative_to(ROOT)) for p in (ROOT / "dorafx").rglob("*.py")}
    return here | {f"dorafx/patterns/{p.name}" for p in (ROOT / "patterns").glob("*.py")}


def test_wheel(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    assert _modules() | DATA == {n for n in names if n.startswith("dorafx/")}
    (metadata,) = tmp_path.glob("*.dist-info")
    assert (metadata / "licenses" / "LICENSE").is_file()
    entries = (metadata / "entry_points.txt").read_text()
    assert "dorafx = dorafx.cli:main" in entries and "dorafx = dorafx.backend:dorafx" in entries
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", USE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(path.startswith(str(tmp_path)) for path in done.stdout.split()), done.stdout


def test_source_distribution(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    wanted = {"LICENSE", "README.md", "pyproject.toml", ".ci/run", *DATA}
    for folder in ("dorafx", "patterns", "tests", "examples"):
        wanted |= {str(p.relative_to(ROOT)) for p in (ROOT / folder).rglob("*.py")}
    assert wanted <= names, sorted(wanted - names)
