"""The run of ``dorafx bench gpu``: its plan as groups of processes, and a file of results that is complete after every figure."""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dorafx.ops.triton.configs import RowNormConfig, gpu, table_of

from ..environment import describe_environment
from ..peers import find_peers
from ..processes import PEFT, JobProcess
from ..results import Metric, Results, Row
from ..schedule import Budget, Group, Member, run_groups
from ..table import human
from ..tune import Choice, paste_for
from ..work import Work
from ..worker import configuration
from .micro import micro
from .plan import PARTS, Batch, Item, plan_of
from .tuning import Trial, label_of, trials, tune_share

UNREACHED = "the run ended before it"
COSINE = "cosine of logits"
_MICRO_SHARE = 0.4
"""The share of the budget that the part micro may take if there are other parts."""
_TUNING_PROCESSES = 12


@dataclass(frozen=True)
class GpuSettings:
    """The settings of the command line.

    Attributes:
        budget: seconds from start to end.
        parts: of :data:`~dorafx.bench.gpu.plan.PARTS`; empty for all.
        device: ``"cpu"`` or a CUDA device.
        quick: tiny sizes, to check that everything runs.
        peer_path: folders with peers.
        seconds: of timed calls for each figure.

    Raises:
        ValueError: the budget is not a positive number.
    """

    budget: float
    parts: tuple[str, ...] = ()
    device: str = "cuda"
    quick: bool = False
    peer_path: tuple[str, ...] = ()
    seconds: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.budget < float("inf"):
            raise ValueError(f"--budget must be a number of seconds above 0, not {self.budget}")

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"


def run_gpu(
    settings: GpuSettings,
    out: Path | None,
    console: Console,
    start: Callable[..., JobProcess] = JobProcess,
) -> Results:
    """Measure as much of the plan as the budget allows, most important first.

    Args:
        settings: which parts, where, for how long.
        out: file for the results' JSON, rewritten after every figure.
        console: for a line about every finished row.
        start: makes a process of a job.

    Raises:
        ValueError: a folder of ``peer_path`` has no peer in it.
        OSError: ``out`` cannot be written.
    """
    budget = Budget(settings.budget)
    peers = find_peers([Path(folder) for folder in settings.peer_path])
    parts = settings.parts or tuple(PARTS)
    plan = plan_of(parts, settings.quick, settings.cuda, peers)
    # The settings for the head of a table: everything is in bf16 and measured once; local folders are left out.
    described = {**asdict(settings), "parts": list(parts), "peers": sorted(peers), "dtype": "bfloat16", "rounds": 1}
    del described["peer_path"]
    results = Results(described, describe_environment(settings.device, 0))
    with tempfile.TemporaryDirectory() as folder:
        run = _Run(settings, results, out, console, Path(folder), {name: str(path) for name, path in peers.items()})
        groups: deque[Group] = run.groups
        if plan.items:
            run.add_items(plan.items, alone=len(parts) == 1)
        for batch in plan.batches:
            run.add_batch(batch)
        if plan.tune:
            run.add_tuning()
        run.write()
        run_groups(groups, budget, run, start)
    run.write()
    return results


class _Run:
    """The listener of a run, which holds its results and adds groups."""

    def __init__(
        self,
        settings: GpuSettings,
        results: Results,
        out: Path | None,
        console: Console,
        folder: Path,
        peers: dict[str, str],
    ) -> None:
        self.settings, self.results, self.out, self.console, self.folder = settings, results, out, console, folder
        self.peers = peers
        self.groups: deque[Group] = deque()
        self.cores = os.cpu_count() or 1
        self.items: list[tuple[Item, Row]] = []
        self.current = -1
        self.rows: dict[Any, tuple[Row, dict[str, Work], Path | None]] = {}
        self.trials: list[Trial] = []
        self.tuned: dict[int, tuple[Row, Row]] = {}

    def write(self) -> None:
        if self.out is not None:
            self.results.write(self.out)

    def _request(self, **specific: Any) -> dict[str, Any]:
        base = {
            "dtype": "bfloat16", "device": self.settings.device, "seconds": self.settings.seconds,
            "threads": 1 if self.settings.quick else 0,  # several tiny jobs at once are quickest with one each
            "mode": "default", "codegen": "inductor", "compose": "auto", "scope": "model", "checkpointing": False,
            "micro_batches": 1, "autocast": False,
        }  # fmt: skip
        return {**base, **specific}

    def _member(self, key: Any, job: Any, request: dict[str, Any], needed: bool = False, fresh: bool = False) -> Member:
        """``fresh``: in a process without preloaded imports."""
        spawned = self.settings.cuda or fresh
        return Member(key, job, request, needed, "spawn" if spawned else None, () if spawned else PEFT)

    # -- adding groups

    def add_items(self, items: Sequence[Item], alone: bool) -> None:
        for item in items:
            row = Row(item.suite, item.case, item.name, item.parameters, left_out=UNREACHED, note=item.note)
            self.items.append((item, row))
            self.results.rows.append(row)
        share = 1.0 if alone else _MICRO_SHARE
        deadline = time.time() + self.settings.budget * share
        self.groups.append(self._micro(range(len(items)), deadline, ceilings=True))

    def _micro(self, indices: Sequence[int], deadline: float, ceilings: bool) -> Group:
        request = self._request(
            name="", seconds=min(self.settings.seconds, 0.1), least=7, deadline=deadline, ceilings=ceilings, peers=self.peers,
            side=512 if self.settings.quick else 0, items=[(i, asdict(replace(self.items[i][0], work={}))) for i in indices],
        )  # fmt: skip
        return Group([self._member("micro", micro, request, needed=True)], together=15.0, each=5.0)

    def add_batch(self, batch: Batch) -> None:
        members = []
        # All batches of a case add their rows to it, so that later ones are compared with earlier ones.
        for entry in batch.entries:
            key = (batch.suite, batch.case, entry.name)
            parameters = {"size": asdict(batch.size), **batch.request}
            row = Row(batch.suite, batch.case, entry.name, parameters, left_out=UNREACHED, note=batch.note)
            self.results.rows.append(row)
            logits = self._logits(key) if batch.measure == "regime" else None
            self.rows[key] = row, batch.work, logits
            request = self._request(
                **batch.request, name=entry.name, suite=batch.measure, parameters={"size": asdict(batch.size)},
                logits=str(logits or ""), peer=self.peers.get(entry.name, ""),
                compile_threads=max(1, self.cores // len(batch.entries)),
            )  # fmt: skip
            members.append(self._member(key, configuration, request, entry.needed, fresh=entry.name == "paper"))

        def reason_to_skip() -> str:
            reference = self.rows.get((batch.suite, batch.case, "dorafx"))
            beside = reference is not None and bool(reference[0].metrics)
            return "" if beside or not batch.beside else "there is nothing of dorafx beside which it would stand"

        self.groups.append(Group(members, batch.together, batch.each, reason_to_skip))

    def _logits(self, key: tuple[str, str, str]) -> Path:
        return self.folder / f"{len(self.rows)}-{key[2]}.pt"

    def add_tuning(self) -> None:
        cuda = self.settings.cuda
        card = gpu(torch.device(self.settings.device))
        table = table_of(card.architecture)
        self.trials = trials(table, (128,) if self.settings.quick else (8192, 4096), card if cuda else None)
        if self.settings.quick:
            self.trials = self.trials[: 2 * len(table)]
        for index in dict.fromkeys(trial.row for trial in self.trials):
            case = label_of(index, table[index])
            note = "" if cuda else "on a CPU sizes of the tiled norm's blocks in the place of launch configurations"
            in_use, fastest = (Row("tune", case, name, left_out=UNREACHED, note=note) for name in ("dorafx", "fastest"))
            self.tuned[index] = in_use, fastest
            self.results.rows += [in_use, fastest]
        processes = max(1, min(_TUNING_PROCESSES, self.cores - 1))
        members = []
        for number in range(processes):
            share = [(i, asdict(self.trials[i])) for i in range(number, len(self.trials), processes)]
            request = self._request(
                name="", trials=share, compiling=self.settings.budget / 3, seconds=min(self.settings.seconds, 0.05)
            )
            members.append(self._member("tune", tune_share, request))
        self.groups.append(Group(members, together=60.0 if cuda else 5.0, each=2.0))

    # -- listening

    def started(self, member: Member) -> None:
        if member.key in self.rows:
            self.rows[member.key][0].left_out = ""
            self.rows[member.key][0].error = "it did not end"  # what a run that is killed leaves

    def reported(self, member: Member, message: Any) -> None:
        if "ceilings" in message:
            for name, (unit, samples) in message["ceilings"].items():
                self.results.ceilings[name] = Metric(unit, [samples])
        elif "begun" in message:
            self.current = message["begun"]
        elif "item" in message:
            item, row = self.items[message["item"]]
            row.left_out, row.error = message.get("left_out", ""), message.get("error", "")
            _add(row, message.get("figures", {}), item.work)
            self._print_row(row)
        elif "trial" in message:
            self._tried(self.trials[message["trial"]], message)
        else:
            row, work, _ = self.rows[member.key]
            _add(row, message["figures"], work)
        self.write()

    def ended(self, member: Member, result: dict[str, Any]) -> None:
        if member.key in self.rows:
            row, work, _ = self.rows[member.key]
            row.error, row.facts = "", result["facts"]
            _add(row, result["figures"], work)
            self._compare(row)
            self._print_row(row)
            self.write()

    def failed(self, member: Member, why: str) -> None:
        if member.key in self.rows:
            row = self.rows[member.key][0]
            row.error = why
            self._print_row(row)
        elif member.key == "micro" and self.current >= 0:
            self._after_a_lost_device(member, why)
        elif member.key == "micro":
            self.left_out(member, f"the part's process failed before it: {why}")
        self.write()

    def left_out(self, member: Member, why: str) -> None:
        if member.key in self.rows:
            rows = [self.rows[member.key][0]]
        elif member.key == "micro":
            rows = [row for _, row in self.items if row.left_out == UNREACHED]
        else:
            rows = [row for pair in self.tuned.values() for row in pair if not row.metrics]
        for row in rows:
            row.left_out, row.error = why, ""
            self._print_row(row)
        self.write()

    def _after_a_lost_device(self, member: Member, why: str) -> None:
        """The item that was being measured failed; a new process continues with the following ones."""
        _, row = self.items[self.current]
        if row.left_out == UNREACHED:
            row.left_out, row.error = "", why
            self._print_row(row)
        rest = [i for i in range(self.current + 1, len(self.items)) if self.items[i][1].left_out == UNREACHED]
        self.current = -1
        if rest and not why.startswith("stopped"):
            deadline = member.request["deadline"]
            self.groups.appendleft(self._micro(rest, deadline, ceilings=not self.results.ceilings))

    def _tried(self, trial: Trial, message: dict[str, Any]) -> None:
        in_use, fastest = self.tuned[trial.row]
        present = self.trials.index(next(t for t in self.trials if t.row == trial.row)) == message["trial"]
        ending = "failed" if "error" in message else "tried"
        fastest.facts[ending] = 1 + fastest.facts.get(ending, 0)
        if "error" in message:
            if present:
                in_use.left_out, in_use.error = "", message["error"]
            return
        figures = {
            f"{p[0]}x{p[1]} r{p[2]}": Metric("s", [[seconds]]) for p, seconds in zip(trial.problems, message["seconds"])
        }
        if present:
            in_use.left_out, in_use.metrics = "", figures
            in_use.parameters = {"configuration": list(trial.configuration)}
        if not fastest.metrics or _product(figures) < _product(fastest.metrics):
            fastest.left_out, fastest.metrics = "", figures
            fastest.parameters = {"configuration": list(trial.configuration)}

    def _compare(self, row: Row) -> None:
        """Add the cosine of the logits with stock PEFT's to all rows of the case that have logits by now."""
        stock = self.rows.get((row.suite, row.case, "peft"))
        if stock is None or stock[2] is None or not stock[2].exists():
            return
        for (suite, case, name), (other, _, logits) in self.rows.items():
            same_case = (suite, case) == (row.suite, row.case) and name not in ("peft", "lora")
            if same_case and logits is not None and logits.exists() and COSINE not in other.metrics:
                row_logits, stock_logits = (torch.load(path).double().flatten() for path in (logits, stock[2]))
                cosine = torch.nn.functional.cosine_similarity(row_logits, stock_logits, dim=0)
                other.metrics[COSINE] = Metric("ratio", [[float(cosine)]])

    def _print_row(self, row: Row) -> None:
        if row.left_out:
            status = f"left out: {row.left_out}"
        else:
            figures = [f"{k} {human(m.median, m.unit)}" for k, m in row.metrics.items() if not k.endswith(", host")]
            status = ", ".join([*figures, *([f"failed: {row.error}"] if row.error else [])])
        self.console.print(
            f"{row.suite} {row.case}: {row.name}: {status}", highlight=False, soft_wrap=True, markup=False
        )


def _add(row: Row, figures: dict[str, Any], work: dict[str, Work]) -> None:
    for metric, (unit, samples) in figures.items():
        least = work.get(metric, Work(0.0, 0.0))
        row.metrics[metric] = Metric(unit, [samples], least.flops, least.bytes)


def _product(figures: dict[str, Metric]) -> float:
    """The product of the medians, which orders rows with the same figures as the geometric mean does."""
    return math.prod(metric.median for metric in figures.values())


def balance_line(results: Results) -> str:
    """The device's FLOPs and bytes for :mod:`dorafx.plan.cost`, as its line; empty if the ceilings were not measured."""
    if not {"matmul", "copy"} <= results.ceilings.keys():
        return ""
    matmul, copy = (max(results.ceilings[name].samples) for name in ("matmul", "copy"))
    kind = torch.device(results.settings["device"]).type
    return f'dorafx/plan/cost.py: BALANCE["{kind}"] = {matmul / copy:.1f}  # {matmul:.3g} FLOP/s over {copy:.3g} B/s'


def tuned_table(results: Results) -> str:
    """The fastest launch configurations that the part tune measured on a CUDA device, as a table to paste into
    :mod:`dorafx.ops.triton.configs`; empty unless all configurations in use were measured there."""
    device = torch.device(results.settings["device"])
    fastest = [row for row in results.rows if row.suite == "tune" and row.name == "fastest"]
    if device.type != "cuda" or not fastest or not all(row.metrics for row in fastest):
        return ""
    chosen = {row.case: row.parameters["configuration"] for row in fastest}
    key = gpu(device).architecture
    rows = []
    for index, config in enumerate(table_of(key)):
        fields = chosen.get(label_of(index, config))  # None if it does not fit the card
        rows.append(Choice(config if fields is None else RowNormConfig(*fields), 1.0, 1, 0))
    return paste_for(key, rows)
