"""The structure of the package: which part may import which, and where torch's private API may be used."""

from __future__ import annotations

import ast
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(path for folder in ("dorafx", "patterns") for path in (ROOT / folder).rglob("*.py"))
PUBLIC = [path for path in FILES if "_compat" not in path.parts]

OWN = frozenset({"self", "cls"})
ENUMS = frozenset({"_missing_", "_name_", "_value_"})
"""What Python documents for classes of enumerations."""
TORCHS = frozenset({"_version", "_cdata", "_base", "_parameters", "_buffers", "_modules"})
"""Attributes of tensors, storages and modules, whatever else has one of that name."""


def private_uses(source: str) -> Iterator[str]:
    """What a module uses of torch that begins with an underscore: modules, functions, attributes of tensors and of graphs' nodes.

    An attribute of an object of any other class is told from torch's by being set somewhere in this package."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            names = [node.module or "", *(alias.name for alias in node.names)]
            if any(part.startswith("_") for name in names for part in name.split(".")):
                yield f"line {node.lineno}: from {node.module} import {', '.join(names[1:])}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("torch.") and "._" in alias.name:
                    yield f"line {node.lineno}: import {alias.name}"
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            base = node.value
            if isinstance(base, ast.Name) and base.id in OWN:
                continue
            if ast.unparse(base).startswith("torch.ops.") or node.attr in ENUMS | {"_replace"}:
                continue  # the name of an operator; what named tuples and enumerations have for everyone
            if node.attr not in DEFINED or node.attr in TORCHS:
                yield f"line {node.lineno}: {ast.unparse(node)}"


def defined(source: str) -> Iterator[str]:
    """Names that begin with an underscore and that a module defines: functions, classes, constants, attributes, slots."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        yield part.id
                    elif (
                        isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self"
                    ):
                        yield part.attr


DEFINED = frozenset(name for path in PUBLIC for name in defined(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", PUBLIC, ids=lambda path: str(path.relative_to(ROOT)))
def test_private_api_of_torch(path: Path) -> None:
    """It is in ``dorafx/_compat`` alone."""
    assert list(private_uses(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch._inductor import config",
        "from torch.fx.graph import _Namespace",
        "torch._C._current()",
        "tensor._version",
        "node._dynamo_source = None",
    ],
)
def test_what_counts_as_private(line: str) -> None:
    assert list(private_uses(line))


def test_imports() -> None:
    """No circle of imports, none that runs up: ``[tool.importlinter]`` in ``pyproject.toml`` says which part stands on which."""
    if importlib.util.find_spec("importlinter") is None:
        pytest.skip("import-linter is not installed")
    program = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout
