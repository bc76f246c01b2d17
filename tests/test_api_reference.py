"""The API reference, ``examples/guide/api.md`` and ``extension.md``: every public name is documented, and the examples run.

MkDocs makes the pages of the docstrings; ``tests/examples/test_site.py`` looks for every public name there.
"""

from __future__ import annotations

import dataclasses
import doctest
import inspect
import io
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dorafx
import dorafx.extension
from dorafx.match import forms


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


@pytest.mark.parametrize("name", ["", *PUBLIC, "extension.", *(f"extension.{name}" for name in EXTENSION)])
def test_markup(name: str) -> None:
    """Markdown, as the site wants it: references are [`dorafx.optimize`][], and examples a section of their own."""
    if name in ("", "extension."):
        thing: Any = dorafx.extension if name else dorafx
    else:
        thing = EXTENSION[name.removeprefix("extension.")] if name.startswith("extension.") else PUBLIC[name]
    text = docstring(thing)
    assert not re.search(r":\w+:`", text), "a role of reStructuredText"
    before, _, _ = text.partition("\nExamples:\n")
    assert ">>>" not in before
    for title, identifier in re.findall(r"\[`([^`]+)`\]\[([\w.]*)\]", text):
        path = (identifier or title).split(".")
        assert path[0] == "dorafx"
        found: Any = dorafx
        for part in path[1:]:
            found = getattr(found, part)
