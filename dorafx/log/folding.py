"""Repeated layers folded into one, and totals over modules."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from .record import Record

_NUMBER = re.compile(r"(?<![^.])\d+(?=\.|$)")


def folded_site(site: str) -> str:
    """``layers.31.q_proj`` -> ``layers.*.q_proj``."""
    return _NUMBER.sub("*", site)


def _key(r: Record) -> tuple[object, ...]:
    """A key that is equal for records that differ only in the number of the layer."""
    site = folded_site(r.site)
    return site, r.status, r.pattern, r.reason, r.kind, r.d_out, r.d_in, r.rank, r.dtype, r.norm_algorithm, r.codegen


class Fold:
    """Records that differ only in the number of the layer."""

    def __init__(self, first: Record) -> None:
        self.first = first
        self.sites: set[str] = set()
        self.drawings: dict[str, None] = {}

    @property
    def count(self) -> int:
        return len(self.sites)

    @property
    def site(self) -> str:
        """The name, with ``*`` for the number if there are several layers."""
        return folded_site(self.first.site) if self.count > 1 else self.first.site


def fold(records: Iterable[Record]) -> list[Fold]:
    """Fold repeated layers: ``layers.0.q_proj`` … ``layers.31.q_proj`` become ``layers.*.q_proj`` with a count. A site
    that was compiled into several graphs counts once."""
    folds: dict[tuple[object, ...], Fold] = {}
    for r in records:
        folded = folds.setdefault(_key(r), Fold(r))
        folded.sites.add(r.site)
        if r.drawing:
            folded.drawings[r.drawing] = None
    return list(folds.values())


@dataclass(frozen=True)
class Totals:
    """Sums over one forward of every module in a log.

    Attributes:
        modules: their number.
        rewritten, missed: how many are rewritten, at least in part, and left alone; one that was compiled into several graphs may be
            both.
        dense_bytes_avoided, flops_before, flops_after: sums of the records' fields.
    """

    modules: int
    rewritten: int
    missed: int
    dense_bytes_avoided: int
    flops_before: int
    flops_after: int


def totals(records: Iterable[Record]) -> Totals:
    """Sums over modules. If a module was compiled into several graphs (training, inference), the most expensive one counts."""
    missed: set[object] = set()
    by_site: dict[object, dict[int, tuple[int, int, int]]] = {}
    for r in records:
        site = r.site or (r.status, r.graph)  # plain functions have no name
        if not r.rewritten:
            missed.add(site)
            continue
        graphs = by_site.setdefault(site, {})
        dense, before, after = graphs.get(r.graph, (0, 0, 0))
        graphs[r.graph] = (dense + r.dense_bytes_avoided, before + r.flops_before, after + r.flops_after)
    largest = [max(graphs.values()) for graphs in by_site.values()]
    dense, before, after = (sum(column) for column in zip(*largest)) if largest else (0, 0, 0)
    return Totals(len(missed | by_site.keys()), len(by_site), len(missed), dense, before, after)
