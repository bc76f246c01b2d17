"""Results as a figure: a panel for each figure of each suite, a bar for each implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dorafx.errors import DorafxError

from .results import Results, Row
from .table import human, summary

FORMATS = (".png", ".svg", ".pdf")
# Colours of Okabe and Ito (2008), which colour-blind people can tell apart; each has a hatch, too, and the bars have names.
STYLES = {
    "dorafx": ("#0072b2", ""),
    "peft": ("#d55e00", "///"),
    "peft-inductor": ("#e69f00", "\\\\\\"),
    "dense": ("#cc79a7", "xxx"),
    "chunked": ("#56b4e9", "..."),
    "lora": ("#009e73", "---"),
    "merged": ("#f0e442", "ooo"),
}
_OTHER = ("#999999", "+++")
_BAR = 0.8  # of the height of a case
_PIXELS_PER_INCH = 150


def plot(results: Results, path: Path) -> Path:
    """Draw the results into a file, whose ending determines the format.

    Bars are medians, whiskers quartiles, a dot the least time at the measured ceilings.

    Raises:
        ValueError: an unknown ending, or nothing to draw.
        DorafxError: matplotlib is not installed.
        OSError: the file cannot be written.
    """
    if path.suffix.lower() not in FORMATS:
        raise ValueError(f"-o: a plot must end in {', '.join(FORMATS)}, not {path.name!r}")
    panels = list(
        dict.fromkeys(
            (r.suite, m) for r in results.rows for m, v in r.metrics.items() if v.unit not in ("share", "ratio")
        )
    )
    if not panels:
        raise ValueError("there is nothing to draw: no configuration has a figure")
    try:
        # Not pyplot, which would choose a backend for the whole process and look for a display.
        from matplotlib.figure import Figure
    except ImportError:
        raise DorafxError("bench --plot needs matplotlib: pip install 'dorafx[bench]'") from None
    heights = [_height(results, suite, metric) for suite, metric in panels]
    figure = Figure(figsize=(9, 1.5 + sum(heights)), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (suite, metric) in zip(axes, panels):
        _panel(axis, results, [r for r in results.rows if r.suite == suite and metric in r.metrics], metric)
        axis.set_title(f"{suite}: {metric}", loc="left", fontsize=10)
    figure.suptitle(summary(results), x=0.01, ha="left", fontsize=8)
    _legend(figure, results)
    # Without the date, so that equal results give equal files.
    metadata: dict[str, Any] = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix.lower(), {})
    figure.savefig(path, dpi=_PIXELS_PER_INCH, metadata=metadata)
    return path


def _legend(figure: Any, results: Results) -> None:
    """One legend for all panels, below them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    names = dict.fromkeys(row.name for row in results.rows if row.metrics)
    handles: list[Any] = [Patch(**_style(name), label=name) for name in names]
    if any(results.limit(m) for row in results.rows for m in row.metrics.values()):
        handles.append(Line2D([], [], color="black", marker=".", linestyle="", markersize=6, label="limit"))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)


def _style(name: str) -> dict[str, Any]:
    colour, hatch = STYLES.get(name, _OTHER)
    return {"facecolor": colour, "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}


def _height(results: Results, suite: str, metric: str) -> float:
    """Inches."""
    return 0.9 + 0.2 * sum(r.suite == suite and metric in r.metrics for r in results.rows)


def _panel(axis: Any, results: Results, rows: list[Row], metric: str) -> None:
    cases = list(dict.fromkeys(row.case for row in rows))
    names = list(dict.fromkeys(row.name for row in rows))
    width = _BAR / len(names)
    medians = [row.metrics[metric].median for row in rows]
    # A logarithmic axis cannot show zero.
    wide = min(medians) > 0 and max(medians) > 20 * min(medians)
    for index, name in enumerate(names):
        rows_of_name = [row for row in rows if row.name == name]
        places = [cases.index(row.case) + (index + 0.5) * width - _BAR / 2 for row in rows_of_name]
        values = [row.metrics[metric] for row in rows_of_name]
        errors = list(zip(*((v.median - v.quartiles[0], v.quartiles[1] - v.median) for v in values)))
        bars = axis.barh(
            places, [v.median for v in values], width, **_style(name), xerr=errors, error_kw={"elinewidth": 0.8}
        )
        axis.bar_label(bars, [f" {human(v.median, v.unit)}, {name}" for v in values], fontsize=6.5, padding=2)
        limits = [(results.limit(v), place) for v, place in zip(values, places)]
        dots = [(limit, place) for limit, place in limits if limit]
        if dots:
            axis.plot(*zip(*dots), ".", color="black", markersize=5, markeredgecolor="white", markeredgewidth=0.6)
    axis.set_yticks(range(len(cases)), cases, fontsize=7)
    axis.invert_yaxis()
    axis.margins(x=0.17)
    if wide:
        axis.set_xscale("log", base=2 if rows[0].metrics[metric].unit == "B" else 10)
    axis.xaxis.set_major_formatter(lambda value, place: human(value, rows[0].metrics[metric].unit))
    axis.tick_params(axis="x", labelsize=7)
