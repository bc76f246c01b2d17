"""Every test starts with an empty rewrite log and no compiled graphs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NoReturn

import pytest
import torch
from torch import fx

import dorafx
from dorafx.lift import Lifter

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores


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
