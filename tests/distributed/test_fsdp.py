"""FSDP on two processes: ``fully_shard`` and FullyShardedDataParallel train as stock PEFT does, and nothing is stale."""

from __future__ import annotations

from typing import Any

import pytest
from distributed_support import SITES, STEPS, check, launch_once

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch_once("worker_fsdp.py", tmp_path_factory)


def _assert_rewritten(found: dict[str, Any], forwards: int = 1) -> None:
    assert found["patterns"] == ["linear"] and not found["misses"]
    assert found["placements"] == ["prologue"]
    assert found["computed"] + found["reused"] == SITES * STEPS * forwards
    # Recomputed in the backward, parameters have the contents that they had in the forward, but may be other tensors.
    assert found["reused"] <= SITES * STEPS * (forwards - 1)


@pytest.mark.parametrize(
    "how",
    [
        "blocks compiled before",
        "blocks compiled before, not resharded",
        "optimized before",
        "optimized after, not resharded",
        "compiled after",
        "inductor",
        "optimized, checkpointed",
        "blocks compiled before, checkpointed",
        "flat, optimized before",
        "flat, compiled after",
        "flat, checkpointed",
    ],
)
def test_trains_alike(results: dict[str, Any], how: str) -> None:
    found = check(results, how)
    assert found["losses"] < 1e-6
    assert found["gradients"] < 1e-5
    assert found["parameters"] < 1e-4
    # What is compiled within a checkpointed region runs again in the backward, its prologue too.
    _assert_rewritten(found, 2 if "checkpointed" in how else 1)


def test_checkpointing_between_compiler_and_shards(results: dict[str, Any]) -> None:
    """Under ``torch.compile`` of the whole model the hooks of a sharded block lie inside the checkpointed region, which
    Dynamo then runs eagerly: no graph reaches a backend, and the result is stock PEFT's."""
    found = check(results, "compiled after, checkpointed")
    assert found["losses"] == found["gradients"] == 0.0 and found["rewrites"] == 0


def test_mixed_precision(results: dict[str, Any]) -> None:
    """No further from fp32 than stock PEFT is, whose parameters are gathered in bf16 too."""
    found = check(results, "mixed precision")
    assert found["gradients"] < 1.05 * found["stock"]
    assert found["dtype"] == "torch.float32"
    _assert_rewritten(found)


@pytest.mark.parametrize("how", ["stale", "stale, not resharded", "flat, stale", "flat, stale, gradients sharded"])
def test_nothing_is_stale(results: dict[str, Any], how: str) -> None:
    """FSDP gathers parameters into tensors, memory and version counters that were there before."""
    found = check(results, how)
    for what in ("in place", "through data", "fused optimizer", "other"):
        assert found[what] < 1e-5, what
    assert found["sites"] == SITES and not found["misses"]
    assert found["reused"] == 0


def test_flat_parameters_alone(results: dict[str, Any]) -> None:
    """``use_orig_params=False``: Dynamo refuses such modules, and the model runs as stock PEFT."""
    found = check(results, "flat, without originals")
    assert found["output"] < 1e-6 and found["rewrites"] == 0
