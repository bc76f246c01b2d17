"""A job in a process of its own: its progress, its result, and how it ended if there is none."""

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
"""What takes a job with a model seconds to import."""

_SECONDS_TO_EXIT = 30

Report = Callable[[Any], None]
"""Tells the parent something of a job: plain data. Of a :func:`turn` it returns when the parent gives it."""

Job = Callable[[dict[str, Any], Report], dict[str, Any]]
"""A module-level function of a request and of a function that reports; both dicts are plain data."""


DEVICE = "device"
"""The turn that a job asks for before it touches the device."""
ALONE = "alone"
"""The turn that a job asks for before it times anything."""


def turn(kind: str) -> dict[str, str]:
    """What a job reports to be given a turn of a kind that its parent knows."""
    return {"turn": kind}


class JobError(DorafxError):
    """A job did not end well; the message says how it ended, in one line."""


class JobProcess:
    """``job(request, report)`` in a new process.

    What the job prints is kept from this process's output. The processes are forked from a server that has imported
    this package and nothing has run in, where the system can; on a CUDA device ask for ``"spawn"``, as nobody promises that
    what was imported left CUDA alone.

    Args:
        job: importable by its name.
        request: what it gets.
        start_method: of :mod:`multiprocessing`; None is the cheapest safe one.
        preload: modules that the server imports once for all jobs. It heeds those of this process's first job.

    Attributes:
        connection: for :func:`multiprocessing.connection.wait`; ready where :meth:`receive` returns at once.
    """

    def __init__(
        self, job: Job, request: dict[str, Any], start_method: str | None = None, preload: Sequence[str] = ()
    ) -> None:
        if start_method is None:
            # Elsewhere a forked process may not use the system's libraries (macOS), or there is no fork (Windows).
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
        """Wait for the next message: ``{"progress": what}`` for what the job reports, ``{"result": …}`` at its end.

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
        """Let a job go on that waits for a turn. One that died meanwhile shows in :meth:`receive`."""
        with contextlib.suppress(OSError):
            self.connection.send(None)

    def end(self) -> None:
        """Stop the process, unless it is through and on its way out, and clear up."""
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
    on_progress: Callable[[Any], None] = lambda what: None,
    start_method: str | None = None,
    preload: Sequence[str] = (),
) -> dict[str, Any]:
    """Run a :class:`JobProcess` and wait for it; it has every turn at once, as it is alone.

    Args:
        on_progress: called with all that the job reports.

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


def is_turn(what: Any) -> bool:
    """Whether a job that reports this waits for a turn."""
    return isinstance(what, dict) and set(what) == {"turn"}


def _run(job: Job, request: dict[str, Any], parent: Connection, output: str) -> None:
    """The process's own side."""
    # Into a file: a job's output must not end up inside the parent's, and a pipe that nobody reads would block it.
    sink = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os.dup2(sink, 1)
    os.dup2(sink, 2)

    def report(what: Any) -> None:
        parent.send({"progress": what})
        if is_turn(what):
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
    """An exception as the line that says most of it."""
    lines = [line.strip() for line in "".join(traceback.format_exception_only(error)).splitlines() if line.strip()]
    # Dynamo's first line says only which backend raised; what it raised is on the next.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
