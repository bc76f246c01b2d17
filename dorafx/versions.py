"""The versions that dorafx needs and those it was tested with: the single source for ``pyproject.toml``, README.md,
``examples/guide/versions.md``, ``dorafx doctor`` and the tests."""

from __future__ import annotations

import importlib.metadata
import re
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Versions:
    """The supported versions of a package.

    Attributes:
        minimum: the oldest that dorafx works with.
        tested: those that the tests were run with, oldest first.
    """

    minimum: str
    tested: tuple[str, ...]

    @property
    def range(self) -> str:
        """The minor versions that were tested, as ``"2.11 to 2.15"``."""
        return f"{_text(self.tested[0])} to {_text(self.tested[-1])}"

    def is_too_old(self, version: str) -> bool:
        """Whether dorafx cannot work with a version."""
        return minor(version) < minor(self.minimum)

    def is_untested(self, version: str) -> bool:
        """Whether a version is newer than all that were tested; patch releases of these are not."""
        return minor(version) > minor(self.tested[-1])


PYTHON = ("3.10", "3.11", "3.12", "3.13")
VERSIONS = {
    "torch": Versions("2.11", ("2.11.0", "2.13.0", "2.14.1", "2.15.0")),
    "peft": Versions("0.15", ("0.15.2", "0.16.0", "0.17.1", "0.18.1", "0.19.1", "0.20.0", "0.21.2")),
    "transformers": Versions("4.57", ("5.17.0", "5.20.2", "5.23.0", "5.24.0")),
    "triton": Versions("3.6", ("3.6.0", "3.8.0", "3.9.0")),
}
OPTIONAL = frozenset({"peft", "transformers", "triton"})
"""Packages that dorafx works without."""


def minor(version: str) -> tuple[int, int]:
    """``(2, 12)`` of ``"2.12.1+cu130"``, and of ``"2.12rc1"``, which counts as 2.12."""
    match = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(match[1]), int(match[2] or 0)) if match else (0, 0)


def untested() -> dict[str, str]:
    """The packages of this process that are newer than all that were tested, with their versions. Nothing is imported for it."""
    newer = {}
    for name, versions in VERSIONS.items():
        if name not in sys.modules:
            continue
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # a copy on the path, without metadata
            version = str(getattr(sys.modules[name], "__version__", ""))
        if versions.is_untested(version):
            newer[name] = version
    return newer


def _text(version: str) -> str:
    return ".".join(map(str, minor(version)))
