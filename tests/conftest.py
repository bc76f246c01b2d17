"""Every test starts with an empty rewrite log and no compiled graphs."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import hypothesis
import pytest
import torch
from torch import fx

import dorafx
from dorafx._compat.inductor import source_hash
from dorafx.lift import Lifter
from dorafx.log import ReasonKind, Record

# Assertions in these explain themselves as those in tests do.
pytest.register_assert_rewrite("integration_support", "peft_features", "quantized_support", "running", "same_results")

# On a busy machine drawing may take long, and so may what is drawn for: neither is a failure. Every run of a person looks for other
# examples; CI judges a change by the same ones.
hypothesis.settings.register_profile(
    "dorafx", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow], derandomize="CI" in os.environ
)
hypothesis.settings.load_profile("dorafx")

# Inductor's cache knows an operator by its name. Tests have torch itself compile dorafx's, and shall not get those of an older version.
torch.compiler.config.cache_key_tag = source_hash()  # type: ignore[attr-defined]

if "PYTEST_XDIST_WORKER" in os.environ:
    # The processes share the cores, and so do those that tests start: two threads each would wait for each other.
    torch.set_num_threads(1)
    for name in ("OMP_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS"):
        os.environ.setdefault(name, "1")


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


@pytest.fixture(autouse=True)
def _reasons_have_kinds(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every record that dorafx makes has a kind where it has a reason; what is read from a file, or made by a test, need not."""
    wrong: list[Record] = []
    checked = Record.__post_init__

    def check(record: Record) -> None:
        checked(record)
        maker = sys._getframe(2).f_globals.get("__name__", "")  # beyond the generated __init__
        if maker.startswith("dorafx.") and maker != "dorafx.log.record":
            kind = ReasonKind.named(record.kind)
            if (kind is not None) != bool(record.reason):
                wrong.append(record)

    monkeypatch.setattr(Record, "__post_init__", check)
    yield
    assert not wrong
