"""The log as a table for a terminal: repeated layers folded, misses last with their reasons."""

from __future__ import annotations

import io
import re
import shutil
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .record import Record

if TYPE_CHECKING:
    from .rewritelog import RewriteLog

__all__ = ["Fold", "fold", "human_bytes", "human_flops", "printable", "render"]

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


class Fold:
    """Records that differ only in the number of the layer."""

    def __init__(self, site: str, first: Record) -> None:
        self.site = site
        self.first = first
        self.sites: set[str] = set()

    @property
    def count(self) -> int:
        return len(self.sites)


def fold(records: list[Record]) -> list[Fold]:
    """Fold repeated layers: ``layers.0.q_proj`` … ``layers.31.q_proj`` become ``layers.*.q_proj`` with a count. A site
    that was compiled into several graphs counts once."""
    folds: dict[tuple[object, ...], Fold] = {}
    for r in records:
        site = _NUMBER.sub("*", r.site)
        key = (site, r.status, r.pattern, r.reason, r.d_out, r.d_in, r.rank, r.dtype, r.norm_algorithm, r.codegen)
        folds.setdefault(key, Fold(site, r)).sites.add(r.site)
    return list(folds.values())


def human_bytes(value: float) -> str:
    """Bytes with a binary unit: 65536 -> 64 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.3g} {unit}"
        value /= 1024
    return f"{value:.3g} TiB"


def human_flops(value: float) -> str:
    """FLOPs with a decimal unit: 131072 -> 131 k."""
    for unit in ("", " k", " M", " G", " T"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} P"


def printable(text: str) -> str:
    """The text with control characters made visible: a log read from a file must not steer the terminal."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def render(log: RewriteLog) -> str:
    """The table as plain text (no colours, so that it can go into a file or a bug report)."""
    rewrites, misses = log.rewrites, log.misses
    width = max(shutil.get_terminal_size((120, 24)).columns, 100)
    console = Console(file=io.StringIO(), width=width, color_system=None)
    if rewrites:
        table = Table(title=None, show_lines=False, box=None, pad_edge=False)
        columns = ("module", "x", "pattern", "d_out", "d_in", "rank", "dtype", "dense avoided", "norm FLOPs", "norm")
        for name in columns:
            right = name in ("x", "d_out", "d_in", "rank", "dense avoided", "norm FLOPs")
            table.add_column(name, justify="right" if right else "left", overflow="fold", no_wrap=name != "module")
        for f in fold(rewrites):
            r = f.first
            flops = f"{human_flops(r.flops_before)} -> {human_flops(r.flops_after)}"
            avoided = human_bytes(r.dense_bytes_avoided * f.count)
            table.add_row(
                *(
                    Text(printable(cell))  # names are not markup: "block[0]" is a module's name
                    for cell in (
                        f.site or "(function)", str(f.count), r.pattern, str(r.d_out), str(r.d_in), str(r.rank), r.dtype,
                        avoided, flops, r.norm_algorithm,
                    )
                )
            )  # fmt: skip
        console.print(table)
    partial = [f for f in fold(rewrites) if f.first.reason]
    for f in partial:
        console.print(
            printable(f"partly  {f.site or '(function)'} x {f.count}: {f.first.reason} [{f.first.source}]"),
            markup=False,
            soft_wrap=True,
        )
    for f in fold(misses):
        where = f" [{f.first.source}]" if f.first.source else ""
        console.print(
            printable(f"missed  {f.site or '(graph)'} x {f.count}: {f.first.reason}{where}"),
            markup=False,
            soft_wrap=True,
        )
    sites = len({r.site for r in rewrites})
    saved = sum(f.first.dense_bytes_avoided * f.count for f in fold(rewrites))
    summary = f"{sites} modules rewritten, {len({r.site for r in misses})} missed, {human_bytes(saved)} of dense intermediates avoided a forward"
    if log.dropped:
        summary += f"; {log.dropped} oldest records dropped"
    console.print(summary, markup=False, soft_wrap=True)
    if log.norms.computed or log.norms.reused:
        console.print(printable(str(log.norms)), markup=False, soft_wrap=True)
    output = console.file
    assert isinstance(output, io.StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip().splitlines())
