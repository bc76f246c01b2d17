"""A training loop of HF accelerate on two processes, by its own launcher and by torchrun.

``accelerate launch --cpu`` starts several processes by MPI only; for GPUs it uses torchrun, and the worker takes the CPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from distributed_support import HERE, SITES, STEPS, check, launch, run

pytest.importorskip("accelerate")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("launcher", ["accelerate launch", "torchrun"])
def test_trains_alike(launcher: str, tmp_path: Path) -> None:
    worker = "worker_accelerate.py"
    if launcher == "torchrun":
        results = launch(worker, tmp_path)
    else:
        options = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no"]
        file = tmp_path / "results.json"
        command = ["-m", "accelerate.commands.launch", *options, "--dynamo_backend", "no"]
        results = run([*command, "--main_process_port", "0", str(HERE / worker), str(file)], file, 280)
    for how in ("optimized before", "compiled after"):
        found = check(results, how)
        assert found["processes"] == 2 and found["kind"] == "DistributedDataParallel"
        assert found["losses"] < 1e-6 and found["gradients"] < 1e-5 and found["parameters"] < 1e-4
        assert found["sites"] == SITES and found["patterns"] == ["linear"] and not found["misses"]
        assert found["computed"] == SITES * STEPS and found["reused"] == 0
