"""The log as a table for a terminal: repeated layers folded, misses last with their reasons and advice."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.table import Table
from rich.text import Text

from .content import LogContent
from .folding import Fold, Totals, fold, totals

_COLUMNS = (
    "module", "x", "pattern", "shape", "rank", "dtype", "dense avoided", "norm FLOPs", "after", "norm", "codegen",
)  # fmt: skip
_WIDE = 10_000  # columns: no table is wider
_RIGHT = ("x", "rank", "dense avoided", "norm FLOPs", "after")


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


def show(content: Any, file: TextIO | None = None) -> None:
    """Print to ``file`` (standard output by default): in colour and to the terminal's width if it is one, else plain text."""
    console = Console(file=file, highlight=False)
    if console.is_terminal:
        console.print(content)
    else:
        print(as_text(content), file=file)


def as_text(content: Any) -> str:
    """Plain text, for a file or a bug report."""
    out = io.StringIO()
    # In a notebook rich would display the content instead of writing it to the file.
    console = Console(file=out, width=_plain_width(), color_system=None, highlight=False, force_jupyter=False)
    console.print(content)
    return "\n".join(line.rstrip() for line in out.getvalue().rstrip().splitlines())


def _plain_width() -> int:
    # The size of the terminal, or COLUMNS; a file has neither.
    return max(shutil.get_terminal_size((200, 24)).columns, 100)


def finding(head: str, style: str, what: str, where: str, advice: str) -> Text:
    """A finding: what, where, and the advice on a line of its own."""
    text = Text(overflow="fold")
    text.append(head, style=style)
    text.append(f"  {printable(what)}")
    if where:
        text.append(f" [{printable(where)}]", style="cyan")
    if advice:
        text.append(f"\n{'':{len(head)}}  what to do: {printable(advice)}", style="dim")
    return text


def renderable(log: LogContent) -> RenderableType:
    """The table, the layers that are rewritten in part or not at all, and the totals."""
    rewrites, misses = fold(log.rewrites), fold(log.misses)
    sums = totals(log.records)
    parts: list[RenderableType] = [_Table(rewrites, sums)] if rewrites else []
    parts += _findings("partly", "bold yellow", (f for f in rewrites if f.first.reason))
    parts += _findings("missed", "bold red", misses)
    summary = Text(f"{sums.rewritten} modules rewritten, {sums.missed} missed", style="bold")
    if sums.dense_bytes_avoided:
        summary.append(f", {human_bytes(sums.dense_bytes_avoided)} of dense intermediates avoided a forward")
    if log.dropped:
        summary.append(f"; {log.dropped} oldest records dropped")
    parts.append(summary)
    if log.norms.computed or log.norms.reused or log.norms.compared:
        parts.append(Text(printable(str(log.norms))))
    return Group(*parts)


def _findings(head: str, style: str, folds: Iterable[Fold]) -> Iterable[Text]:
    for f in folds:
        where = f"{f.site or '(function)'} x {f.count}" if f.count > 1 else f.site or "(function)"
        yield finding(head, style, f"{where}: {f.first.reason}", f.first.source, f.first.advice)


class _Table:
    """One row for each fold, or three lines if the terminal is too narrow."""

    def __init__(self, folds: list[Fold], sums: Totals) -> None:
        self.folds = folds
        self.sums = sums

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        table = self._wide()
        if table.__rich_measure__(console, options.update(width=_WIDE)).maximum <= options.max_width:
            yield table
        else:
            yield from self._narrow()

    def _cells(self) -> Iterable[tuple[str, tuple[str, ...]]]:
        """(style, cells) of each row, the last the total."""
        for f in self.folds:
            r = f.first
            yield (
                "yellow" if r.reason else "",
                (
                    f.site or "(function)", str(f.count), r.pattern, f"{r.d_out} x {r.d_in}", str(r.rank), r.dtype,
                    human_bytes(r.dense_bytes_avoided * f.count), human_flops(r.flops_before * f.count),
                    human_flops(r.flops_after * f.count), r.norm_algorithm, r.codegen,
                ),
            )  # fmt: skip
        sums = self.sums
        flops = human_flops(sums.flops_before), human_flops(sums.flops_after)
        bytes_avoided = human_bytes(sums.dense_bytes_avoided)
        yield "bold", ("total", str(sums.rewritten), "", "", "", "", bytes_avoided, *flops, "", "")

    def _wide(self) -> Table:
        table = Table(box=None, pad_edge=False, header_style="bold")
        for name in _COLUMNS:
            table.add_column(name, justify="right" if name in _RIGHT else "left", no_wrap=True)
        for style, cells in self._cells():
            table.add_row(*(Text(printable(cell), style=style) for cell in cells))  # Text: "block[0]" is no markup
        return table

    def _narrow(self) -> Iterable[Text]:
        for style, cells in self._cells():
            module, count, pattern, shape, rank, dtype, avoided, before, after, norm, codegen = map(printable, cells)
            yield Text(f"{module} x {count}", style=style or "cyan")
            if pattern:
                yield Text(f"  {pattern} {shape} rank {rank} {dtype}, {norm} norm, {codegen}")
            yield Text(f"  {avoided} of dense intermediates avoided, norm FLOPs {before} -> {after}")
