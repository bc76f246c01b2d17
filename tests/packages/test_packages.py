"""The DoRA layers of published packages: values and gradients of the package's own code, and what the log says of it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from package_results import PACKAGES, Package
from pages import is_current
from workers import run_worker

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "examples" / "guide" / "packages.md"
HEAD = """# Other packages

Which DoRA layers of other packages are rewritten: LyCORIS, adapters, torchtune and NeMo Automodel, as published. For
anybody who does not train with PEFT. PEFT's layers are in [architectures](zoo.md), other ways to write the computation
in [every spelling](every-spelling.md).

- Layers are small. They run in training (with all gradients) and in inference, with Inductor and with eager codegen,
  under `torch.compile(…, backend="dorafx")`.
- Outputs and gradients agree with the package's own to 1e-5 of the largest entry.
- "Left alone" means that the layer runs as without dorafx: no factored norm exists for its delta.

Written by `DORAFX_WRITE_PAGES=1 pytest -m page`; `pytest -m slow tests/packages` installs the packages and measures
each row.

| package | layer | how it is written | result |
|---|---|---|---|
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.name)
def test_layers(package: Package, tmp_path: Path) -> None:
    beside = tmp_path / "beside"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(beside), *package.requirements]
    installed = subprocess.run(pip, capture_output=True, text=True)
    if "No matching distribution" in installed.stderr or "Failed to establish" in installed.stderr:
        pytest.skip(f"{package.name} cannot be fetched: {installed.stderr.strip().splitlines()[-1]}")
    assert installed.returncode == 0, installed.stderr[-2000:]
    results = tmp_path / "results.json"
    measured = run_worker([str(HERE / package.worker), str(results)], results, [beside, HERE], {"HF_HUB_OFFLINE": "1"})
    assert measured.keys() == package.layers.keys()
    for name, layer in package.layers.items():
        assert measured[name]["error"] < 1e-5, (name, measured[name])
        said = measured[name]["result"].split(" / ")
        if layer.patterns:
            assert set(said) == set(layer.patterns), (name, said)
        else:
            assert all(line.startswith("miss: ") and re.search(layer.miss, line) for line in said), (name, said)


@pytest.mark.page
def test_page() -> None:
    lines = []
    for package in PACKAGES:
        for name, layer in package.layers.items():
            result = f"rewritten whole: {', '.join(layer.patterns)}" if layer.patterns else "left alone"
            lines.append(f"| {package.name} | {name} | {layer.spelling} | {result} |")
    is_current(PAGE, HEAD + "\n".join(lines) + "\n")
