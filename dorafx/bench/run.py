"""The run: configurations interleaved over rounds, each in a process of its own."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dorafx.errors import DorafxError

from .environment import describe_environment
from .plan import SUITES, Case, Settings, anchors_of, cases_of
from .processes import PEFT, JobError, run_job
from .results import Metric, Results, Row
from .worker import CEILINGS, configuration, request_for

Configuration = tuple[Case, Row]
Run = Callable[[dict[str, Any]], dict[str, Any]]


def progress_bar(console: Console) -> Progress:
    """A progress bar with a description, finished and total steps, and the time."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


def run_bench(settings: Settings, out: Path | None = None, console: Console | None = None) -> Results:
    """Measure everything that the settings name.

    A configuration that fails becomes a row with its error, and is skipped in later rounds; the others continue.

    Args:
        settings: what to measure.
        out: file for the results' JSON, rewritten after every round, so that an interrupted run leaves partial results.
        console: for the progress bar; standard error by default.

    Returns:
        The results.

    Raises:
        ValueError: sizes that a suite cannot take.
        DorafxError: a suite needs PEFT or transformers, which are not installed.
        OSError: ``out`` cannot be written.
    """
    configurations: list[Configuration] = []
    for suite in settings.suites:
        _check_installed(suite, settings.weights)
        names = ("dorafx", *anchors_of(suite, settings.against))
        for case in cases_of(suite, settings):
            configurations += [(case, Row(suite, case.label, name, case.parameters)) for name in names]
    results = Results(
        asdict(settings),
        describe_environment(settings.device, settings.threads),
        rows=[row for _, row in configurations],
    )
    if out is not None:
        out.touch()  # fails now, not after the first round
    start_method = "spawn" if torch.device(settings.device).type == "cuda" else None
    preload = PEFT if any(SUITES[suite].needs_peft for suite in settings.suites) else ()
    run = functools.partial(run_job, configuration, start_method=start_method, preload=preload)
    total = settings.rounds * (len(configurations) + 1)
    with progress_bar(console or Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=total)
        for number in range(settings.rounds):
            progress.update(task, description=CEILINGS)
            _measure_ceilings(settings, results, run)
            progress.advance(task)
            # Every other round backwards, so that a machine that slows down as it gets warm favours neither end.
            for case, row in configurations if number % 2 == 0 else reversed(configurations):
                progress.update(task, description=f"{row.suite} {row.case}: {row.name}")
                if not row.error:
                    _measure(settings, case, row, run)
                progress.advance(task)
            if out is not None:
                results.write(out)
    return results


def _measure_ceilings(settings: Settings, results: Results, run: Run) -> None:
    try:
        answer = run(request_for(settings, CEILINGS, None))
    except JobError as error:
        raise JobError(f"measuring the copy bandwidth and matmul rate failed: {error}") from error
    for metric, (unit, samples) in answer["figures"].items():
        results.ceilings.setdefault(metric, Metric(unit)).rounds.append(samples)


def _measure(settings: Settings, case: Case, row: Row, run: Run) -> None:
    try:
        answer = run(request_for(settings, row.name, case))
    except JobError as error:
        row.error = str(error)
        return
    row.facts = answer["facts"]
    for metric, (unit, samples) in answer["figures"].items():
        work = case.work.get(metric)
        known = row.metrics.setdefault(metric, Metric(unit, [], *((work.flops, work.bytes) if work else (0.0, 0.0))))
        known.rounds.append(samples)


def _check_installed(suite: str, weights: str) -> None:
    if weights == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        raise DorafxError("bench --weights nf4 compares with bitsandbytes' dequantisation: pip install bitsandbytes")
    needed = ("peft", "transformers") if SUITES[suite].needs_peft else ()
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        raise DorafxError(f"bench {suite} needs {' and '.join(absent)}: pip install 'dorafx[peft]'")
