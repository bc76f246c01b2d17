"""Every test starts with an empty rewrite log and no compiled graphs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

import dorafx

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the processes share the cores


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("COLUMNS", raising=False)  # libraries that tests import set it, and tables heed it
    torch._dynamo.reset()
    dorafx.rewrite_log().clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()
