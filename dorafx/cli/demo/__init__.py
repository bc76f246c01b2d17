"""``dorafx demo``: a stock PEFT DoRA model run eagerly, compiled by Inductor, and with dorafx, compared with plain LoRA."""

from __future__ import annotations

import importlib.util
import json
import tempfile
import textwrap
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from dorafx._compat.inductor import has_cpp_compiler
from dorafx.bench.models import Size
from dorafx.bench.processes import PEFT
from dorafx.bench.schedule import STOPPED, Budget, Group, Member, run_groups
from dorafx.errors import DorafxError
from dorafx.log import RewriteLog

from .setting import Setting, choose_setting
from .words import closing, introduction, table_of
from .worker import CONFIGURATIONS, STEPS, run

__all__ = ["Setting", "Size", "choose_setting", "run_demo"]

_SECONDS = 6 * 3600.0
"""After which it is stopped: something hangs."""


def run_demo(setting: Setting, out: Path, repeats: int = 5, as_json: bool = False) -> dict[str, Any]:
    """Measure every configuration, each in a process of its own, print the table, and write the log and the report.

    Args:
        setting: the device and the size of the model.
        out: folder for ``log.json``, ``report.html`` and ``results.json``; made if need be.
        repeats: timed calls for each figure, after three warm-up calls.
        as_json: print the results as JSON instead of the table; everything else goes to standard error.

    Returns:
        The results as written to ``results.json``.

    Raises:
        DorafxError: transformers or PEFT is not installed, or there is no C++ compiler, or a configuration failed; the message says
            what is missing or has the error.
    """
    absent = [name for name in ("peft", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        raise DorafxError(f"the demo needs {' and '.join(absent)}: pip install 'dorafx[peft]'")
    out.mkdir(parents=True, exist_ok=True)
    console = Console(stderr=as_json, highlight=False)
    _say(console, introduction(setting))
    if not setting.cuda and not has_cpp_compiler():
        raise DorafxError("on a CPU torch.compile needs a C++ compiler: install g++ or clang, or name one in CXX")
    with tempfile.TemporaryDirectory() as folder:
        results = _measure(setting, Path(folder), out / "log.json", repeats, console)
        stock = torch.load(Path(folder) / "logits0.pt", weights_only=True)
        for index, result in enumerate(results):
            if CONFIGURATIONS[result["name"]]["use_dora"]:
                logits = torch.load(Path(folder) / f"logits{index}.pt", weights_only=True)
                result["max_difference"] = float((logits - stock).abs().max())
    RewriteLog.from_json((out / "log.json").read_text(encoding="utf-8")).to_html(out / "report.html")
    summary = {
        "size": asdict(setting.size),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "device": setting.device,
        "dtype": setting.dtype,
        "results": results,
    }
    (out / "results.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    if as_json:
        print(json.dumps(summary, indent=1))
    else:
        console.print(table_of(setting, results))
    for sentence in closing(results, out):
        _say(console, "\n" + sentence)
    return summary


def _measure(setting: Setting, folder: Path, log_file: Path, repeats: int, console: Console) -> list[dict[str, Any]]:
    members = [
        Member(
            name,
            run,
            {
                "name": name,
                "size": asdict(setting.size),
                "device": setting.device,
                "dtype": setting.dtype,
                "logits": str(folder / f"logits{index}.pt"),
                "log": str(log_file) if CONFIGURATIONS[name]["backend"] == "dorafx" else "",
                "repeats": repeats,
            },
            needed=True,
            # CUDA does not survive a fork of a process that has used it.
            start_method="spawn" if setting.cuda else None,
            preload=PEFT,
        )
        for index, name in enumerate(CONFIGURATIONS)
    ]
    with _listener(console) as listener:
        run_groups(deque([Group(members, 0, 0)]), Budget(_SECONDS), listener)
    if listener.stopped:
        raise DorafxError(listener.stopped)
    return [listener.results[name] for name in CONFIGURATIONS]


class _Listener:
    """A line for each configuration, which says what is done now; where there is no terminal, a line for each step."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self.results: dict[str, dict[str, Any]] = {}
        self._console = console
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}
        self.stopped = ""

    def started(self, member: Member) -> None:
        self._tasks[member.key] = self._progress.add_task(member.key, total=STEPS, does="starting a process")

    def reported(self, member: Member, message: Any) -> None:
        task = self._tasks[member.key]
        begun = self._progress.tasks[task].fields["does"] != "starting a process"
        self._progress.update(task, advance=int(begun), does=message, refresh=True)
        if not self._console.is_terminal:
            self._console.print(f"{member.key}: {message}", soft_wrap=True)

    def ended(self, member: Member, result: dict[str, Any]) -> None:
        self.results[member.key] = result
        self._progress.update(self._tasks[member.key], completed=STEPS, does="done")

    def failed(self, member: Member, why: str) -> None:
        if why.startswith(STOPPED):  # after another has failed, or when the user or the budget ends the run
            self.stopped = why
        else:
            raise DorafxError(f"the configuration {member.key!r} failed: {why}")

    def left_out(self, member: Member, why: str) -> None:
        self.failed(member, why)


@contextmanager
def _listener(console: Console) -> Iterator[_Listener]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.fields[does]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield _Listener(console, progress)


def _say(console: Console, text: str) -> None:
    """Print text that is wrapped between words, so that a path or a command can be copied."""
    width = max(console.width, 40)
    for line in text.splitlines():
        kept = line.startswith("    ")
        wrapped = [line] if kept else textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
        console.print("\n".join(wrapped), soft_wrap=True, markup=False)
