"""The API reference: every public name is documented, the examples run, and ``examples/api.md`` is what the docstrings say.

``DORAFX_WRITE_PAGES=1 pytest -m page`` writes this page and the others.
"""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import WRITE, is_current

import dorafx
import dorafx.extension
from dorafx.match import forms

FILE = Path(__file__).parents[1] / "examples" / "api.md"


def members(name: str, thing: Any) -> Iterator[tuple[str, Any]]:
    """A public name and, of a class, its own public methods and properties."""
    yield name, thing
    if inspect.isclass(thing):
        for attribute, value in vars(thing).items():
            if not attribute.startswith("_"):
                value = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
                if inspect.isfunction(value) or isinstance(value, property):
                    yield f"{name}.{attribute}", value


LAZY = ("TrainerCallback",)
"""Public names that import another library, and are not in ``__all__`` therefore."""
PUBLIC = dict(entry for name in (*dorafx.__all__, *LAZY) for entry in members(name, getattr(dorafx, name)))


ALGEBRA = ("Diag", "Expr", "Mat", "Poly")
"""Terms: a form asks them, and makes none itself."""
EXTENSION = dict(
    entry
    for name in dorafx.extension.__all__
    for entry in (
        members(name, getattr(dorafx.extension, name))
        if name not in ALGEBRA
        else [(name, getattr(dorafx.extension, name))]
    )
)


def docstring(thing: Any) -> str:
    return inspect.cleandoc(thing.__doc__ or "")


@pytest.mark.parametrize("name", [*PUBLIC, *(f"extension.{name}" for name in EXTENSION)])
def test_documented(name: str) -> None:
    name, thing = name.removeprefix("extension."), {**PUBLIC, **EXTENSION}[name.removeprefix("extension.")]
    text = docstring(thing)
    assert len(text) > 15
    assert not text.startswith(f"{name}("), "dataclasses write such a docstring themselves"
    if name in ALGEBRA:
        return
    if dataclasses.is_dataclass(thing):
        for f in dataclasses.fields(thing):
            assert re.search(rf"\b{f.name}\b", text.partition("Attributes:")[2]), f"attribute {f.name}"
    elif inspect.isfunction(thing) and "." not in name:
        for parameter in inspect.signature(thing).parameters:
            assert re.search(rf"\b{parameter}\b", text.partition("Args:")[2]), f"parameter {parameter}"
    raised = {"optimize": ("ValueError", "TypeError", "DorafxError"), "rewrite": ("TypeError", "ValueError")}
    for error in raised.get(name, ()):
        assert error in text.partition("Raises:")[2]


def test_every_function_has_an_example() -> None:
    functions = [name for name, thing in PUBLIC.items() if inspect.isfunction(thing) and "." not in name]
    lacking = [name for name in functions if ">>>" not in docstring(PUBLIC[name])]
    assert not lacking


def test_examples_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, as a reader would who tries them one after the other; the package's own come first. The form that one of them
    registers is no other test's."""
    monkeypatch.setattr("dorafx.match.registry._FORMS", dict(forms()))
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    shared: dict[str, Any] = {"dorafx": dorafx}
    ran = 0
    for name, thing in {"dorafx": dorafx, **PUBLIC, "extension": dorafx.extension}.items():
        for example in finder.find(thing, name, module=False, globs=shared):
            example.globs = shared
            complaints = io.StringIO()
            result = runner.run(example, out=complaints.write, clear_globs=False)
            assert not result.failed, complaints.getvalue()
            ran += result.attempted
        if isinstance(shared.get("layer"), torch.nn.Module):
            dorafx.restore(shared["layer"])
    assert ran > 20


def reference() -> str:
    """The reference as Markdown."""
    parts = ["# API reference", "", f"Written from the docstrings by `{WRITE}`.", ""]
    parts += [_markdown(docstring(dorafx)), ""]
    parts += _section(PUBLIC, "dorafx")
    parts += ["# Forms of one's own: `dorafx.extension`", "", _markdown(docstring(dorafx.extension)), ""]
    parts += _section(EXTENSION, "dorafx.extension")
    return "\n".join(parts).rstrip() + "\n"


def _section(entries: dict[str, Any], module: str) -> list[str]:
    parts: list[str] = []
    for name, thing in entries.items():
        level = "##" if "." not in name else "###"
        parts += [f"{level} `{_heading(name, thing, module)}`", "", _markdown(docstring(thing)), ""]
    return parts


def _heading(name: str, thing: Any, module: str) -> str:
    full = f"{module}.{name}"
    if isinstance(thing, property) or inspect.isclass(thing):
        return full  # a class's fields are in its docstring
    signature = str(inspect.signature(thing))
    for noise in ("self, ", "cls, ", "(self)", "torch.nn.modules.module."):
        signature = signature.replace(noise, "()" if noise == "(self)" else "")
    return full + signature.replace("'", "")


def _markdown(text: str) -> str:
    text = re.sub(r":(?:func|class|data|mod|meth):`~?([^`]+)`", r"`\1`", text).replace("``", "`")
    lines: list[str] = []
    fenced = False
    for line in text.splitlines():
        if line.startswith(">>>") and not fenced:
            lines += ["```python"]
            fenced = True
        elif not line.strip() and fenced:
            lines += ["```"]
            fenced = False
        if fenced or not line.startswith("    "):
            section = re.fullmatch(r"(Args|Returns|Raises|Attributes):", line)
            lines += ["", f"**{section[1]}**", ""] if section else [line]
        elif line.startswith("     "):
            lines[-1] += f" {line.strip()}"
        else:
            lines.append(f"- {line.strip()}")
    if fenced:
        lines.append("```")
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


@pytest.mark.page
def test_the_written_reference_is_current() -> None:
    is_current(FILE, reference())
