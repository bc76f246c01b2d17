"""Which modules' DoRA computations are rewritten: the patterns of the options ``skip`` and ``only``."""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import translate

from dorafx.errors import DorafxWarning


@functools.lru_cache(maxsize=256)
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


@functools.lru_cache(maxsize=65536)
def matches(pattern: str, name: str) -> bool:
    """Whether a pattern (of :mod:`fnmatch`, case-sensitive) matches a module: its name, the end of its name from any dot on, or one of
    these of a module that contains it.

    >>> matches("lm_head", "base_model.model.lm_head"), matches("*.down_proj", "layers.0.mlp.down_proj"), matches("head", "lm_head")
    (True, True, False)
    """
    parts = name.split(".")
    ends = range(len(parts), 0, -1)
    return any(_compiled(pattern).match(".".join(parts[i:j])) for j in ends for i in range(j))


@dataclass(frozen=True)
class Exclusion:
    """Why a module is left alone.

    Attributes:
        option: ``"skip"`` or ``"only"``.
        text: for the log.
    """

    option: str
    text: str


@dataclass(frozen=True)
class Selection:
    """What ``skip`` and ``only`` leave alone.

    Attributes:
        skip: patterns of the modules that are left alone.
        only: patterns of the modules that are not; empty for all.
    """

    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.skip or self.only)

    def excluded(self, name: str) -> Exclusion | None:
        """Why a module is left alone; None if it is not.

        Args:
            name: of the module, as ``named_modules()`` gives it.
        """
        for pattern in self.skip:
            if matches(pattern, name):
                return Exclusion("skip", f"skipped by the option dorafx.skip={pattern!r}")
        if self.only and not any(matches(pattern, name) for pattern in self.only):
            return Exclusion("only", f"matched by no pattern of the option dorafx.only={','.join(self.only)!r}")
        return None

    def excluded_of(self, members: Iterable[str], path: str) -> Exclusion | None:
        """Why a module inside of equal ones that share a graph is left alone; None if it is not. It is where that holds for one of them,
        as they cannot be treated differently.

        Args:
            members: the names of the equal modules.
            path: the module's name relative to each of them.
        """
        names = [joined(member, path) for member in members]
        reasons = [(name, why) for name in names if (why := self.excluded(name)) is not None]
        if not reasons:
            return None
        name, why = reasons[0]
        return (
            why if len(reasons) == len(names) else Exclusion(why.option, f"shares its graph with {name!r}, {why.text}")
        )

    def unmatched(self, names: Collection[str]) -> list[tuple[str, str]]:
        """The patterns that match none of these modules: (``"skip"`` or ``"only"``, pattern)."""
        patterns = [("skip", pattern) for pattern in self.skip] + [("only", pattern) for pattern in self.only]
        return [(option, p) for option, p in patterns if not any(matches(p, name) for name in names)]


def joined(*parts: str) -> str:
    """A module's name from the names on the way to it, of which any may be empty."""
    return ".".join(part for part in parts if part)


_settled: set[tuple[str, str]] = set()
"""Patterns that have matched a module, or of which the user was told that they match none."""


def settle(selection: Selection, names: Collection[str]) -> None:
    """Warn of patterns that match no module of a model, as one that is mistyped; graphs of the model are not asked any more.

    Args:
        selection: the options.
        names: of all modules of the model.
    """
    for option, pattern in selection.unmatched(names):
        _warn(option, pattern, names, "of the model")
    _settled.update(("skip", p) for p in selection.skip)
    _settled.update(("only", p) for p in selection.only)


def settle_by_graph(selection: Selection, names: Collection[str]) -> None:
    """The same where only one graph is known, of which there may be more: a pattern that has matched in another is not reported, and no
    pattern twice.

    Args:
        selection: the options.
        names: of the modules in the graph.
    """
    unmatched = set(selection.unmatched(names))
    for option, patterns in (("skip", selection.skip), ("only", selection.only)):
        for pattern in patterns:
            if (option, pattern) in unmatched and (option, pattern) not in _settled:
                _warn(option, pattern, names, "in this graph")
            _settled.add((option, pattern))


def _warn(option: str, pattern: str, names: Collection[str], where: str) -> None:
    nothing = "nothing is left alone by it" if option == "skip" else "nothing is rewritten by it"
    ends = {end: None for name in names for end in (name.rpartition(".")[2], name) if end}
    close = difflib.get_close_matches(pattern.rpartition(".")[2].strip("*") or pattern, ends, 3)
    hint = f"; names that are close: {', '.join(map(repr, close))}" if close else ""
    warnings.warn(
        f"dorafx.{option}: no module {where} matches {pattern!r}, and {nothing}{hint}", DorafxWarning, stacklevel=4
    )
