"""Every test starts with an empty rewrite log and no compiled graphs."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import NoReturn

import pytest
import torch
from torch import fx

import dorafx
from dorafx.lift import Lifter

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark the cases that the default run leaves to the slow one (``default_cases``). Where the slow tests do not all fit into a
    run's time, each run begins with others (``DORAFX_SLOW_START``, any number)."""
    unknown: dict[str, set[str]] = {}
    for item in items:
        cases = item.get_closest_marker("default_cases")
        if cases is None or not isinstance(item, pytest.Function):
            continue
        unknown.setdefault(item.nodeid.split("[")[0], set(cases.args)).discard(item.callspec.id)
        if item.callspec.id not in cases.args:
            item.add_marker("slow")
    unknown = {test: ids for test, ids in unknown.items() if ids}
    if unknown and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"default_cases names cases that there are not: {unknown}")
    start = os.environ.get("DORAFX_SLOW_START")
    if start is not None and items:
        # The golden ratio: starts of successive runs lie far from each other, however many tests there are.
        place = int(int(start) * 0.6180339887498949 % 1 * len(items))
        items[:] = items[place:] + items[:place]


def pytest_runtest_setup(item: pytest.Item) -> None:
    """After a deadline (``DORAFX_SLOW_DEADLINE``, in seconds since 1970) what is left is skipped, and listed by ``-rs``."""
    deadline = os.environ.get("DORAFX_SLOW_DEADLINE")
    if deadline is not None and time.time() > float(deadline):
        pytest.skip("left out: the time was up")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("COLUMNS", raising=False)  # libraries that tests import set it, and tables heed it
    torch._dynamo.reset()
    dorafx.rewrite_log().clear()
    # What a transfer function raises makes an unknown value of the node; a test shall see it.
    monkeypatch.setattr(Lifter, "_failed", _raise)
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def _raise(lift: Lifter, node: fx.Node, error: Exception) -> NoReturn:
    raise error
