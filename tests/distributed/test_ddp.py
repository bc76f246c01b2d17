"""DistributedDataParallel on two processes: gradients, parameters and outputs of stock PEFT, and nothing stale."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from distributed_support import EAGER, SITES, STEPS, check, launch_once
from integration_support import dora_sites, peft_perceptron
from torch._dynamo.backends.distributed import SubmodCompiler
from torch.nn.parallel import DistributedDataParallel

import dorafx

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
    assert decoding["computed"] == 2 * SITES and decoding["reused"] == 3 * SITES


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


def _by_backend(model: Any) -> Any:
    return torch.compile(model, backend="dorafx", options=EAGER)


def _by_partial(model: Any) -> Any:
    backend = functools.partial(torch._dynamo.lookup_backend("dorafx"), options=EAGER)
    return torch.compile(model, backend=backend)


def _by_optimize(scope: str) -> Any:
    return lambda model: dorafx.optimize(model, scope=scope, codegen="eager")


@pytest.mark.parametrize(
    "compiled",
    [_by_backend, _by_partial, _by_optimize("model"), _by_optimize("modules")],
    ids=["backend", "partial", "optimize-model", "optimize-modules"],
)
def test_whole_graphs_reach_the_backend(compiled: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process, with buckets that end after every parameter: however Dynamo is given the backend, a layer is rewritten before
    its graph is split."""
    buckets = SimpleNamespace(bucket_bytes_cap=1)
    monkeypatch.setattr(DistributedDataParallel, "_active_ddp_module", buckets)
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    split: list[int] = []
    piece = SubmodCompiler.compile_submod
    monkeypatch.setattr(SubmodCompiler, "compile_submod", lambda *args: (split.append(1), piece(*args))[1])
    model = peft_perceptron().train()
    compiled(model)(torch.randn(3, 24))
    log = dorafx.rewrite_log()
    assert {r.pattern for r in log.rewrites} == {"linear"} and not log.misses
    assert {r.site for r in log.rewrites} == set(dora_sites(model))
    assert split  # there were buckets
