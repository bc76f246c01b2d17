"""Every example runs as a user would run it, and prints what it promises."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
PROMISES = {
    "quickstart.py": ["14 modules rewritten, 0 missed", "norms: 14 computed"],
    "own_layer.py": ["2 modules rewritten, 0 missed", "step 10: loss"],
    "generate.py": ["same tokens as stock PEFT: True", "because a parameter was written"],
    "custom_pattern.py": ["base_only", "1 modules rewritten, 0 missed"],
    "inspect_log.py": ["rewritten: linear [96, 64] rank 4", "operator tanh at", "report.html True"],
    "finetune.py": ["resumed from the checkpoint", "14 modules rewritten, 0 missed"],
    "trl_sft.py": ["trained 4 steps", "14 modules rewritten, 0 missed"],
    "rl_loop.py": ["trained 3 steps", "rewritten: 14 modules, missed: 0", "merged and unmerged 50 times"],
    "benchmarks/distributed_costs.py": ["| 70B | 64, TP 8 × FSDP2 8 |"],
    "qdora.py": ["trained on torch.uint8 codes", "14 modules rewritten, 0 missed", "nf4"],
    "diffusion.py": ["step 3: loss", "31 modules rewritten, 0 missed"],
}
NEEDS = {"trl_sft.py": "trl", "rl_loop.py": "trl", "diffusion.py": "diffusers", "qdora.py": "bitsandbytes"}


def test_every_example_is_here() -> None:
    assert {p.name for p in EXAMPLES.glob("*.py")} == {name for name in PROMISES if "/" not in name}


@pytest.mark.default_cases("inspect_log.py")
@pytest.mark.parametrize("name", PROMISES)
def test_example(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / name)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for promise in PROMISES[name]:
        assert promise in done.stdout, done.stdout
    if "differ" in done.stdout:
        differences = [line.rsplit(" ", 1)[1] for line in done.stdout.splitlines() if "differ" in line]
        assert all(float(d) < 1e-4 for d in differences), done.stdout
