"""The wheel and the source distribution, as a release has them: built in isolation from a clean checkout, looked into, and installed."""

from __future__ import annotations

import email
import os
import shutil
import subprocess
import sys
import tarfile
import venv
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from build import ProjectBuilder
from build.env import DefaultIsolatedEnv
from pyproject_hooks import quiet_subprocess_runner

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
FOLDERS = (".ci", ".github", "dorafx", "examples", "patterns", "tests")
DATA = {"dorafx/py.typed", *(f"dorafx/log/report.{kind}" for kind in ("html", "css", "js"))}
METADATA = {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "top_level.txt", "licenses/LICENSE"}
EGG_INFO = {"PKG-INFO", "SOURCES.txt", "dependency_links.txt", "entry_points.txt", "requires.txt", "top_level.txt"}
LEFT_BEHIND = (
    ".venv/pyvenv.cfg",
    ".mypy_cache/3.11/cache.json",
    ".pytest_cache/README.md",
    ".tox/log.txt",
    "dist/dorafx-0.0.1.tar.gz",
    "dorafx-demo/log.json",
    "dorafx/__pycache__/api.cpython-311.pyc",
    "dorafx/log/report.html.4711.part",
    "dorafx/notes.txt",
    "examples/.ipynb_checkpoints/quickstart-checkpoint.py",
    "examples/benchmarks/__pycache__/page.cpython-311.pyc",
    "examples/dorafx-demo/report.html",
    "examples/guide/results.md.4711.part",
    "notes.txt",
    "shared/notes.md",
    "tests/.hypothesis/examples/0",
    "tests/.pytest_cache/v/cache/lastfailed",
    "tests/__pycache__/test_package.cpython-311.pyc",
    "tests/test_package.py.orig",
)
"""What work in a checkout leaves there, and no release may hold."""

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
print(dorafx.__file__, dorafx.patterns.__file__, dorafx.rewrite_log().to_html("report.html"), *sys.path, sep="\\n")
"""


@dataclass(frozen=True)
class Built:
    """Files of a release: the source distribution of a clean checkout and the wheel that is made of it, and both of a checkout in which
    somebody has worked."""

    sources: set[str]
    sdist: Path
    wheel: Path
    worked_sdist: Path
    worked_wheel: Path


def repository_files() -> set[str]:
    """What a clean checkout has."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0 and listed.stdout:
        return {name for name in listed.stdout.split("\0") if (ROOT / name).is_file()}
    # An unpacked source distribution.
    hidden = ("__pycache__", ".hypothesis", ".pytest_cache", ".ipynb_checkpoints", "dorafx-demo")
    files = [*(p for p in ROOT.iterdir() if p.is_file()), *(p for f in FOLDERS for p in (ROOT / f).rglob("*"))]
    names = {p.relative_to(ROOT).as_posix() for p in files if p.is_file() and not set(p.parts) & {*hidden}}
    return names - {"PKG-INFO", "setup.cfg"}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    sources, out = repository_files(), tmp_path_factory.mktemp("dist")
    clean, worked = (tmp_path_factory.mktemp(kind) / "dorafx" for kind in ("clean", "worked"))
    for name in sources:
        for checkout in (clean, worked):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    for name in LEFT_BEHIND:
        assert name not in sources
        (worked / name).parent.mkdir(parents=True, exist_ok=True)
        (worked / name).write_text("left behind", encoding="utf-8")
    with DefaultIsolatedEnv() as environment:
        isolated = True
        try:
            environment.install(ProjectBuilder(clean).build_system_requires)
        except subprocess.CalledProcessError as error:  # no index can be reached
            isolated = False
            warnings.warn(f"built with the setuptools that is here, not in isolation: {error.stderr!r}", stacklevel=1)

        def build(source: Path, kind: str) -> Path:
            """What ``python -m build`` does, with one environment for all builds."""
            if isolated:
                builder = ProjectBuilder.from_isolated_env(environment, source, runner=quiet_subprocess_runner)
                environment.install(builder.get_requires_for_build(kind))
            else:
                builder = ProjectBuilder(source, runner=quiet_subprocess_runner)
            return Path(builder.build(kind, out / source.parent.name))

        sdist = build(clean, "sdist")
        unpacked = tmp_path_factory.mktemp("unpacked")
        with tarfile.open(sdist) as archive:
            archive.extractall(unpacked)
        (source,) = unpacked.iterdir()
        return Built(sources, sdist, build(source, "wheel"), build(worked, "sdist"), build(worked, "wheel"))


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_holds_the_package_and_nothing_else(built: Built) -> None:
    modules = {name for name in built.sources if name.endswith(".py") and name.startswith("dorafx/")}
    patterns = {f"dorafx/{name}" for name in built.sources if name.endswith(".py") and name.startswith("patterns/")}
    assert len(patterns) > 3
    folder = f"dorafx-{version()}.dist-info"
    wanted = modules | patterns | DATA | {f"{folder}/{name}" for name in METADATA}
    files = contents(built.wheel)
    assert files.keys() == wanted, sorted(files.keys() ^ wanted)
    assert built.wheel.name == f"dorafx-{version()}-py3-none-any.whl"
    entries = files[f"{folder}/entry_points.txt"].decode()
    assert "dorafx = dorafx.cli:main" in entries and "dorafx = dorafx.backend:dorafx" in entries


def test_the_source_distribution_holds_the_repository_and_nothing_else(built: Built) -> None:
    made = {"PKG-INFO", "setup.cfg", *(f"dorafx.egg-info/{name}" for name in EGG_INFO)}
    for sdist in (built.sdist, built.worked_sdist):
        assert sdist.name == f"dorafx-{version()}.tar.gz"
        with tarfile.open(sdist) as archive:
            names = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
            executable = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile() and m.mode & 0o100}
        assert names == built.sources | made, sorted(names ^ (built.sources | made))
        assert ".ci/run" in executable


def test_the_wheel_of_the_source_distribution_is_that_of_the_tree(built: Built) -> None:
    assert contents(built.wheel) == contents(built.worked_wheel)


def version() -> str:
    """As ``dorafx/__init__.py`` says it, which nothing else repeats."""
    (line,) = [
        s for s in (ROOT / "dorafx/__init__.py").read_text(encoding="utf-8").splitlines() if "__version__ =" in s
    ]
    return line.split('"')[1]


def test_the_index_takes_both(built: Built) -> None:
    """Names, versions, classifiers and the README, which becomes the page there."""
    run([sys.executable, "-m", "twine", "--no-color", "check", "--strict", str(built.sdist), str(built.wheel)])
    metadata = email.message_from_bytes(contents(built.wheel)[f"dorafx-{version()}.dist-info/METADATA"])
    assert metadata["Version"] == version()
    assert metadata["License-Expression"] == "Apache-2.0"
    urls = dict(entry.split(", ", 1) for entry in metadata.get_all("Project-URL"))
    assert urls == PROJECT["urls"]
    assert urls.keys() >= {"Homepage", "Documentation", "Source", "Issues", "Changelog"}
    assert not any(c.startswith("License ::") for c in metadata.get_all("Classifier"))
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = contents(built.wheel)[f"dorafx-{version()}.dist-info/METADATA"]
    assert text.partition(b"\n\n")[2].strip() == (ROOT / "README.md").read_bytes().strip()
    # An index of packages refuses a requirement that names an address.
    assert not any(" @ " in required for required in metadata.get_all("Requires-Dist"))


@pytest.mark.timeout(600)
def test_the_installed_wheel_works_by_itself(built: Built, tmp_path: Path) -> None:
    """In a new environment that sees the packages of this one, and no checkout."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    python = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    run(
        [
            sys.executable,
            "-m",
            "pip",
            "--python",
            str(python),
            "install",
            "-q",
            "--no-deps",
            "--no-index",
            str(built.wheel),
        ]
    )
    purelib = Path(run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    shared = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    # A ``.pth`` file adds the folders, and leaves alone the ``.pth`` files in them: those of an editable installation do not run.
    (purelib / "shared.pth").write_text("\n".join(shared), encoding="utf-8")
    hidden = ("PYTHON", "DORAFX_", "TORCH_LOGS", "TORCH_TRACE")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    environment["PATH"] = os.pathsep.join((str(python.parent), os.environ["PATH"]))
    assert run(["dorafx", "--version"], tmp_path, environment).strip() == f"dorafx {version()}"
    assert "checks passed" in run(["dorafx", "doctor"], tmp_path, environment)
    package, patterns, report, *path = run([str(python), "-W", "ignore", "-c", USE], tmp_path, environment).splitlines()
    assert Path(package) == purelib / "dorafx" / "__init__.py"
    assert Path(patterns) == purelib / "dorafx" / "patterns" / "__init__.py"
    assert "<script" in (tmp_path / report).read_text(encoding="utf-8")
    assert not {str(ROOT), str(ROOT / "patterns")} & set(path)


def run(command: Sequence[str], cwd: Path = ROOT, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints."""
    if environment is not None:
        command = [shutil.which(command[0], path=environment["PATH"]) or command[0], *command[1:]]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout
