"""Results as data: the JSON file, checked when read, and the figures taken from raw samples."""

from __future__ import annotations

import json
import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SCHEMA = 1
_KIND = "dorafx bench"
_UNITS = ("s", "B", "count", "share", "ratio", "B/s", "FLOP/s")


@dataclass
class Metric:
    """One figure: its raw samples, a list for each round, and the least work that it stands for (0 if unknown).

    ``unit``: seconds, bytes, a count, a share of 1, a plain ratio, bytes/s or FLOP/s.
    """

    unit: str
    rounds: list[list[float]] = field(default_factory=list)
    flops: float = 0.0
    bytes: float = 0.0

    @property
    def samples(self) -> list[float]:
        return [sample for one in self.rounds for sample in one]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The spread: a quarter of the samples lies below the first, a quarter above the second."""
        samples = self.samples
        if len(samples) == 1:
            return samples[0], samples[0]
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return low, high

    def to_dict(self) -> dict[str, Any]:
        low, high = self.quartiles
        fields = {"unit": self.unit, "median": self.median, "quartiles": [low, high], "rounds": self.rounds}
        return {**fields, "flops": self.flops, "bytes": self.bytes}


@dataclass
class Row:
    """One configuration: an implementation in a case.

    ``error`` is how it failed, empty if it did not; ``facts`` are counts that do not vary: graphs and graph breaks of compiled
    implementations, modules that dorafx rewrote. ``left_out`` is why it was not measured within a budget. ``note`` says what replaces
    something that the device does not have."""

    suite: str
    case: str
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Metric] = field(default_factory=dict)
    error: str = ""
    facts: dict[str, int] = field(default_factory=dict)
    left_out: str = ""
    note: str = ""


@dataclass
class Results:
    """The results of one run. ``ceilings``: ``copy`` in bytes/s (read plus written) and ``matmul`` in FLOP/s, measured in the run."""

    settings: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    ceilings: dict[str, Metric] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    def limit(self, metric: Metric) -> float:
        """Seconds that the metric's work takes at the measured ceilings; 0 if unknown."""
        shares = []
        for name, amount in (("matmul", metric.flops), ("copy", metric.bytes)):
            ceiling = self.ceilings.get(name)
            if amount and ceiling is not None and ceiling.samples:
                shares.append(amount / max(ceiling.samples))
        return max(shares, default=0.0)

    def reference(self, row: Row, metric: str) -> Metric | None:
        """dorafx's figure in the row's case."""
        for other in self.rows:
            if (other.suite, other.case, other.name) == (row.suite, row.case, "dorafx"):
                return other.metrics.get(metric)
        return None

    def to_json(self) -> str:
        rows = [{**vars(row), "metrics": {k: m.to_dict() for k, m in row.metrics.items()}} for row in self.rows]
        document = {
            "kind": _KIND,
            "schema": SCHEMA,
            "settings": self.settings,
            "environment": self.environment,
            "ceilings": {name: metric.to_dict() for name, metric in self.ceilings.items()},
            "rows": rows,
        }
        return json.dumps(document, indent=1)

    def write(self, path: Path) -> None:
        """Write :meth:`to_json` into a file, atomically, so that readers always find a complete file.

        Raises:
            OSError: it cannot be written.
        """
        part = path.with_name(f"{path.name}.part")
        part.write_text(self.to_json(), encoding="utf-8")
        os.replace(part, path)

    @classmethod
    def from_json(cls, text: str) -> Results:
        """The results as they were written.

        Raises:
            ValueError: not the JSON of a bench run, another schema, or a field that is missing or wrong, which is named.
        """
        try:
            document = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not the JSON of a bench run: {error}") from None
        if not isinstance(document, dict) or document.get("kind") != _KIND:
            raise ValueError('not the JSON of a bench run: no "kind": "dorafx bench"')
        if document.get("schema") != SCHEMA:
            raise ValueError(f"schema {document.get('schema')!r} is not {SCHEMA}, the one that this version reads")
        return cls(
            _get(document, "settings", dict),
            _get(document, "environment", dict),
            _metrics(_get(document, "ceilings", dict), "ceilings"),
            [_row(row, f"rows[{i}]") for i, row in enumerate(_get(document, "rows", list))],
        )

    @classmethod
    def read(cls, path: Path) -> Results:
        """:meth:`from_json` of a file, whose name goes into the error."""
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _get(data: dict[str, Any], name: str, kind: type, where: str = "") -> Any:
    path = f"{where}.{name}" if where else name
    if name not in data:
        raise ValueError(f"the field {path} is missing")
    if not isinstance(data[name], kind) or (isinstance(data[name], bool) and kind is not bool):
        raise ValueError(f"the field {path} must be of the type {kind.__name__}, not {type(data[name]).__name__}")
    return data[name]


def _row(data: Any, where: str) -> Row:
    if not isinstance(data, dict):
        raise ValueError(f"the field {where} must be of the type dict, not {type(data).__name__}")
    suite, case, name, error = (_get(data, field_, str, where) for field_ in ("suite", "case", "name", "error"))
    metrics = _metrics(_get(data, "metrics", dict, where), f"{where}.metrics")
    parameters, facts = _get(data, "parameters", dict, where), _get(data, "facts", dict, where)
    # Older files, from before there were budgets, lack these fields.
    left_out, note = (_get({field_: "", **data}, field_, str, where) for field_ in ("left_out", "note"))
    return Row(suite, case, name, parameters, metrics, error, facts, left_out, note)


def _metrics(data: dict[str, Any], where: str) -> dict[str, Metric]:
    metrics = {}
    for name, entry in data.items():
        path = f"{where}.{name}"
        if not isinstance(entry, dict):
            raise ValueError(f"the field {path} must be of the type dict, not {type(entry).__name__}")
        unit, rounds = _get(entry, "unit", str, path), _get(entry, "rounds", list, path)
        if unit not in _UNITS:
            raise ValueError(f"the field {path}.unit: {unit!r} is not one of {', '.join(_UNITS)}")
        if not all(isinstance(r, list) and all(_is_number(s) for s in r) for r in rounds) or not any(rounds):
            raise ValueError(f"the field {path}.rounds must hold lists of numbers, and one at least")
        work = {key: entry.get(key, 0.0) for key in ("flops", "bytes")}
        for key, value in work.items():
            if not _is_number(value):
                raise ValueError(f"the field {path}.{key} must be a number")
        metrics[name] = Metric(unit, rounds, **work)
    return metrics


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
