"""A job in a process of its own: its progress, its result, and how it ended if there is none."""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from dorafx.errors import DorafxError

__all__ = ["PEFT", "Job", "JobError", "run_job"]

PEFT = ("dorafx.bench.preloaded",)
"""What takes a job with a model seconds to import."""

Job = Callable[[dict[str, Any], Callable[[str], None]], dict[str, Any]]
"""A module-level function of a request and of a function that reports progress; both dicts are plain data."""


class JobError(DorafxError):
    """A job did not end well; the message says how it ended, in one line."""


def run_job(
    job: Job,
    request: dict[str, Any],
    on_progress: Callable[[str], None] = lambda what: None,
    start_method: str | None = None,
    preload: Sequence[str] = (),
) -> dict[str, Any]:
    """Run ``job(request, report)`` in a new process and wait for it.

    What the job prints is kept from this process's output. The processes are forked from a server that has imported
    this package and nothing has run in, where the system can; on a CUDA device ask for ``"spawn"``, as nobody promises that
    what was imported left CUDA alone.

    Args:
        job: importable by its name.
        request: what it gets.
        on_progress: called with each word that the job reports.
        start_method: of :mod:`multiprocessing`; None is the cheapest safe one.
        preload: modules that the server imports once for all jobs. It heeds those of this process's first job.

    Returns:
        What the job returned.

    Raises:
        JobError: the job raised, or its process died.
    """
    if start_method is None:
        # Elsewhere a forked process may not use the system's libraries (macOS), or there is no fork (Windows).
        start_method = "forkserver" if sys.platform == "linux" else "spawn"
    context: Any = multiprocessing.get_context(start_method)
    if start_method == "forkserver":
        context.set_forkserver_preload(["dorafx.bench.worker", *preload])
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output.txt"
        process = context.Process(target=_run, args=(job, request, sender, str(output)))
        try:
            process.start()
            sender.close()
            answer = _listen(receiver, on_progress)
            process.join()
        except BaseException:
            if process.pid is not None:
                process.kill()
                process.join()
            raise
        finally:
            receiver.close()
        if answer is not None and "result" in answer:
            result: dict[str, Any] = answer["result"]
            return result
        if answer is not None:
            raise JobError(str(answer["error"]))
        if process.exitcode is not None and process.exitcode < 0:
            raise JobError(f"ended by signal {-process.exitcode}")
        said = output.read_text(encoding="utf-8", errors="replace").strip().splitlines() if output.exists() else []
        raise JobError(said[-1] if said else f"ended with exit code {process.exitcode} and no output")


def _listen(receiver: Connection, on_progress: Callable[[str], None]) -> dict[str, Any] | None:
    """Progress until the answer comes; None if the other end closes before."""
    while True:
        try:
            message: dict[str, Any] = receiver.recv()
        except EOFError:
            return None
        if "progress" not in message:
            return message
        on_progress(message["progress"])


def _run(job: Job, request: dict[str, Any], sender: Connection, output: str) -> None:
    """The process's own side."""
    # Into a file: a job's output must not end up inside the parent's, and a pipe that nobody reads would block it.
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(sink, 1)
    os.dup2(sink, 2)
    try:
        result = job(request, lambda what: sender.send({"progress": what}))
    except Exception as error:
        traceback.print_exc()
        sender.send({"error": _one_line(error)})
    else:
        sender.send({"result": result})
    sender.close()


def _one_line(error: Exception) -> str:
    lines = [line.strip() for line in "".join(traceback.format_exception_only(error)).splitlines() if line.strip()]
    # Dynamo's first line says only which backend raised; what it raised is on the next.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
