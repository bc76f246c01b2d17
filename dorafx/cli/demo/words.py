"""What the demo says: before it measures, in a table, and in three sentences at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

import dorafx
from dorafx.log.table import human_bytes

from .setting import Setting
from .worker import CONFIGURATIONS, PHASES

OURS, STOCK, LORA = "PEFT DoRA, dorafx", "PEFT DoRA, Inductor", "plain LoRA, Inductor"
_SAME = 0.05
"""Times that differ by no more than this are called the same: single medians scatter by as much."""


def introduction(setting: Setting) -> str:
    """The demo's first lines."""
    sizes = setting.size
    lines = [
        f"dorafx {dorafx.__version__} demo: a small Llama-shaped model with stock PEFT's DoRA, {setting.where}.",
        f"Hidden size {sizes.hidden}, {_number(sizes.layers, 'layer')}, rank {sizes.rank}, {_number(sizes.tokens, 'token')}, {setting.dtype}, "
        f"random weights: nothing is downloaded.",
        "Four configurations are compiled side by side, then timed one at a time. "
        + ("This takes a minute or two." if setting.cuda else "On two cores this takes about two minutes."),
    ]
    return "\n".join([*lines, *([f"Not on a GPU: {setting.note}."] if setting.note else [])])


def table_of(setting: Setting, results: list[dict[str, Any]]) -> Table:
    """One column a configuration, which fits 80 characters."""
    table = Table()
    table.add_column("", no_wrap=True)
    for r in results:
        table.add_column(r["name"].replace(", ", "\n"), justify="right", no_wrap=True)
    compiled = [CONFIGURATIONS[r["name"]]["backend"] is not None for r in results]
    rows: dict[str, list[str]] = {
        "graphs": [str(r["graphs"]) if c else "" for r, c in zip(results, compiled)],
        "graph breaks": [str(r["breaks"]) if c else "" for r, c in zip(results, compiled)],
        "layers rewritten": [str(r.get("rewrites", "")) for r in results],
        "prefill, ms": [f"{r['prefill'] * 1e3:.1f}" for r in results],
        "one token, ms": [f"{r['decode'] * 1e3:.1f}" for r in results],
        "training step, ms": [f"{r['step'] * 1e3:.1f}" for r in results],
        "peak memory": [human_bytes(r["peak_memory"]) if r["peak_memory"] is not None else "" for r in results],
        "max difference": [f"{r['max_difference']:.1e}" if "max_difference" in r else "" for r in results],
    }
    for name, cells in rows.items():
        table.add_row(name, *cells)
    table.caption = "one token: a forward of one token. max difference: of the logits, from eager PEFT's"
    return table


def closing(results: list[dict[str, Any]], out: Path) -> list[str]:
    """Three sentences: what was gained, where it is written, and what to try next; the last one with lines to paste."""
    by_name = {r["name"]: r for r in results}
    ours, stock, lora = by_name[OURS], by_name[STOCK], by_name[LORA]
    measured = "; ".join(_compared(phase, ours, stock, lora) for phase in PHASES)
    layers = ours["rewrites"] + ours["misses"]
    return [
        f"With dorafx, compared with stock PEFT compiled by Inductor, {measured}{_memory(ours, stock, lora)}.",
        f"What dorafx did ({ours['rewrites']} of {_number(layers, 'DoRA layer')} rewritten, logits within "
        f"{ours['max_difference']:.1e} of PEFT's) is in {out / 'report.html'}, a page for the browser, in {out / 'log.json'}, "
        f"and the figures are in {out / 'results.json'}.",
        "Next, ask what dorafx would do with an adapter of yours (the folder that PEFT saved), then write the second line "
        "into your training script, after get_peft_model:\n"
        "    dorafx explain path/to/adapter\n"
        "    import dorafx; dorafx.optimize(model)",
    ]


def _compared(phase: str, ours: dict[str, Any], stock: dict[str, Any], lora: dict[str, Any]) -> str:
    """A phase's times in words, whichever is the shorter."""
    ratio = stock[phase] / ours[phase]
    if abs(ratio - 1) <= _SAME:
        verdict = "takes about as long"
    elif ratio > 1:
        verdict = f"is {ratio:.{int(ratio < 9.95)}f} times as fast" if ratio >= 1.15 else f"is {ratio - 1:.0%} faster"
    else:
        verdict = f"is {1 / ratio - 1:.0%} slower" if ratio > 0.5 else f"takes {1 / ratio:.1f} times as long"
    return f"{PHASES[phase]} {verdict} ({_ms(stock[phase])} to {_ms(ours[phase])} ms; plain LoRA {_ms(lora[phase])})"


def _memory(ours: dict[str, Any], stock: dict[str, Any], lora: dict[str, Any]) -> str:
    peaks = [r["peak_memory"] for r in (stock, ours, lora)]
    if None in peaks:
        return ""
    before, after, least = map(human_bytes, peaks)
    return f"; and peak memory goes from {before} to {after} (plain LoRA {least})"


def _ms(seconds: float) -> str:
    """Milliseconds with three digits."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _number(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"
