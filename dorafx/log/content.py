"""The interface of a log that its views use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from .counters import NormCounters
from .drawing import Drawing
from .record import Record


class LogContent(Protocol):
    """A log as its views see it; :class:`dorafx.RewriteLog` documents the members."""

    dropped: int
    norms: NormCounters

    @property
    def records(self) -> list[Record]: ...

    @property
    def rewrites(self) -> list[Record]: ...

    @property
    def misses(self) -> list[Record]: ...

    @property
    def notes(self) -> list[str]: ...

    @property
    def drawings(self) -> Mapping[str, Drawing]: ...
