"""A job in a process of its own: its progress, and its result or error."""

from __future__ import annotations

import contextlib
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

PEFT = ("dorafx.bench.preloaded",)
"""Modules for jobs with a model, which take seconds to import."""

_SECONDS_TO_EXIT = 30

Report = Callable[[Any], None]
"""Sends plain data about a job to the parent. For a :func:`turn` it returns when the parent grants it."""

Job = Callable[[dict[str, Any], Report], dict[str, Any]]
"""A module-level function of a request and a function that reports; request and result are plain data."""


DEVICE = "device"
"""The turn that a job requests before it uses the device."""
ALONE = "alone"
"""The turn that a job requests before it times anything."""


def turn(kind: str) -> dict[str, str]:
    """What a job reports to request a turn: ``DEVICE`` or ``ALONE``."""
    return {"turn": kind}


class JobError(DorafxError):
    """A job failed; the message says how, in one line."""


class JobProcess:
    """``job(request, report)`` in a new process.

    The job's output does not appear in this process's output. Where the system allows it, processes are forked from a server that
    has only imported this package. For a CUDA device use ``"spawn"``: an import in the server may have initialised CUDA.

    Args:
        job: importable by its name.
        request: the job's argument.
        start_method: of :mod:`multiprocessing`; None is the cheapest safe one.
        preload: modules that the server imports once for all jobs; only those of this process's first job count.

    Attributes:
        connection: for :func:`multiprocessing.connection.wait`; ready when :meth:`receive` would return at once.
    """

    def __init__(
        self, job: Job, request: dict[str, Any], start_method: str | None = None, preload: Sequence[str] = ()
    ) -> None:
        if start_method is None:
            # Elsewhere a forked process cannot safely use system libraries (macOS), or there is no fork (Windows).
            start_method = "forkserver" if sys.platform == "linux" else "spawn"
        context: Any = multiprocessing.get_context(start_method)
        if start_method == "forkserver":
            context.set_forkserver_preload(["dorafx.bench.worker", *preload])
        self.connection: Connection
        self.connection, child_connection = context.Pipe()
        self._finished = False
        self._folder = tempfile.TemporaryDirectory()
        self._output = Path(self._folder.name) / "output.txt"
        self._process: Any = context.Process(target=_run, args=(job, request, child_connection, str(self._output)))
        try:
            self._process.start()
            child_connection.close()
        except BaseException:
            self.end()
            raise

    def receive(self) -> dict[str, Any]:
        """Wait for the next message: ``{"progress": …}`` for each report of the job, ``{"result": …}`` at its end.

        Raises:
            JobError: the job raised, or its process died.
        """
        try:
            message: dict[str, Any] = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            code = self._process.exitcode
            if code is not None and code < 0:
                raise JobError(f"ended by signal {-code}") from None
            output = self._last_output()
            raise JobError(output[-1] if output else f"ended with exit code {code} and no output") from None
        if "error" in message:
            raise JobError(str(message["error"]))
        self._finished = "result" in message
        return message

    def give_turn(self) -> None:
        """Let a job continue that waits for a turn. If it died meanwhile, :meth:`receive` raises."""
        with contextlib.suppress(OSError):
            self.connection.send(None)

    def end(self) -> None:
        """Stop the process, unless it has finished and is exiting, and clean up."""
        if self._process.pid is not None:
            if self._finished:
                self._process.join(_SECONDS_TO_EXIT)
            self._process.kill()
            self._process.join()
        self.connection.close()
        self._folder.cleanup()

    def _last_output(self) -> list[str]:
        if not self._output.exists():
            return []
        return self._output.read_text(encoding="utf-8", errors="replace").strip().splitlines()


def run_job(
    job: Job,
    request: dict[str, Any],
    on_progress: Callable[[Any], None] = lambda message: None,
    start_method: str | None = None,
    preload: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a :class:`JobProcess` and wait for it; every turn is granted at once, as it is the only job.

    Args:
        on_progress: called with each report of the job.

    Returns:
        What the job returned.

    Raises:
        JobError: the job raised, or its process died.
    """
    process = JobProcess(job, request, start_method, preload)
    try:
        while True:
            message = process.receive()
            if "result" in message:
                result: dict[str, Any] = message["result"]
                return result
            if is_turn(message["progress"]):
                process.give_turn()
            else:
                on_progress(message["progress"])
    finally:
        process.end()


def is_turn(message: Any) -> bool:
    """Whether a report is a request of a turn."""
    return isinstance(message, dict) and set(message) == {"turn"}


def _run(job: Job, request: dict[str, Any], parent: Connection, output: str) -> None:
    """Runs in the new process."""
    # Into a file: the output must not mix with the parent's, and a pipe that is not read would block the job.
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(sink, 1)
    os.dup2(sink, 2)

    def report(message: Any) -> None:
        parent.send({"progress": message})
        if is_turn(message):
            parent.recv()

    try:
        result = job(request, report)
    except Exception as error:
        traceback.print_exc()
        parent.send({"error": one_line(error)})
    else:
        parent.send({"result": result})
    parent.close()


def one_line(error: Exception) -> str:
    """An exception as its most informative line."""
    lines = [line.strip() for line in "".join(traceback.format_exception_only(error)).splitlines() if line.strip()]
    # Dynamo's first line says only which backend raised; the error is on the next.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
