"""Rows with a norm of zero of weights that two processes share."""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_support import check, launch


@pytest.mark.slow
def test_finite_where_the_norm_is_sharded(tmp_path: Path) -> None:
    results = launch("worker_zero_rows.py", tmp_path)
    for axis in (0, 1):
        for differentiable in (False, True):
            found = check(results, f"{axis} {differentiable}")
            assert found["stock"] is False and found["row"] == 0 and found["others"] < 1e-5
            assert found["gradients"] and found["patterns"] == ["linear"]
