"""The demo: what it says first, while it runs and at its end, on which device it runs, and that it measures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dorafx
from dorafx.bench.models import Size
from dorafx.cli import main
from dorafx.cli.demo import choose_setting
from dorafx.cli.demo.setting import ON_CPU, ON_GPU
from dorafx.cli.demo.words import closing, introduction
from dorafx.cli.demo.worker import CONFIGURATIONS, STEPS, WAITING, run
from dorafx.errors import DorafxError

RECORDED = Path(__file__).resolve().parents[2] / "examples" / "benchmarks" / "results" / "cpu-demo.json"
FOREIGN = r"Warning|torchao|bitsandbytes|site-packages|^[WIE]\d{4}|Traceback"
TINY = ["--hidden", "64", "--layers", "1", "--rank", "4", "--tokens", "16", "--repeats", "1"]
STAGES = ["making the model", "compiling prefill", WAITING, "timing the training step"]


def recorded() -> list[dict[str, Any]]:
    """What a run on a CPU measured."""
    results: list[dict[str, Any]] = json.loads(RECORDED.read_text(encoding="utf-8"))["results"]
    return results


@pytest.fixture
def members(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Recorded results in place of the processes'; the processes that would have run."""
    ran: list[Any] = []

    def run_groups(pending: deque[Any], budget: Any, listener: Any) -> None:
        (group,) = pending
        ran.extend(group.members)
        for member in group.members:
            listener.started(member)
        for stage in STAGES:
            for member in group.members:
                listener.reported(member, stage)
        for member, result in zip(group.members, recorded()):
            torch.save(torch.zeros(2), member.request["logits"])
            if member.request["log"]:
                Path(member.request["log"]).write_text(dorafx.rewrite_log().to_json(), encoding="utf-8")
            listener.ended(member, result)

    monkeypatch.setattr("dorafx.cli.demo.run_groups", run_groups)
    return ran


def test_what_it_says(members: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--device", "cpu", "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    text = " ".join(output.out.split())
    threads = "1 thread" if torch.get_num_threads() == 1 else f"{torch.get_num_threads()} threads"
    assert text.startswith(
        f"dorafx {dorafx.__version__} demo: a small Llama-shaped model with stock PEFT's DoRA, on the CPU ({threads})."
    )
    for name in CONFIGURATIONS:
        for stage in STAGES:
            assert f"\n{name}: {stage}\n" in output.out
    assert "training step, ms" in output.out
    ends = [text.rindex(start) for start in ("With dorafx, compared", "What dorafx did", "Next, ask what")]
    assert ends == sorted(ends) and ends[0] > text.rindex("max difference")
    assert output.out.endswith("\n    dorafx explain path/to/adapter\n    import dorafx; dorafx.optimize(model)\n")
    for name in ("log.json", "report.html", "results.json"):
        assert str(tmp_path / "out" / name) in output.out  # not broken into two lines
        assert (tmp_path / "out" / name).stat().st_size > 100 or name == "log.json"


def test_a_terminal_shows_what_runs(
    members: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--device", "cpu", "--out", "out"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("dorafx ")
    lines = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", output).replace("\r", "\n").splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line for line in lines if line.startswith(tuple(CONFIGURATIONS))]
    assert len(shown) >= len(CONFIGURATIONS)
    assert all(re.search(r"━ +\S.* \d:\d\d:\d\d$", line) for line in shown), shown
    assert not any(f": {STAGES[0]}" in line for line in lines)  # said once, not on lines of its own as well


def test_json_is_alone_on_standard_output(
    members: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", "--device", "cpu", "--json", "--out", str(tmp_path)]) == 0
    output = capsys.readouterr()
    summary = json.loads(output.out)
    assert set(json.loads(RECORDED.read_text(encoding="utf-8"))) <= set(summary)
    assert summary["device"] == "cpu" and summary["size"]["hidden"] == ON_CPU.hidden
    assert output.err.startswith("dorafx ") and "With dorafx, compared" in output.err


def test_three_sentences_of_what_was_measured() -> None:
    gained, written, following = closing(recorded(), Path("out"))
    assert gained == (
        "With dorafx, compared with stock PEFT compiled by Inductor, prefill is 7% faster (117 to 110 ms; plain LoRA 106); "
        "one token is 12 times as fast (70.7 to 5.99 ms; plain LoRA 7.09); "
        "the training step is 1.6 times as fast (235 to 146 ms; plain LoRA 142); "
        "and peak memory goes from 712 MiB to 618 MiB (plain LoRA 587 MiB)."
    )
    assert "7 of 7 DoRA layers rewritten, logits within 2.5e-06 of PEFT's" in written
    assert all(str(Path("out") / name) in written for name in ("report.html", "log.json", "results.json"))
    assert "dorafx explain" in following and "dorafx.optimize(model)" in following


@pytest.mark.parametrize(
    ("ours", "words"),
    [
        (0.2, "the training step takes 2.5 times as long (80 to 200 ms"),
        (0.1, "the training step is 25% slower (80 to 100 ms"),
        (0.082, "the training step takes about as long (80 to 82 ms"),
        (0.078, "the training step takes about as long (80 to 78 ms"),
        (0.0721, "the training step is 11% faster (80 to 72.1 ms"),
        (0.04, "the training step is 2.0 times as fast (80 to 40 ms"),
    ],
)
def test_what_is_slower_is_said(ours: float, words: str) -> None:
    results = recorded()
    for result in results:
        result["step"] = ours if result["name"] == "PEFT DoRA, dorafx" else 0.08
        result["peak_memory"] = None
    gained = closing(results, Path("out"))[0]
    assert words in gained and "memory" not in gained


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_process_says_what_it_does_next(dtype: str, tmp_path: Path) -> None:
    said: list[Any] = []
    request = {
        "name": "PEFT DoRA, eager",
        "size": vars(Size(64, 1, 4, 16)),
        "device": "cpu",
        "dtype": dtype,
        "logits": str(tmp_path / "logits.pt"),
        "log": "",
        "repeats": 1,
    }
    result = run(request, said.append)
    phases = ("prefill", "one token", "the training step")
    timed = [f"timing {phase}" for phase in phases]
    assert said == [
        "making the model",
        *(f"the first call of {phase}" for phase in phases),
        WAITING,
        {"turn": "alone"},
        *timed,
    ]
    assert len(said) - 1 == STEPS
    assert set(recorded()[0]) - {"max_difference"} == set(result)
    assert torch.load(request["logits"], weights_only=True).dtype == torch.float32


def gpu(monkeypatch: pytest.MonkeyPatch, gib: float = 80, capability: tuple[int, int] = (9, 0)) -> None:
    """A GPU of a size, which is not there."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: capability)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device=None: (int(gib * 2**30), 99 * 2**30))
    monkeypatch.setattr("torch.version.cuda", "13.0")


def test_a_gpu_is_used(
    members: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(monkeypatch)
    assert main(["demo", "--layers", "3", "--out", str(tmp_path)]) == 0
    assert "with stock PEFT's DoRA, on Some GPU." in " ".join(capsys.readouterr().out.split())
    for member in members:
        assert member.start_method == "spawn"
        assert (member.request["device"], member.request["dtype"]) == ("cuda", "bfloat16")
        assert (member.request["size"]["hidden"], member.request["size"]["layers"]) == (4096, 3)
    assert main(["demo", "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert {m.request["device"] for m in members[4:]} == {"cpu"}


@pytest.mark.parametrize(("gib", "least"), [(139, 24), (24, 24), (23, 8), (8, 8), (6, 0)])
def test_the_size_suits_the_memory(gib: float, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, gib)
    assert choose_setting().size == ON_GPU[least]


def test_a_gpu_that_cannot_serve_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, capability=(6, 1))
    setting = choose_setting()
    assert (setting.device, setting.size, setting.dtype) == ("cpu", ON_CPU, "float32")
    assert setting.note == "Some GPU is older than what torch.compile supports"

    def old_driver() -> bool:
        warnings.warn("CUDA initialization: the driver is too old\nand more", stacklevel=1)
        return False

    def taken(device: Any = None) -> Any:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy\nand more")

    monkeypatch.setattr("torch.cuda.get_device_capability", taken)
    assert choose_setting().note == "torch cannot use a GPU here: CUDA error: all CUDA-capable devices are busy"

    monkeypatch.setattr("torch.cuda.is_available", old_driver)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        note = choose_setting().note
    monkeypatch.undo()  # torch asks again when the test is over
    assert note == "torch cannot use a GPU here: CUDA initialization: the driver is too old"


def test_wrong_devices_and_sizes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DorafxError, match="must be cpu, cuda or cuda:N, not tpu"):
        choose_setting("tpu")

    def none(device: Any = None) -> Any:
        raise RuntimeError("no such GPU\nand more")

    monkeypatch.setattr("torch.cuda.mem_get_info", none)
    assert main(["demo", "--device", "cuda:7"]) == 2
    assert capsys.readouterr().err == "dorafx: --device cuda:7: torch cannot use it: no such GPU\n"
    assert main(["demo", "--device", "cpu", "--hidden", "100"]) == 2
    assert "hidden must be a multiple of 64" in capsys.readouterr().err
    assert main(["demo", "--repeats", "0"]) == 2


def test_without_peft_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["demo", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "dorafx: the demo needs peft and transformers: pip install 'dorafx[peft]'\n"


def test_without_a_compiler_it_says_so_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dorafx.cli.demo.has_cpp_compiler", lambda: False)
    assert main(["demo", "--device", "cpu", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("dorafx: on a CPU torch.compile needs a C++ compiler: ")


def test_an_interruption_ends_every_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dorafx.bench import schedule

    ended: list[bool] = []

    class Process:
        connection = None

        def end(self) -> None:
            ended.append(True)

    def run_groups(pending: deque[Any], budget: Any, listener: Any) -> None:
        schedule.run_groups(pending, budget, listener, start=lambda *arguments: Process())  # type: ignore[arg-type]

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dorafx.cli.demo.run_groups", run_groups)
    monkeypatch.setattr(schedule, "wait", interrupted)
    assert main(["demo", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert len(ended) == len(CONFIGURATIONS)
    assert capsys.readouterr().err == "dorafx: interrupted\n"


def _dies(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGTERM)
    return {}


def _raises(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    raise ValueError("it broke")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(("job", "message"), [(_dies, "ended by signal 15"), (_raises, "ValueError: it broke")])
def test_it_says_how_a_configuration_ended(
    job: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("dorafx.cli.demo.run", job)
    assert main(["demo", "--device", "cpu", "--out", str(tmp_path / "out"), "--json"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(rf"dorafx: the configuration '[\w, ]+' failed: {message}", last)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals")
def test_the_whole_demo_in_a_terminal(tmp_path: Path) -> None:
    """A tiny model, through the installed console script, with standard error on a terminal."""
    import pty

    script = str(Path(sys.executable).with_name("dorafx"))
    terminal, end = pty.openpty()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "80"}
    with subprocess.Popen(
        [script, "demo", "--device", "cpu", *TINY, "--json"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=end,
        env=environment,
    ) as process:
        os.close(end)
        seen = b""
        while True:
            try:
                part = os.read(terminal, 65536)
            except OSError:  # Linux: nobody holds the other end any more
                break
            if not part:
                break
            seen += part
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(terminal)
    shown = seen.decode()
    assert process.returncode == 0, shown
    assert shown.startswith(f"dorafx {dorafx.__version__} demo: ")
    text = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown).replace("\r", "\n")
    assert not re.search(FOREIGN, text, re.MULTILINE), text
    lines = [line for line in text.splitlines() if not line.startswith(tuple(CONFIGURATIONS))]
    summary = json.loads(printed)
    setting = choose_setting("cpu", hidden=64, layers=1, rank=4, tokens=16)
    own = " ".join([introduction(setting), *closing(summary["results"], Path("dorafx-demo"))])
    said, own = (re.sub(r"\(\d+ threads?\)", "(threads)", " ".join(part.split())) for part in (" ".join(lines), own))
    assert said == own  # nothing but this and the bars
    assert "PEFT DoRA, Inductor" in text and "compiling the training step" in text and "timing one token" in text

    results = {r["name"]: r for r in summary["results"]}
    mine, stock = results["PEFT DoRA, dorafx"], results["PEFT DoRA, Inductor"]
    assert (mine["breaks"], mine["rewrites"], mine["misses"]) == (0, 7, 0)
    assert stock["breaks"] > 20
    assert mine["graphs"] == results["plain LoRA, Inductor"]["graphs"]
    assert mine["max_difference"] < 1e-4
    for name in ("log.json", "report.html", "results.json"):
        assert (tmp_path / "dorafx-demo" / name).stat().st_size > 100


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_whole_demo_on_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", *TINY, "--json", "--out", str(tmp_path)]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["device"] == "cuda"
    assert next(r for r in summary["results"] if r["name"] == "PEFT DoRA, dorafx")["rewrites"] == 7
