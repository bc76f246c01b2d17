"""A job in a process of its own: results, progress, and every way to end badly."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from dorafx.bench.processes import JobError, run_job


def echo(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    print("not for the parent")
    report("half")
    return {"pid": os.getpid(), **request}


def raising(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    raise ValueError("wrong\nand more")


def wrapping(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    raise RuntimeError("backend='x' raised:\nKeyError: 'y'\nand more")


def killed(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    os.kill(os.getpid(), signal.SIGTERM)
    return {}


def leaving(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    print("a warning\nit broke", file=sys.stderr, flush=True)
    os._exit(3)


def silent(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    os._exit(4)


@pytest.mark.default_cases("None")
@pytest.mark.parametrize("start_method", [None, "spawn"])
def test_result_and_progress(start_method: str | None, capfd: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []
    answer = run_job(echo, {"x": [1, 2]}, seen.append, start_method)
    assert answer["x"] == [1, 2]
    assert answer["pid"] != os.getpid()
    assert seen == ["half"]
    assert capfd.readouterr().out == ""


def test_every_job_has_its_own_process() -> None:
    assert run_job(echo, {})["pid"] != run_job(echo, {})["pid"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize(
    ("job", "message"),
    [
        (raising, "^ValueError: wrong$"),
        (wrapping, "^RuntimeError: backend='x' raised: KeyError: 'y'$"),
        (killed, "^ended by signal 15$"),
        (leaving, "^it broke$"),
        (silent, "^ended with exit code 4 and no output$"),
    ],
)
def test_bad_ends(job: Any, message: str) -> None:
    with pytest.raises(JobError, match=message):
        run_job(job, {})


def test_an_interrupted_parent_ends_the_job() -> None:
    def interrupt(what: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(echo, {}, interrupt)


_ANCHOR = """
import sys
from dorafx.bench.plan import Settings, cases_of
from dorafx.bench.worker import configuration, request_for
settings = Settings(("compile",), hidden=(64,), rank=(2,), tokens=8, layers=(1,), seconds=0, rounds=1)
answer = configuration(request_for(settings, "peft-inductor", cases_of("compile", settings)[0]), print)
assert "dorafx.backend" not in sys.modules
print("graphs", answer["facts"]["graphs"], "breaks", answer["facts"]["graph breaks"])
"""


@pytest.mark.slow
def test_anchors_run_as_without_dorafx() -> None:
    """Importing dorafx's backend makes stock PEFT one graph; whoever is compared must not get that."""
    done = subprocess.run([sys.executable, "-c", _ANCHOR], capture_output=True, text=True, check=True)
    _, graphs, _, breaks = done.stdout.splitlines()[
        -1
    ].split()  # what is before it is the worker's reports of its turns
    assert int(graphs) > 10 and int(breaks) > 10
