"""``dorafx demo``: a stock PEFT DoRA model run eagerly, compiled by Inductor, and with dorafx, compared with plain LoRA."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from dorafx.bench.models import Size
from dorafx.bench.processes import PEFT, JobError, run_job
from dorafx.bench.run import progress_bar
from dorafx.errors import DorafxError
from dorafx.log import RewriteLog
from dorafx.log.table import human_bytes

from .worker import CONFIGURATIONS, PHASES, run

__all__ = ["Size", "run_demo"]


def run_demo(size: Size, out: Path, repeats: int = 5, as_json: bool = False) -> dict[str, Any]:
    """Measure every configuration, each in a process of its own, print the table, and write the log and the report.

    Args:
        size: of the model.
        out: folder for ``log.json``, ``report.html`` and ``results.json``; made if need be.
        repeats: timed calls for each figure, after two warm-up calls.
        as_json: print the results as JSON instead of the table.

    Returns:
        The results as written to ``results.json``.

    Raises:
        DorafxError: transformers or PEFT is not installed, or a configuration failed; the message has its error.
    """
    out.mkdir(parents=True, exist_ok=True)
    log_file = out / "log.json"
    results: list[dict[str, Any]] = []
    console = Console(stderr=as_json)
    with tempfile.TemporaryDirectory() as folder, progress_bar(console) as progress:
        task = progress.add_task("starting", total=len(CONFIGURATIONS) * len(PHASES))
        for index, name in enumerate(CONFIGURATIONS):
            progress.update(task, description=name)
            advance = functools.partial(progress.advance, task)
            results.append(_run_one(name, index, size, Path(folder), log_file, repeats, advance))
        stock = torch.load(Path(folder) / "logits0.pt", weights_only=True)
        for index, result in enumerate(results):
            if CONFIGURATIONS[result["name"]]["use_dora"]:
                logits = torch.load(Path(folder) / f"logits{index}.pt", weights_only=True)
                result["max_difference"] = float((logits - stock).abs().max())
    report = RewriteLog.from_json(log_file.read_text(encoding="utf-8")).to_html(out / "report.html")
    summary = {"size": asdict(size), "torch": torch.__version__, "threads": torch.get_num_threads(), "results": results}
    (out / "results.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        console.print(_table(size, results))
        console.print(
            f"log: {log_file}\nreport: {report}\nresults: {out / 'results.json'}", highlight=False, soft_wrap=True
        )
    return summary


def _run_one(
    name: str, index: int, size: Size, folder: Path, log_file: Path, repeats: int, advance: Callable[[], None]
) -> dict[str, Any]:
    request = {
        "name": name,
        "size": asdict(size),
        "logits": str(folder / f"logits{index}.pt"),
        "log": str(log_file) if CONFIGURATIONS[name]["backend"] == "dorafx" else "",
        "repeats": repeats,
    }
    try:
        return run_job(run, request, lambda phase: advance(), preload=PEFT)
    except JobError as error:
        raise DorafxError(f"the configuration {name!r} failed: {error}") from error


def _table(size: Size, results: list[dict[str, Any]]) -> Table:
    """One column a configuration, which fits 80 characters."""
    title = f"hidden {size.hidden}, {size.layers} layers, rank {size.rank}, {size.tokens} tokens, {torch.get_num_threads()} threads"
    table = Table(title=title)
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
    table.caption = "one token: a forward of one token"
    return table
