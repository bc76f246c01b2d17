"""What is public is written down in ``public_api.txt``, a line for each thing, and is not removed or changed by accident.

``DORAFX_WRITE_PAGES=1 pytest -m page tests/test_public_api.py`` adds what is new. It takes nothing away: a line is deleted by hand, in the
commit that removes what was deprecated.
"""

from __future__ import annotations

import argparse
import dataclasses
import enum
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import is_current

import dorafx
import dorafx.extension
import dorafx.ops
from dorafx.cli.main import _parser
from dorafx.log.counters import NormCounters
from dorafx.log.drawing import Drawing, DrawnNode, DrawnTerms
from dorafx.log.rewritelog import _READABLE, SCHEMA_VERSION
from dorafx.options import _CHOICES, EXPLAIN_SUFFIXES, Options
from dorafx.scope import SCOPES

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).with_name("public_api.txt")
HEAD = (
    "# What is public: examples/guide/stability.md says what that means, and tests/test_public_api.py how this file is written.\n"
    "# New lines: DORAFX_WRITE_PAGES=1 pytest -m page tests/test_public_api.py. Lines are deleted by hand.\n"
)
LAZY = ("TrainerCallback",)
"""Public names that import another library, and are not in ``__all__`` therefore."""
TERMS = ("Diag", "Expr", "Mat", "Poly")
"""A form asks them, and makes none itself; what they hold may change."""
RESULTS = (
    "Candidate",
    "CheckReport",
    "Composition",
    "CompositionPlan",
    "Explanation",
    "Finding",
    "NormFactors",
    "VerifyReport",
)
"""Only dorafx makes these, so that nobody else's calls depend on their arguments."""
OPERATORS = (
    "cast_linear",
    "compose",
    "compose_delta",
    "dequantize",
    "dora_linear",
    "row_norm",
    "row_norm_batched",
    "row_norm_quantized",
)
"""Those that ``dorafx.rewrite`` writes into programs, which people save."""
REQUIRED = ", required"


def parameters(name: str, function: Any) -> Iterator[str]:
    """A line for each parameter, so that a new one with a default is a new line and changes none."""
    for position, parameter in enumerate(inspect.signature(function).parameters.values()):
        if parameter.name in ("self", "cls"):
            continue
        kind = parameter.kind
        place = {
            kind.POSITIONAL_ONLY: f"{position}, by position only",
            kind.POSITIONAL_OR_KEYWORD: f"{position}",
            kind.VAR_POSITIONAL: "any number by position",
            kind.KEYWORD_ONLY: "by name",
            kind.VAR_KEYWORD: "any by name",
        }[kind]
        default = REQUIRED if parameter.default is parameter.empty else f", default {parameter.default!r}"
        if kind in (kind.VAR_POSITIONAL, kind.VAR_KEYWORD):
            default = ""
        yield f"{name} parameter {parameter.name}: {place}{default}"


def thing_of(module: Any, short: str) -> Iterator[str]:
    """What is public of one public name."""
    thing, name = getattr(module, short), f"{module.__name__}.{short}"
    if not inspect.isclass(thing):
        yield name
        yield from parameters(name, thing)
        return
    yield f"{name}: a class"
    if short in TERMS:
        return
    if issubclass(thing, Exception):
        yield from (
            f"{name} is a {base.__name__}"
            for base in thing.__mro__[1:]
            if base.__name__ not in ("BaseException", "object")
        )
        return
    if issubclass(thing, enum.Enum):
        yield from (f"{name} {member.name}: {member.value!r}" for member in thing)
    elif not getattr(thing, "_is_protocol", False) and short not in RESULTS:
        yield from parameters(name, thing)
    documented = inspect.cleandoc(thing.__doc__ or "").partition("\nAttributes:\n")[2]
    for line in re.findall(r"^ {4}(\w+(?:, \w+)*): ", documented, re.MULTILINE):
        yield from (f"{name}.{attribute}: an attribute" for attribute in line.split(", "))
    for attribute, value in vars(thing).items():
        function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        if attribute.startswith("_") or short in LAZY:  # transformers says what a callback's methods are
            continue
        if isinstance(function, property):
            yield f"{name}.{attribute}: an attribute"
        elif inspect.isfunction(function):
            yield f"{name}.{attribute}"
            yield from parameters(f"{name}.{attribute}", function)


def options() -> Iterator[str]:
    for field in dataclasses.fields(Options):
        yield f"option dorafx.{field.name}: default {field.default!r}"
    for name, values in {**_CHOICES, "explain": EXPLAIN_SUFFIXES}.items():
        yield from (f"option dorafx.{name} takes {value!r}" for value in values)
    yield from (f"scope {scope!r}" for scope in SCOPES)


def commands() -> Iterator[str]:
    (subparsers,) = (a for a in _parser()._actions if isinstance(a, argparse._SubParsersAction))
    yield "command dorafx --version"
    for command, parser in subparsers.choices.items():
        yield f"command dorafx {command}"
        for action in parser._actions if command != "bench" else ():  # what is measured, and how, may change
            if not isinstance(action, argparse._HelpAction):
                yield f"command dorafx {command} {', '.join(action.option_strings) or action.dest.upper()}"
                yield from (f"command dorafx {command} {action.dest} takes {c!r}" for c in action.choices or ())


def log_schema() -> Iterator[str]:
    yield f"log is written as version {SCHEMA_VERSION}"
    yield from (f"log is read of version {version}" for version in _READABLE)
    yield from (f"log {key}" for key in json.loads(dorafx.RewriteLog().to_json()))
    yield from (f"log norms {key}" for key in NormCounters().to_dict())
    yield from (f"log record {field.name}" for field in dataclasses.fields(dorafx.Record))
    yield from (f"log drawing {field.name}" for field in dataclasses.fields(Drawing))
    yield from (f"log drawing node {field.name}" for field in dataclasses.fields(DrawnNode))
    yield from (f"log drawing terms {field.name}" for field in dataclasses.fields(DrawnTerms))
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "patterns").glob("*.py"))
    forms = re.findall(r'^@pattern\(name="(\w+)"\)', sources, re.MULTILINE)
    yield from (f"log pattern {name}" for name in (*forms, "norm_only"))


def entry_points() -> Iterator[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    yield from (f"entry point console_scripts {name}" for name in project["scripts"])
    for group, points in project["entry-points"].items():
        yield from (f"entry point {group} {name}" for name in points)
    yield from (f"extra {name}" for name in project["optional-dependencies"] if name in ("bench", "peft"))
    yield "plugin of Axolotl dorafx.integrations.axolotl.DorafxPlugin"
    yield "import dorafx.ops registers the operators"


def operators() -> Iterator[str]:
    for name in OPERATORS:
        yield f"operator {getattr(torch.ops.dorafx, name).default._schema}"


def variables() -> Iterator[str]:
    """Of the environment."""
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dorafx").rglob("*.py"))
    yield from (f"variable {name}" for name in set(re.findall(r"""environ(?:\.get\(|\[)"(DORAFX_\w+)""", sources)))


def public() -> set[str]:
    lines = [line for name in (*dorafx.__all__, *LAZY) for line in thing_of(dorafx, name)]
    lines += [line for name in dorafx.extension.__all__ for line in thing_of(dorafx.extension, name)]
    parts = (options(), commands(), log_schema(), entry_points(), operators(), variables())
    return {*lines, *(line for part in parts for line in part)}


def recorded() -> set[str]:
    return {line for line in FILE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")}


def breaks(recorded: set[str], now: set[str]) -> list[str]:
    """What a program that uses dorafx as recorded may not find any more, or would have to do in addition."""
    known = {line.partition(" parameter ")[0].removesuffix(": a class") for line in recorded}
    demanded = [s for s in now - recorded if s.endswith(REQUIRED) and s.partition(" parameter ")[0] in known]
    return sorted(recorded - now) + sorted(f"{line} (new)" for line in demanded)


@pytest.mark.page
def test_nothing_public_is_removed_or_changed() -> None:
    now = public()
    if os.environ.get("DORAFX_WRITE_PAGES"):
        before = recorded() if FILE.exists() else set()
        is_current(FILE, HEAD + "".join(f"{line}\n" for line in sorted(before | now)))
    broken = breaks(recorded(), now)
    assert not broken, (
        "programs that use this would break. Keep it and deprecate it first, as examples/guide/stability.md says. If that was done, delete "
        f"its line in {FILE.name}, and say so in CHANGELOG.md under 'Removed' or 'Changed':\n" + "\n".join(broken)
    )
    new = sorted(now - recorded())
    assert not new, (
        "this is new, and public from now on. If it should be, DORAFX_WRITE_PAGES=1 pytest -m page tests/test_public_api.py adds it to "
        f"{FILE.name}, and CHANGELOG.md gets a line; if not, give it a leading underscore or leave it out of __all__:\n"
        + "\n".join(new)
    )


def test_what_breaks_programs() -> None:
    def one(a: int, *, b: int = 1) -> None: ...
    def renamed(x: int, *, b: int = 1) -> None: ...
    def another_default(a: int, *, b: int = 2) -> None: ...
    def less(a: int) -> None: ...
    def more(a: int, c: int = 0, *args: int, b: int = 1, d: str = "", **more: int) -> None: ...
    def demanding(a: int, *, b: int = 1, c: int) -> None: ...
    def in_front(c: int = 0, a: int = 0, *, b: int = 1) -> None: ...

    before = {"f", *parameters("f", one)}
    for function in (renamed, another_default, less, demanding, in_front):
        assert breaks(before, {"f", *parameters("f", function)}), function.__name__
    assert not breaks(before, {"f", *parameters("f", more), "g", *parameters("g", one)})
    assert breaks(before, set()) == ["f", "f parameter a: 0, required", "f parameter b: by name, default 1"]


def test_every_public_name_is_recorded() -> None:
    text = FILE.read_text(encoding="utf-8")
    for name in (*dorafx.__all__, *LAZY, *(f"extension.{name}" for name in dorafx.extension.__all__)):
        assert re.search(rf"^dorafx\.{re.escape(name)}(: a class)?$", text, re.MULTILINE), name
