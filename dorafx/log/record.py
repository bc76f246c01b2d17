"""The record of one candidate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from .kinds import ReasonKind

_BEYOND = 2**63  # numbers stay below it, so that they fit into a 64-bit column of any program that reads the log


@dataclass(frozen=True)
class Record:
    """What dorafx did with one candidate.

    Attributes:
        status: ``"rewritten"`` or ``"missed"``.
        site: the module's name as ``named_modules()`` gives it; empty for a plain function.
        pattern: the canonical form: ``"linear"``, ``"linear_dropout"``, ``"norm_only"``, or a user's own.
        reason: for a miss, or for a norm without its composition: what differs, at which node.
        kind: of the reason, a value of [`dorafx.extension.ReasonKind`][]; ``examples/guide/reasons.md`` lists them. Empty if there is no
            reason, and in logs of earlier versions.
        decision: the numbers behind a choice by cost, whether a requested kernel is used, and which operator keeps a norm in the
            graph that could be computed before it, and, where the option ``zero_rows`` is ``"finite"``, whether divisions by the norm are
            guarded, and where it is read as it is; empty if none of these applies.
        source: ``file:line`` of the user's code.
        d_out, d_in, rank: shape of the weight, rank of the delta.
        dtype: of the weight.
        dense_bytes_avoided: bytes of ``[d_out, d_in]`` (or larger) intermediates that are no longer made in one forward.
        flops_before, flops_after: matrix-product FLOPs of the norm in one forward.
        norm_algorithm: ``"tiled"`` or ``"factored"``.
        norm_placement: ``"prologue"``: computed before the graph, and an input of it; ``"graph"``: inside (differentiable
            norms, and graphs that others compile).
        codegen: what compiled the rewritten graph.
        graph: number of the compiled graph within the process.
        drawing: key of a picture of the region in the log's ``drawings``; empty where there is none.
        repro: key of the script that rebuilds the graph (see [`RewriteLog.save_repro`][dorafx.RewriteLog.save_repro]); with ``DORAFX_REPRO=folder`` the script is
            ``folder/KEY.py``. Empty in logs of earlier versions.

    Examples:
        >>> record = dorafx.Record("missed", site="model.head", reason="operator tanh at model.py:14 stands between the "
        ...     "low-rank product and the norm", kind="hidden-delta", source="model.py:14")
        >>> print(record)
        missed model.head: operator tanh at model.py:14 stands between the low-rank product and the norm [model.py:14]
        >>> record.advice[:48]
        'The delta inside the norm is no low-rank product'
    """

    status: str
    site: str = ""
    pattern: str = ""
    reason: str = ""
    decision: str = ""
    source: str = ""
    d_out: int = 0
    d_in: int = 0
    rank: int = 0
    dtype: str = ""
    dense_bytes_avoided: int = 0
    flops_before: int = 0
    flops_after: int = 0
    norm_algorithm: str = ""
    norm_placement: str = ""
    codegen: str = ""
    graph: int = 0
    drawing: str = ""
    kind: str = ""
    repro: str = ""

    def __post_init__(self) -> None:
        if self.status not in ("rewritten", "missed"):
            raise ValueError(f"record: status {self.status!r} is not 'rewritten' or 'missed'")

    @property
    def rewritten(self) -> bool:
        """Whether the candidate was rewritten, at least in part."""
        return self.status == "rewritten"

    @property
    def advice(self) -> str:
        """What to do about the reason; empty if there is none, or its kind is unknown."""
        kind = ReasonKind.named(self.kind)
        return kind.advice if kind is not None else ""

    def __str__(self) -> str:
        site = self.site or "(function)"
        where = f" [{self.source}]" if self.source else ""
        if not self.rewritten:
            return f"missed {site}: {self.reason}{where}"
        norm = f"{self.norm_algorithm} norm in the {self.norm_placement or 'graph'}"
        text = f"rewritten {site}: {self.pattern} [{self.d_out}, {self.d_in}] rank {self.rank} {self.dtype}, {norm}"
        return f"{text}; {self.reason}{where}" if self.reason else text + where

    def to_dict(self) -> dict[str, Any]:
        """The fields, all of them numbers and texts."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Record:
        """The record of a dictionary as [`to_dict`][dorafx.Record.to_dict] makes it.

        Raises:
            ValueError: an unknown, absent or wrongly typed field; the message names it.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"record: expected an object with fields, got {type(values).__name__}")
        types = {f.name: int if f.default == 0 else str for f in fields(Record)}
        unknown = sorted(set(values) - set(types))
        if unknown:
            raise ValueError(f"record: unknown field {unknown[0]!r}; fields are {', '.join(types)}")
        if "status" not in values:
            raise ValueError("record: field 'status' is absent")
        for name, value in values.items():
            if not isinstance(value, types[name]) or isinstance(value, bool):
                raise ValueError(f"record: field {name!r} is {value!r}, not {types[name].__name__}")
            if isinstance(value, int) and not 0 <= value < _BEYOND:
                raise ValueError(f"record: field {name!r} is not between 0 and 2**63 - 1")
        return Record(**values)
