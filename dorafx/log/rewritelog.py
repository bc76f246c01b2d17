"""The rewrite log: an append-only list of records with views of it as text, JSON and HTML."""

from __future__ import annotations

import json
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dorafx.errors import DorafxWarning

from .counters import NormCounters
from .record import Record

__all__ = ["SCHEMA_VERSION", "RewriteLog", "rewrite_log"]

SCHEMA_VERSION = 1
"""Of the JSON form: ``{"dorafx_log": 1, "notes": [str], "norms": counts, "records": [{field: value}]}`` with
:class:`Record` 's fields and :class:`NormCounters` 's counts, which may be absent."""


class RewriteLog:
    """Records of what dorafx did, and notes on the process (polyfills installed, and the like).

    Thread-safe. Holds at most ``max_records`` records; beyond that the oldest go, and ``dropped`` counts them.

    Attributes:
        norms: how often norms were computed and reused at run time (of the process's log; zeros elsewhere).
    """

    def __init__(self, max_records: int = 100_000) -> None:
        self._records: deque[Record] = deque(maxlen=max_records)
        self._notes: deque[str] = deque(maxlen=1000)
        self._lock = threading.Lock()
        self._stream_failed = False
        self.dropped = 0
        self.norms = NormCounters()

    def add(self, record: Record) -> None:
        self.extend((record,))

    def extend(self, records: Iterable[Record]) -> None:
        records = list(records)
        with self._lock:
            room = (self._records.maxlen or 0) - len(self._records)
            self.dropped += max(0, len(records) - room)
            self._records.extend(records)
        self._stream(records)

    def add_note(self, text: str) -> None:
        with self._lock:
            self._notes.append(text)

    def clear(self) -> None:
        """Forget records, notes and counts."""
        self.norms.clear()
        with self._lock:
            self._records.clear()
            self._notes.clear()
            self.dropped = 0

    @property
    def records(self) -> list[Record]:
        with self._lock:
            return list(self._records)

    @property
    def notes(self) -> list[str]:
        with self._lock:
            return list(self._notes)

    @property
    def rewrites(self) -> list[Record]:
        return [r for r in self.records if r.rewritten]

    @property
    def misses(self) -> list[Record]:
        return [r for r in self.records if not r.rewritten]

    def to_records(self) -> list[dict[str, Any]]:
        """Plain dictionaries, one a record: ``pandas.DataFrame(log.to_records())``."""
        return [r.to_dict() for r in self.records]

    def to_json(self) -> str:
        """The log as JSON (see :data:`SCHEMA_VERSION`)."""
        content = {
            "dorafx_log": SCHEMA_VERSION,
            "notes": self.notes,
            "norms": self.norms.to_dict(),
            "records": self.to_records(),
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> RewriteLog:
        """A log from :meth:`to_json` 's text, or from the JSON lines that ``DORAFX_LOG`` collects.

        Raises:
            ValueError: text that is neither; the message says what was wrong and where.
        """
        log = cls()
        text = text.removeprefix("\ufeff")  # editors and shells on Windows put a byte order mark in front
        try:
            data = json.loads(text)
        except RecursionError:
            raise ValueError("not a dorafx log: nested too deeply") from None
        except json.JSONDecodeError as error:
            log.extend(_from_lines(text, error))
            return log
        if isinstance(data, dict) and "dorafx_log" not in data and "status" in data:
            data = {"dorafx_log": SCHEMA_VERSION, "records": [data]}
        if not isinstance(data, dict) or "dorafx_log" not in data:
            raise ValueError("not a dorafx log: the field 'dorafx_log' is absent")
        if data["dorafx_log"] != SCHEMA_VERSION:
            raise ValueError(
                f"dorafx log of version {data['dorafx_log']!r}; this dorafx reads version {SCHEMA_VERSION}"
            )
        records, notes = data.get("records", []), data.get("notes", [])
        if not isinstance(records, list) or not isinstance(notes, list):
            raise ValueError("dorafx log: 'records' and 'notes' must be lists")
        for i, item in enumerate(records):
            try:
                log.add(Record.from_dict(item))
            except ValueError as error:
                raise ValueError(f"dorafx log, record {i}: {error}") from None
        for note in notes:
            log.add_note(str(note))
        if "norms" in data:
            log.norms = NormCounters.from_dict(data["norms"])
        return log

    def to_html(self, path: str | os.PathLike[str]) -> Path:
        """Write the log as one self-contained page that works offline.

        Returns:
            The path written.
        """
        from .html import render

        target = Path(path)
        target.write_text(render(self), encoding="utf-8")
        return target

    def __str__(self) -> str:
        from .table import render

        return render(self)

    def __repr__(self) -> str:
        return f"RewriteLog({len(self.rewrites)} rewrites, {len(self.misses)} misses)"

    def _stream(self, records: list[Record]) -> None:
        """Append JSON lines to the file that the user asked for. A log must never stop a training run."""
        path = os.environ.get("DORAFX_LOG")
        if not path or self._stream_failed or self is not _PROCESS_LOG:
            return
        try:
            with self._lock, open(path, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(r.to_dict()) + "\n" for r in records)
        except OSError as error:
            self._stream_failed = True
            warnings.warn(f"DORAFX_LOG: cannot write {path}: {error.strerror or error}", DorafxWarning, stacklevel=3)


def _from_lines(text: str, whole: json.JSONDecodeError) -> list[Record]:
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            records.append(Record.from_dict(json.loads(line)))
        except RecursionError:
            raise ValueError(f"dorafx log, line {number}: nested too deeply") from None
        except json.JSONDecodeError:
            if not records:
                raise ValueError(f"not a dorafx log: not JSON (line {whole.lineno}: {whole.msg})") from None
            raise ValueError(f"dorafx log, line {number}: not JSON") from None
        except ValueError as error:
            raise ValueError(f"dorafx log, line {number}: {error}") from None
    if not records:
        raise ValueError("not a dorafx log: empty")
    return records


_PROCESS_LOG = RewriteLog()


def rewrite_log() -> RewriteLog:
    """The log of this process."""
    return _PROCESS_LOG
