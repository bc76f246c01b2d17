"""The files of the option ``dorafx.explain``: each has what was compiled so far with it."""

from __future__ import annotations

import threading
import warnings

from torch import fx

from dorafx._compat.dynamo import ends_in_a_break, graph_breaks_so_far
from dorafx.errors import DorafxWarning
from dorafx.explanation import Explanation, graph_breaks_of
from dorafx.log import RewriteLog

_lock = threading.Lock()
_files: dict[str, _File] = {}


class _File:
    """One file.

    Args:
        path: where it is.
        breaks_before: how many graph breaks there were before its first graph.
    """

    def __init__(self, path: str, breaks_before: int) -> None:
        self.path = path
        self.breaks_before = breaks_before
        self.explanation = Explanation(0, counted_breaks=0)
        self.failed = False

    def add(self, log: RewriteLog, broken: bool) -> None:
        """Take in one graph, and write the file again: nothing tells a backend that a forward has ended."""
        self.explanation.graph_count += 1
        self.explanation.counted_breaks = (self.explanation.counted_breaks or 0) + broken
        self.explanation.log.take_in(log)
        breaks = graph_breaks_so_far()
        self.breaks_before = min(self.breaks_before, len(breaks))  # torch may have forgotten some
        self.explanation.breaks = graph_breaks_of(breaks[self.breaks_before :])
        try:
            self.explanation.write(self.path)
        except Exception as error:  # also of what makes the report: it must not stop a compilation
            if not self.failed:
                self.failed = True
                why = getattr(error, "strerror", None) or str(error) or type(error).__name__
                warnings.warn(f"dorafx.explain: cannot write {self.path}: {why}", DorafxWarning, stacklevel=3)


def begin(path: str) -> None:
    """Collect what is compiled for a file from now on."""
    with _lock:
        _files[path] = _File(path, len(graph_breaks_so_far()))


def add_graph(path: str, gm: fx.GraphModule, log: RewriteLog) -> None:
    """Write a file again, with one graph more. A failure is one warning.

    Args:
        path: of the file; its suffix says what is written.
        gm: the graph as Dynamo captured it.
        log: its records.
    """
    with _lock:
        broken = ends_in_a_break(gm)
        if path not in _files:
            breaks = len(graph_breaks_so_far())
            _files[path] = _File(path, breaks - 1 if broken and breaks else breaks)
        _files[path].add(log, broken)
