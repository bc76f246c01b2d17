"""Results as tables for a terminal, one for each case."""

from __future__ import annotations

from rich import box
from rich.table import Table

from dorafx.log.table import human_bytes

from .results import Metric, Results, Row


def human(value: float, unit: str) -> str:
    """A figure with its unit, to three digits."""
    if unit == "B":
        return human_bytes(value)
    if unit == "count":
        return f"{value:g}"
    if unit == "ratio":  # near 1, or near 0
        return f"{value:.6f}" if value > 0.5 else f"{value:.1e}"
    if unit == "share":
        return f"{value:.1%}"
    if unit == "s":
        for factor, name in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
            if value * factor >= 1 or name == "us":
                return f"{value * factor:.3g} {name}"
    for factor, name in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1.0, "")):
        if value >= factor:
            return f"{value / factor:.3g} {name}{unit}"
    return f"{value:.3g} {unit}"


def summary(results: Results) -> str:
    """What was measured where, and the ceilings, in a few lines."""
    e, s = results.environment, results.settings
    commit = f" ({e['commit'][:9]}{'+changes' if e['commit'].endswith('+changes') else ''})" if e.get("commit") else ""
    versions = ", ".join(f"{name} {v}" for name, v in e.get("versions", {}).items() if v)
    ceilings = ", ".join(f"{name} {human(max(m.samples), m.unit)}" for name, m in results.ceilings.items())
    return (
        f"{e.get('device', '')}, {e.get('threads', '?')} threads, {s.get('dtype', '?')}, {s.get('rounds', '?')} rounds\n"
        f"dorafx {e.get('dorafx', '?')}{commit}, {versions}\n"
        f"measured ceilings: {ceilings}\n"
        "to dorafx: the median over dorafx's; of limit: the least time at these ceilings over the median"
    )


def tables(results: Results) -> list[Table]:
    """A table for each case of each suite, with a section for each figure and a line for each implementation."""
    result = []
    for suite, case in dict.fromkeys((row.suite, row.case) for row in results.rows):
        table = Table(title=f"{suite}: {case}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("", overflow="fold")
        table.add_column("", no_wrap=True)
        for name in ("median", "quartiles", "to dorafx", "of limit"):
            table.add_column(name, justify="right", no_wrap=True)
        rows = [row for row in results.rows if (row.suite, row.case) == (suite, case)]
        for metric in dict.fromkeys(name for row in rows for name in row.metrics):
            measured = [row for row in rows if metric in row.metrics]
            for row in measured:
                table.add_row(metric if row is measured[0] else "", row.name, *_cells(results, row, metric))
            table.add_section()
        table.caption = "\n".join(f"{row.name} {remark}" for row in rows for remark in remarks(row)) or None
        table.caption_justify = "left"
        result.append(table)
    return result


def markdown(results: Results) -> str:
    """The same as a section of a Markdown page: one table for each suite, one line for each implementation and figure."""
    lines = [*(f"{line}  " for line in summary(results).splitlines()), ""]
    for suite in dict.fromkeys(row.suite for row in results.rows):
        lines += [f"### {suite}", "", "| case | figure | implementation | median | quartiles | to dorafx | of limit |"]
        lines.append("|---|---|---|---:|---:|---:|---:|")
        rows = [row for row in results.rows if row.suite == suite]
        for case, metric in dict.fromkeys((row.case, m) for row in rows for m in row.metrics):
            for row in rows:
                if row.case == case and metric in row.metrics:
                    lines.append(f"| {' | '.join((case, metric, row.name, *_cells(results, row, metric)))} |")
        lines += [
            f"| {row.case} | {remark.replace('|', '/')} | {row.name} | | | | |"
            for row in rows
            for remark in remarks(row)
        ]
        lines.append("")
    return "\n".join(lines)


def remarks(row: Row) -> list[str]:
    """The remarks on a row besides its figures."""
    kinds = (("failed", row.error), ("left out", row.left_out), ("note", row.note if row.metrics else ""))
    return [f"{kind}: {text}" for kind, text in kinds if text]


def _cells(results: Results, row: Row, name: str) -> tuple[str, str, str, str]:
    metric = row.metrics[name]
    ratio, share = _ratio(metric, results.reference(row, name)), _share(results, metric)
    return human(metric.median, metric.unit), _spread(metric), ratio, share


def _spread(metric: Metric) -> str:
    """The quartiles, with one unit if they share it; empty if they are equal."""
    low, high = metric.quartiles
    if low == high:
        return ""
    (first, _, unit), last = human(low, metric.unit).partition(" "), human(high, metric.unit)
    return f"{first} .. {last}" if last.endswith(f" {unit}") else f"{first} {unit} .. {last}"


def _ratio(metric: Metric, reference: Metric | None) -> str:
    if reference is None or not reference.median or metric.unit in ("share", "ratio"):
        return ""
    return f"{metric.median / reference.median:.2f}x"


def _share(results: Results, metric: Metric) -> str:
    limit = results.limit(metric)
    return f"{limit / metric.median:.0%}" if limit and metric.unit == "s" and metric.median else ""
