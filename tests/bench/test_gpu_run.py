"""The benchmark of a GPU: what is planned, what becomes of its figures, and all of it for real in tiny sizes on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from dorafx.bench.ahead import CARDS
from dorafx.bench.gpu import PARTS, GpuSettings, balance_line, run, run_gpu, tuned_table
from dorafx.bench.gpu.micro import is_lost, micro
from dorafx.bench.gpu.plan import plan_of
from dorafx.bench.gpu.tuning import label_of, trials, tune_share
from dorafx.bench.plan import ANCHORS
from dorafx.bench.processes import JobError
from dorafx.bench.results import Metric, Results, Row
from dorafx.bench.tune import fits
from dorafx.cli import main
from dorafx.ops.triton.configs import HOPPER, RowNormConfig, table_of

PEERS = {"paper": Path("/a"), "axolotl": Path("/b")}
QUIET = Console(file=open(os.devnull, "w"))  # noqa: SIM115


# -- the plan


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("cuda", [False, True])
def test_whatever_is_compared_stands_beside_dorafx_in_the_same_run(quick: bool, cuda: bool) -> None:
    plan = plan_of(tuple(PARTS), quick, cuda, PEERS)
    first: dict[tuple[str, str], str] = {}
    for item in plan.items:
        assert first.setdefault((item.suite, item.case), item.name) == "dorafx"
    led: dict[tuple[str, str], str] = {}
    for batch in plan.batches:
        names = [entry.name for entry in batch.entries]
        assert len(set(names)) == len(names)
        led.setdefault((batch.suite, batch.case), names[0])
        if batch.beside:
            assert not any(entry.needed for entry in batch.entries)
        else:  # neither dorafx without what it is measured against, nor that alone
            assert [entry.name for entry in batch.entries if entry.needed] == ["dorafx", "lora"]
    assert set(led.values()) == {"dorafx"}


def test_the_cases_come_in_the_order_of_their_importance() -> None:
    plan = plan_of(tuple(PARTS), False, True, PEERS)
    assert [i.case for i in plan.items if i.name == "dorafx"] == [
        "8192x8192 r384", "4096x4096 r16", "8192x28672 r384", "8192x8192 r64", "8192x8192 r384, fp32 factors",
        "4096x4096 r16, fp32 factors", "8192x8192, fused by Inductor", "8192x8192, Triton's kernel",
        "8192x8192 r384, bnb8", "8192x8192 r384, affine",
    ]  # fmt: skip
    qwen = "qwen3-32b, 4 layers, r384, 4096 tokens"
    assert [(b.case, [e.name for e in b.entries]) for b in plan.batches] == [
        (f"{qwen}, bf16 adapters", ["dorafx", "lora", "peft", "dense"]),
        (f"{qwen}, autocast, fp32 adapters", ["dorafx", "lora", "peft"]),
        (f"{qwen}, CUDA graphs", ["dorafx", "lora", "merged", "peft"]),
        ("llama-3-8b, 4 layers, r16, 2048 tokens", ["dorafx", "lora", "peft", "axolotl"]),
        (f"{qwen}, bf16 adapters", ["paper", "chunked", "peft-inductor"]),
    ]
    assert plan.batches[0].request == {"checkpointing": True, "micro_batches": 2, "gradients": 8, "loss_tokens": 1024}
    assert plan.batches[1].request == {**plan.batches[0].request, "autocast": True}
    assert plan.batches[2].request == {"mode": "reduce-overhead"}


def test_parts_and_peers_are_what_was_asked_for() -> None:
    for part in PARTS:
        plan = plan_of((part,), False, True, {})
        assert bool(plan.items) == (part == "micro") and plan.tune == (part == "tune")
        assert {b.part for b in plan.batches} == ({part} if part in ("model", "decode") else set())
        assert not {e.name for b in plan.batches for e in b.entries} & {"paper", "axolotl"}
    everything = plan_of(tuple(PARTS), False, True, PEERS)
    names = {e.name for b in everything.batches for e in b.entries} | {i.name for i in everything.items}
    assert names == {"dorafx", *ANCHORS, "product", "paper", "axolotl"}
    small = [i.case for i in everything.items if i.name == "axolotl"]
    assert small == ["4096x4096 r16"]  # at large ranks it compiles for minutes


def test_the_limit_counts_the_logits_that_there_are() -> None:
    batch = plan_of(("model",), False, True, {}).batches[0]
    prefill, step, gradients = (batch.work[k] for k in ("prefill", "training step", "gradients, 8 micro-batches"))
    weights = 4 * sum(o * i + 384 * (o + i) for o, i in _qwen_linears())
    assert prefill.flops == 2 * 4096 * weights + 2 * 1024 * 1024 * 5120
    assert gradients.flops == pytest.approx(4 * step.flops)


def _qwen_linears() -> list[tuple[int, int]]:
    from dorafx.bench.shapes import PRESETS

    return list(PRESETS["qwen3-32b"].linears().values())


# -- the jobs


def request(**own: Any) -> dict[str, Any]:
    return {
        "dtype": "bfloat16", "device": "cpu", "seconds": 0.0, "threads": 0, "mode": "default", "codegen": "inductor",
        "compose": "auto", "scope": "model", "checkpointing": False, "micro_batches": 1, "autocast": False, **own,
    }  # fmt: skip


def item(name: str, seconds: float = 1.0, **changes: Any) -> dict[str, Any]:
    parameters = {"d_out": 32, "d_in": 64, "rank": 4, **changes}
    return {"suite": "norm", "name": name, "parameters": parameters, "compose": "auto", "seconds": seconds}


def test_one_process_measures_all_kernels_and_tells_each_at_once() -> None:
    told: list[dict[str, Any]] = []
    items = [
        item("dorafx"), item("dense", factors="float32"), item("nobody"), item("axolotl"), item("peft", seconds=1e6),
        item("product"),
    ]  # fmt: skip
    numbered, peers = list(enumerate(items)), {"axolotl": "/nowhere"}
    asked = request(name="", deadline=time.time() + 1e3, ceilings=True, side=64, items=numbered, peers=peers)
    micro(asked, told.append)
    kinds = [next(iter(what)) for what in told]
    assert kinds == ["turn", "turn", "ceilings", *4 * ["begun", "item"], "item", "begun", "item"]
    by_item = {what["item"]: what for what in told if "item" in what}
    assert set(by_item[0]["figures"]) == {"time", "largest allocation", "temporaries", "error"}
    assert by_item[0]["figures"]["error"][1][0] < 1e-5  # dorafx's norm is in fp32
    assert by_item[1]["figures"]["error"][1][0] < 1e-2
    assert by_item[2]["error"] == "KeyError: 'nobody'"
    assert "/nowhere/axolotl/kernels/dora.py cannot be used: FileNotFoundError" in by_item[3]["error"]
    assert by_item[4]["left_out"].startswith("its estimate of 1000000 s was more than the ")
    assert set(by_item[5]["figures"]) == {"time", "largest allocation", "temporaries"}
    json.dumps(told)


def test_errors_after_which_a_device_is_lost() -> None:
    assert is_lost(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert not is_lost(torch.OutOfMemoryError("CUDA out of memory"))


def test_launch_configurations_are_tried_the_present_ones_first() -> None:
    found = trials(HOPPER, (8192, 4096), CARDS[90].gpu)
    present = found[: len(HOPPER)]
    assert {t.row for t in present} == set(range(len(HOPPER)))
    assert all(RowNormConfig(*t.configuration) == HOPPER[t.row] for t in present)
    # Half precision and any rank first: most of the time goes there.
    assert HOPPER[found[0].row].max_rank is None and found[0].problems[0] == (8192, 8192, 384, 2)
    assert [HOPPER[t.row].factor_bytes for t in present] == sorted(c.factor_bytes for c in HOPPER)
    assert len(set(found)) == len(found)


@pytest.mark.parametrize("architecture", sorted(CARDS))
def test_only_what_fits_the_card_is_tried(architecture: int) -> None:
    card = CARDS[architecture].gpu
    table = table_of(architecture)
    tried = {t.row for t in trials(table, (64,), card)}
    assert tried == {i for i, row in enumerate(table) if fits(row, card)}
    assert {row.factor_bytes for i, row in enumerate(table) if i in tried} == {2, 4}
    assert len({label_of(i, row) for i, row in enumerate(table)}) == len(table)


def test_shares_of_trials_are_compiled_and_then_timed() -> None:
    told: list[dict[str, Any]] = []
    some = trials(HOPPER[:2], (32,), None)
    assert {t.configuration for t in some} == {(1,), (4,), (16,)}
    share = [(i, {"configuration": t.configuration, "problems": t.problems}) for i, t in enumerate(some)]
    share.append((99, {"configuration": ("x",), "problems": some[0].problems}))
    tune_share(request(name="", trials=share, compiling=1e3), told.append)
    assert told[0] == {"turn": "device"}
    assert told[1]["trial"] == 99 and "error" in told[1]
    assert told[2] == {"turn": "alone"}
    assert [what["trial"] for what in told[3:]] == list(range(len(some)))
    assert all(what["seconds"][0] > 0 for what in told[3:])
    told.clear()
    tune_share(request(name="", trials=share[:3], compiling=-1), told.append)
    assert [what["trial"] for what in told if "trial" in what] == [0]  # no time for more than one


# -- what becomes of the figures


class Scripted:
    """In place of a process: a list of messages, and an end."""

    lost: bool = False

    def __init__(self, job: Any, request: dict[str, Any], *unused: Any) -> None:
        from multiprocessing import Pipe

        self.request, self.connection, self._theirs = request, *Pipe()
        self.messages = list(self._script(job.__name__))
        self._theirs.send(None)

    def _script(self, job: str) -> Any:
        yield from ({"progress": {"turn": "device"}}, {"progress": {"turn": "alone"}})
        if job == "micro":
            yield {"progress": {"ceilings": {"copy": ["B/s", [1e12]], "matmul": ["FLOP/s", [5e14]]}}}
            for index, one in self.request["items"]:
                yield {"progress": {"begun": index}}
                if Scripted.lost and one["name"] == "dorafx":
                    Scripted.lost = False
                    yield JobError("AcceleratorError: CUDA error: an illegal memory access was encountered")
                    return
                yield {"progress": {"item": index, "figures": {"time": ["s", [1e-3]]}}}
        elif job == "tune_share":
            for index, trial in self.request["trials"]:
                seconds = 1.0 if index % 3 else 0.5
                yield {"progress": {"trial": index, "seconds": [seconds for _ in trial["problems"]]}}
        else:
            if self.request["logits"]:
                logits = torch.tensor([3.0, 4.0]) if self.request["name"] != "dense" else torch.tensor([4.0, 3.0])
                torch.save(logits, self.request["logits"])
            yield {"progress": {"figures": {"prefill": ["s", [0.5]]}}}
            if self.request["name"] == "lora":
                yield JobError("OutOfMemoryError: too much")
                return
            yield {"result": {"figures": {"prefill": ["s", [0.5]], "peak": ["B", [7.0]]}, "facts": {"graphs": 2}}}
            return
        yield {"result": {}}

    def receive(self) -> Any:
        message = self.messages.pop(0)
        if not self.messages:
            self.connection.recv()  # nothing is there any more
        if isinstance(message, JobError):
            raise message
        return message

    def give_turn(self) -> None: ...

    def end(self) -> None:
        self._theirs.close()
        self.connection.close()


def test_figures_failures_and_cosines_become_rows(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    results = run_gpu(GpuSettings(500, ("model", "micro", "tune"), "cpu", quick=True), out, QUIET, Scripted)  # type: ignore[arg-type]
    assert Results.read(out) == results and not list(tmp_path.glob("*.part"))
    rows = {(row.suite, row.case.rpartition(", ")[2], row.name): row for row in results.rows}
    ours = rows["model", "bf16 adapters", "dorafx"]
    assert (ours.error, ours.left_out, ours.facts) == ("", "", {"graphs": 2})
    assert set(ours.metrics) == {"prefill", "peak", "cosine of logits"} and ours.metrics["prefill"].flops > 0
    assert ours.metrics["cosine of logits"].median == pytest.approx(1.0)
    assert rows["model", "bf16 adapters", "dense"].metrics["cosine of logits"].median == pytest.approx(24 / 25)
    failed = rows["model", "bf16 adapters", "lora"]
    assert failed.error == "OutOfMemoryError: too much" and set(failed.metrics) == {"prefill"}  # what it told before
    assert all(row.metrics["time"].median == 1e-3 for row in results.rows if row.suite in ("norm", "compose"))
    assert set(results.ceilings) == {"copy", "matmul"}
    assert balance_line(results) == 'dorafx/plan/cost.py: BALANCE["cpu"] = 500.0  # 5e+14 FLOP/s over 1e+12 B/s'
    tuned = [row for row in results.rows if row.suite == "tune"]
    assert {row.name for row in tuned} == {"dorafx", "fastest"} and all(row.metrics for row in tuned)
    assert any(row.facts.get("tried") == 2 for row in tuned)


def test_a_lost_device_costs_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "lost", True)
    results = run_gpu(GpuSettings(500, ("micro",), "cpu", quick=True), None, QUIET, Scripted)  # type: ignore[arg-type]
    (failed,) = [row for row in results.rows if row.error]
    assert failed is results.rows[0] and "illegal memory access" in failed.error
    assert all(row.metrics and not row.left_out for row in results.rows[1:])


def test_a_process_that_never_begins_leaves_its_reason() -> None:
    class Stillborn(Scripted):
        def _script(self, job: str) -> Any:
            yield JobError("ImportError: no such library")

    results = run_gpu(GpuSettings(500, ("micro",), "cpu", quick=True), None, QUIET, Stillborn)  # type: ignore[arg-type]
    why = "the part's process failed before it: ImportError: no such library"
    assert {row.left_out for row in results.rows} == {why}


def test_what_there_is_no_time_for_is_listed() -> None:
    """Of 22 s, 20 s together and 1 s each suffice for one of a model's implementations, which makes no ratio."""
    results = run_gpu(GpuSettings(22, (), "cpu", quick=True), None, QUIET, Scripted)  # type: ignore[arg-type]
    left_out = {(row.suite, row.name): row.left_out for row in results.rows if row.left_out}
    assert {suite for suite, _ in left_out} == {"model", "decode", "overhead"}
    assert "its estimate of 24 s was more than the " in left_out["decode", "dorafx"]
    assert left_out["model", "chunked"] == "there is nothing of dorafx beside which it would stand"
    assert all(not row.metrics and not row.error for row in results.rows if row.left_out)
    assert all(row.metrics for row in results.rows if not row.left_out)


def test_the_table_of_what_was_tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "gpu", lambda device: CARDS[90].gpu)
    results = Results({"device": "cuda"})
    assert tuned_table(results) == ""
    for index, config in enumerate(HOPPER):
        fields = [config.factor_bytes, config.max_rank, 32, config.columns, config.depth, 4, 2]
        results.rows.append(
            Row("tune", label_of(index, config), "fastest", {"configuration": fields}, {"x": Metric("s", [[1.0]])})
        )
    head, _, table = tuned_table(results).partition("\n")
    assert head == "# dorafx/ops/triton/configs.py: TABLES[90]"
    namespace: dict[str, Any] = {"RowNormConfig": RowNormConfig}
    exec(table, namespace)
    assert [c.rows for c in namespace["ROW_NORM_90"]] == [32] * len(HOPPER)
    assert [c.max_rank for c in namespace["ROW_NORM_90"]] == [c.max_rank for c in HOPPER]


# -- the command


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.default_cases("9")
@pytest.mark.parametrize("signal_", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_what_it_has(signal_: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [
        sys.executable,
        "-m",
        "dorafx",
        "bench",
        "gpu",
        "--device",
        "cpu",
        "--quick",
        "--part",
        "micro",
        "-o",
        str(out),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(2400):
            if out.exists() and any(row.metrics for row in Results.read(out).rows):
                break
            time.sleep(0.05)
        process.send_signal(signal_)
        assert process.wait(30) in (-signal.SIGKILL, 130)
    finally:
        process.kill()
    rows = Results.read(out).rows
    assert any(row.metrics for row in rows)
    assert {row.left_out for row in rows if not row.metrics} == {"the run ended before it"} or signal_ == signal.SIGTERM


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_on_a_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    assert main(["bench", "gpu", "--quick", "--part", "micro", "--budget", "200", "-o", str(out)]) == 0
    results = Results.read(out)
    assert results.environment["driver"]
    for row in results.rows:
        timed = [name for name in row.metrics if f"{name}, host" in row.metrics]
        assert timed and not row.note and not row.left_out, row


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_everything_for_real(tmp_path: Path) -> None:
    """All of it, in tiny sizes on a CPU: every row has its figures, and what stands for something else says so."""
    out = tmp_path / "gpu.json"
    # On two idle cores it ends within 300 s; others may be at work on these.
    assert main(["bench", "gpu", "--device", "cpu", "--quick", "--budget", "2000", "-o", str(out)]) == 0
    results = Results.read(out)
    wanted = {
        "norm": {"time", "largest allocation", "temporaries"},
        "compose": {"forward", "forward + backward"},
        "model": {"prefill", "training step", "gradients, 2 micro-batches", "peak"},
        "decode": {"one token"},
        "overhead": {"one token", "training step"},
        "tune": {"128x128 r16"},
    }
    assert {row.suite for row in results.rows} == set(wanted)
    for row in results.rows:
        assert not row.error and not row.left_out, row
        assert row.suite == "tune" or set(row.metrics) >= wanted[row.suite], row
        assert row.metrics and all(m.samples and min(m.samples) >= 0 for m in row.metrics.values())
        assert bool(row.note) == (
            row.suite in ("decode", "tune") or (row.case.endswith("kernel") and row.name == "dorafx")
        )
    model = {(row.case.rpartition(", ")[2], row.name): row for row in results.rows if row.suite == "model"}
    for name in ("dorafx", "dense", "chunked", "peft-inductor"):
        assert model["bf16 adapters", name].metrics["cosine of logits"].median > 0.9999
    assert model["fp32 adapters", "dorafx"].metrics["cosine of logits"].median > 0.9999
    for row in model.values():
        if row.name == "dorafx":
            assert row.facts["rewritten"] == 7 and row.facts["graph breaks"] == 0
    assert model["bf16 adapters", "peft-inductor"].facts["graph breaks"] > 0
