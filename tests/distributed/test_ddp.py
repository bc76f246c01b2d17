"""DistributedDataParallel on two processes: gradients, parameters and outputs of stock PEFT, and nothing stale."""

from __future__ import annotations

from typing import Any

import pytest
from distributed_support import SITES, STEPS, check, launch_once

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch_once("worker_ddp.py", tmp_path_factory, "quick")


@pytest.fixture(scope="module")
def more(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch_once("worker_ddp.py", tmp_path_factory, "more")


def _assert_trained_alike(found: dict[str, Any], recomputed: bool = False) -> None:
    assert found["losses"] < 1e-6
    assert found["gradients"] < 1e-5
    assert found["parameters"] < 1e-4  # Adam divides by the gradients' size
    assert found["patterns"] == ["linear"] and not found["misses"]
    assert found["sites"] == SITES
    assert found["placements"] == ["prologue"]
    assert found["computed"] == SITES * STEPS and found["reused"] == SITES * STEPS * recomputed


@pytest.mark.slow
def test_ddp(quick: dict[str, Any]) -> None:
    """The graph is split at buckets that end within layers; every layer is rewritten whole all the same."""
    for how in ("outer", "modules"):
        found = check(quick, how)
        _assert_trained_alike(found)
        assert found["pieces"] > SITES // 2
    decoding = check(quick, "decode")
    assert decoding["before"] < 1e-5 and decoding["reused_before"] == SITES
    assert decoding["after"] < 1e-5
    assert decoding["computed"] == 3 * SITES and decoding["reused"] == 2 * SITES


@pytest.mark.slow
@pytest.mark.parametrize("how", ["inner", "model", "inductor", "outer checkpointed", "modules checkpointed"])
def test_ddp_in_every_way(more: dict[str, Any], how: str) -> None:
    # Layers that are compiled by themselves within a checkpointed region run again in the backward, and reuse their norms.
    _assert_trained_alike(check(more, how), how == "modules checkpointed")


@pytest.mark.slow
def test_dry_runs(more: dict[str, Any]) -> None:
    found = check(more, "explained")
    assert found["patterns"] == ["linear"] and found["sites"] == SITES and found["misses"] == 0
    assert found["checked"] == SITES and found["passed"]


@pytest.mark.slow
def test_zero3_is_left_alone(more: dict[str, Any]) -> None:
    found = check(more, "zero3")
    assert found["output"] < 1e-6 and found["rewrites"] == 0
    assert len(found["misses"]) == 1 and "DeepSpeed ZeRO-3" in found["misses"][0]


@pytest.mark.slow
def test_a_quantised_base(more: dict[str, Any]) -> None:
    pytest.importorskip("bitsandbytes")
    found = check(more, "quantised")
    assert found["gradients"] < 1e-5 and found["formats"] == ["nf4"]
    assert found["sites"] == 2 and found["placements"] == ["prologue"] and not found["misses"]
