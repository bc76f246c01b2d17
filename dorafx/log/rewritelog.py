"""The rewrite log: an append-only list of records with views of it as text, JSON and HTML."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import threading
import warnings
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dorafx.errors import DorafxError, DorafxWarning

from .counters import NormCounters
from .drawing import Drawing
from .record import Record
from .reproduction import Reproduction

if TYPE_CHECKING:
    from rich.console import RenderableType

SCHEMA_VERSION = 2
"""Of the JSON form: ``{"dorafx_log": 2, "notes": [str], "norms": counts, "records": [{field: value}], "seconds":
{stage: number}, "drawings": {key: drawing}}`` with the fields of :class:`Record`, :class:`NormCounters` and :class:`Drawing`; all but the version may be absent.
Version 1 had no drawings and is read too. As JSON lines, a line is a record, or ``{"drawing": key, "before": …, "after": …, "terms": …}``."""

_MOST_SCRIPTS = 64
_MOST_BYTES = 4 << 20  # of all scripts of a log, compressed

_READABLE = (1, SCHEMA_VERSION)

# ``TORCH_LOGS="dorafx"`` gives the loggers below "dorafx" a handler and the level INFO, ``"+dorafx"`` DEBUG: torch accepts
# the name of any module that can be imported.
_logger = logging.getLogger(__name__)


class RewriteLog:
    """Records of what dorafx did, and notes on the process (installed polyfills, for example).

    Thread-safe. Holds at most ``max_records`` records; beyond that the oldest are dropped, and ``dropped`` counts them. Holds the
    drawings of at most ``max_drawings`` distinct layers; further records have none.

    Attributes:
        norms: how often norms were computed and reused at run time (of the process's log; zeros elsewhere).
        dropped: how many records were dropped.
        seconds: that dorafx spent on all graphs, by stage, in the order of the pipeline.
        generation: how often the log was cleared.

    Examples:
        >>> log = dorafx.RewriteLog()
        >>> log.add(dorafx.Record("rewritten", site="model.head", pattern="linear", d_out=96, d_in=64, rank=4))
        >>> log
        RewriteLog(1 rewrites, 0 misses)
        >>> dorafx.RewriteLog.from_json(log.to_json()).records == log.records
        True
    """

    def __init__(self, max_records: int = 100_000, max_drawings: int = 128) -> None:
        self._records: deque[Record] = deque(maxlen=max_records)
        self._notes: deque[str] = deque(maxlen=1000)
        self._drawings: dict[str, Drawing] = {}
        self._max_drawings = max_drawings
        self._reproductions: dict[str, Reproduction] = {}
        self._lock = threading.Lock()
        self._stream_failed = False
        self._repro_failed = False
        self.dropped = 0
        self.generation = 0
        self.norms = NormCounters()
        self.seconds: dict[str, float] = {}

    def add(self, record: Record) -> None:
        """Append a record."""
        self.extend((record,))

    def extend(
        self,
        records: Iterable[Record],
        drawings: Mapping[str, Drawing] | None = None,
        seconds: Mapping[str, float] | None = None,
        reproductions: Mapping[str, Reproduction] | None = None,
    ) -> None:
        """Append records, the drawings and scripts that they refer to by key, and the seconds that each stage took."""
        records = list(records)
        with self._lock:
            room = (self._records.maxlen or 0) - len(self._records)
            self.dropped += max(0, len(records) - room)
            self._records.extend(records)
            added = {key: d for key, d in (drawings or {}).items() if key not in self._drawings}
            added = dict(itertools.islice(added.items(), self._max_drawings - len(self._drawings)))
            self._drawings.update(added)
            for stage, seconds_spent in (seconds or {}).items():
                self.seconds[stage] = self.seconds.get(stage, 0.0) + seconds_spent
            for key, reproduction in (reproductions or {}).items():
                self._reproductions.pop(key, None)
                self._reproductions[key] = reproduction
            while len(self._reproductions) > 1 and (
                len(self._reproductions) > _MOST_SCRIPTS
                or sum(len(r.packed) for r in self._reproductions.values()) > _MOST_BYTES
            ):
                del self._reproductions[next(iter(self._reproductions))]  # the oldest
        if self is _PROCESS_LOG:
            for record in records:
                _logger.info("%s", record)
            self._stream(records, added)
            self._write_scripts(reproductions or {})

    def take_in(self, other: RewriteLog) -> None:
        """Append what another log has: records, drawings, scripts and seconds."""
        self.extend(other.records, other.drawings, other.seconds, other.reproductions)

    def attach(self, reproduction: Reproduction) -> None:
        """Let a script be that of all records."""
        with self._lock:
            records = [replace(record, repro=reproduction.key) for record in self._records]
            self._records = deque(records, maxlen=self._records.maxlen)
            self._reproductions = {reproduction.key: reproduction}

    def save_repro(self, record: Record, path: str | os.PathLike[str]) -> Path:
        """Write a Python script that rebuilds the graph of a record, runs it before and after the rewrite, and prints the difference. Its
        exit code is 1 if there is one. The script has the graph's operators, shapes, dtypes and names, and no value of the program's
        tensors: these are drawn at random. A log keeps the scripts of the last 64 distinct graphs.

        Args:
            record: one of this log's.
            path: of the script; an existing file is replaced.

        Returns:
            The path written. If parts of the graph could not be rebuilt, the script says which, and so does a ``DorafxWarning``.

        Raises:
            DorafxError: there is no script of this record; the message says why.

        Examples:
            >>> compiled = torch.compile(layer, backend="dorafx", options={"dorafx.codegen": "eager"})
            >>> y = compiled(x)
            >>> log = dorafx.rewrite_log()
            >>> import tempfile
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     log.save_repro(log.records[-1], folder + "/repro.py").name
            'repro.py'
        """
        reproduction = self.reproductions.get(record.repro)
        site = record.site or "the graph"
        if not record.repro:
            raise DorafxError(
                f"there is no script of {site}: the record is of no graph, or the script could not be made"
            )
        if reproduction is None:
            raise DorafxError(
                f"there is no script of {site} any more: this log was read from a file, cleared, or has met more than {_MOST_SCRIPTS} "
                "other graphs since; DORAFX_REPRO=folder writes each script while it happens"
            )
        if not reproduction.packed:
            raise DorafxError(f"there is no script of {site}: {'; '.join(reproduction.left_out)}")
        target = Path(path)
        target.write_text(reproduction.script, encoding="utf-8")
        if reproduction.left_out:
            warnings.warn(
                f"{target} is not in all the graph of {site}: {'; '.join(dict.fromkeys(reproduction.left_out))}",
                DorafxWarning,
                stacklevel=2,
            )
        return target

    @property
    def reproductions(self) -> dict[str, Reproduction]:
        """The scripts of graphs, by the key that records refer to."""
        with self._lock:
            return dict(self._reproductions)

    def add_note(self, text: str) -> None:
        """Append a note on the process."""
        with self._lock:
            self._notes.append(text)

    def clear(self) -> None:
        """Forget records, notes, drawings, seconds and counts."""
        self.norms.clear()
        with self._lock:
            self._records.clear()
            self._notes.clear()
            self._drawings.clear()
            self._reproductions.clear()
            self.seconds.clear()
            self.dropped = 0
            self.generation += 1

    @property
    def records(self) -> list[Record]:
        """All records, oldest first."""
        with self._lock:
            return list(self._records)

    @property
    def notes(self) -> list[str]:
        """Notes on the process."""
        with self._lock:
            return list(self._notes)

    @property
    def drawings(self) -> dict[str, Drawing]:
        """Pictures of distinct layers, by the key that records refer to."""
        with self._lock:
            return dict(self._drawings)

    @property
    def rewrites(self) -> list[Record]:
        """The records of what was rewritten, in whole or in part."""
        return [r for r in self.records if r.rewritten]

    @property
    def misses(self) -> list[Record]:
        """The records of what was not rewritten."""
        return [r for r in self.records if not r.rewritten]

    def to_records(self) -> list[dict[str, Any]]:
        """One plain dictionary for each record: ``pandas.DataFrame(log.to_records())``."""
        return [r.to_dict() for r in self.records]

    def to_json(self) -> str:
        """The log as JSON (see ``dorafx.log.rewritelog.SCHEMA_VERSION``)."""
        content = {
            "dorafx_log": SCHEMA_VERSION,
            "notes": self.notes,
            "norms": self.norms.to_dict(),
            "seconds": dict(self.seconds),
            "records": self.to_records(),
            "drawings": {key: drawing.to_dict() for key, drawing in self.drawings.items()},
        }
        return json.dumps(content, indent=1)

    @classmethod
    def from_json(cls, text: str) -> RewriteLog:
        """A log from [`to_json`][dorafx.RewriteLog.to_json]'s text, or from the JSON lines that ``DORAFX_LOG`` collects. An incomplete last line, as after the
        process was killed, is left out, with a note.

        Raises:
            ValueError: the text is neither; the message says what is wrong and where.
        """
        log = cls()
        text = text.removeprefix("\ufeff")  # editors and shells on Windows put a byte order mark in front
        try:
            data = _json_of(text)
        except RecursionError:
            raise ValueError("not a dorafx log: nested too deeply") from None
        except json.JSONDecodeError as error:
            parsed, drawings, cut = _from_lines(text, error)
            log.extend(parsed, drawings)
            if cut:
                log.add_note(cut)
            return log
        except ValueError as error:
            raise ValueError(f"not a dorafx log: {error}") from None
        if isinstance(data, dict) and "dorafx_log" not in data and "status" in data:
            data = {"dorafx_log": SCHEMA_VERSION, "records": [data]}
        if not isinstance(data, dict) or "dorafx_log" not in data:
            raise ValueError("not a dorafx log: the field 'dorafx_log' is absent")
        if data["dorafx_log"] not in _READABLE:
            readable = " and ".join(map(str, _READABLE))
            raise ValueError(f"dorafx log of version {data['dorafx_log']!r}; this dorafx reads versions {readable}")
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
        log.extend((), drawings_from(data.get("drawings", {})), _seconds_from(data.get("seconds", {})))
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
        # Names need not be text that UTF-8 has: a log may be of another program's.
        target.write_text(render(self), encoding="utf-8", errors="backslashreplace")
        return target

    def print(self, file: TextIO | None = None) -> None:
        """Print the table, in colour where ``file`` (standard output by default) is a terminal."""
        from .table import show

        show(self, file)

    def __rich__(self) -> RenderableType:
        from .table import renderable

        return renderable(self)

    def __str__(self) -> str:
        from .table import as_text

        return as_text(self)

    def __repr__(self) -> str:
        return f"RewriteLog({len(self.rewrites)} rewrites, {len(self.misses)} misses)"

    def _stream(self, records: list[Record], drawings: Mapping[str, Drawing]) -> None:
        """Append JSON lines to the file that ``DORAFX_LOG`` names. A log must never stop a training run."""
        path = os.environ.get("DORAFX_LOG")
        if not path or self._stream_failed:
            return
        lines = [{"drawing": key, **drawing.to_dict()} for key, drawing in drawings.items()]
        lines += [r.to_dict() for r in records]
        try:
            with self._lock, open(path, "a", encoding="utf-8") as file:
                # One write: the processes of a distributed run may share the file.
                file.write("".join(json.dumps(line) + "\n" for line in lines))
        except OSError as error:
            self._stream_failed = True
            warnings.warn(f"DORAFX_LOG: cannot write {path}: {error.strerror or error}", DorafxWarning, stacklevel=4)

    def _write_scripts(self, reproductions: Mapping[str, Reproduction]) -> None:
        """Write the scripts into the folder that ``DORAFX_REPRO`` names. A script must never stop a training run."""
        folder = os.path.expanduser(os.environ.get("DORAFX_REPRO", ""))
        for key, reproduction in reproductions.items() if folder and not self._repro_failed else ():
            try:
                if not reproduction.packed:
                    raise OSError(f"there is no script of a graph: {'; '.join(reproduction.left_out)}")
                target = Path(str(folder)) / f"{key}.py"
                if not target.exists():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    part = target.with_name(f"{key}.{os.getpid()}.part")
                    part.write_text(reproduction.script, encoding="utf-8")
                    part.replace(target)
            except OSError as error:
                self._repro_failed = bool(reproduction.packed)
                what = f"cannot write into {folder}: {error.strerror or error}" if reproduction.packed else str(error)
                warnings.warn(f"DORAFX_REPRO: {what}", DorafxWarning, stacklevel=4)


def drawings_from(values: Any) -> dict[str, Drawing]:
    """The drawings of a log's JSON, by key.

    Raises:
        ValueError: anything else; the message names the drawing.
    """
    if not isinstance(values, dict):
        raise ValueError("dorafx log: 'drawings' must be an object")
    drawings = {}
    for key, value in values.items():
        try:
            drawings[str(key)] = Drawing.from_dict(value)
        except ValueError as error:
            raise ValueError(f"dorafx log, drawing {key!r:.40}: {error}") from None
    return drawings


def _seconds_from(values: Any) -> dict[str, float]:
    if not isinstance(values, dict):
        raise ValueError("dorafx log: 'seconds' must be an object")
    for stage, seconds_spent in values.items():
        if type(seconds_spent) not in (int, float) or not 0 <= seconds_spent < math.inf:
            raise ValueError(f"dorafx log: the seconds of {stage!r:.40} must be a number from 0")
    return {str(stage): float(seconds_spent) for stage, seconds_spent in values.items()}


def _from_lines(text: str, whole: json.JSONDecodeError) -> tuple[list[Record], dict[str, Drawing], str]:
    """Records, drawings, and a note if the last line is incomplete."""
    records: list[Record] = []
    drawings: dict[str, Drawing] = {}
    cut = ""
    lines = text.split("\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = _json_of(line)
            if isinstance(data, dict) and "before" in data:
                drawings[str(data.get("drawing", ""))] = Drawing.from_dict(data)
            else:
                records.append(Record.from_dict(data))
        except RecursionError:
            raise ValueError(f"dorafx log, line {number}: nested too deeply") from None
        except json.JSONDecodeError:
            if not records and not drawings:
                raise ValueError(f"not a dorafx log: not JSON (line {whole.lineno}: {whole.msg})") from None
            if number == len(lines):  # without a newline at its end
                cut = f"line {number} of the log was cut off, and is left out"
                continue
            raise ValueError(f"dorafx log, line {number}: not JSON") from None
        except ValueError as error:
            raise ValueError(f"dorafx log, line {number}: {error}") from None
    if not records and not drawings:
        raise ValueError("not a dorafx log: empty")
    return records, drawings, cut


def _json_of(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        raise
    except ValueError:  # Python limits the digits of an integer
        raise ValueError("a number of too many digits") from None


_PROCESS_LOG = RewriteLog()


def rewrite_log() -> RewriteLog:
    """The log of this process: a record of everything that was compiled with dorafx in it.

    Examples:
        >>> log = dorafx.rewrite_log()
        >>> log.clear()
        >>> print(log)
        0 modules rewritten, 0 missed
    """
    return _PROCESS_LOG
