"""torch's minifier with ``backend="dorafx"``, by the commands of ``examples/guide/reporting.md``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Loaded by every process: what it plants is there in the minifier's own processes too.
PLANT = """
import os

if os.environ.get("PLANTED") == "wrong":
    from dorafx import pipeline

    apply_plan = pipeline.apply_plan

    def planted(*args):
        new, copied = apply_plan(*args)
        (output,) = new.graph.find_nodes(op="output")
        for value in output.all_input_nodes:
            with new.graph.inserting_before(output):
                changed = new.graph.call_method("mul", (value, 1.5))
            changed.meta.update(value.meta)
            output.replace_input_with(value, changed)
        new.recompile()
        return new, copied

    pipeline.apply_plan = planted
elif os.environ.get("PLANTED") == "crash":
    from dorafx import codegen

    compile_graph = codegen.compile_graph

    def planted(gm, *args, **kwargs):
        if any(node.op in ("call_function", "call_method") and "tanh" in str(node.target) for node in gm.graph.nodes):
            raise RuntimeError("planted")
        return compile_graph(gm, *args, **kwargs)

    codegen.compile_graph = planted
"""

PROGRAM = """
import torch
import torch.nn.functional as F

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.randn(16, 12), requires_grad=False)
        self.a, self.b = torch.nn.Parameter(torch.randn(2, 12)), torch.nn.Parameter(torch.randn(16, 2))
        self.m = torch.nn.Parameter(torch.rand(16) + 1)

    def forward(self, x):
        n = (self.w + self.b @ self.a).norm(dim=1).detach()
        y = self.m / n * (F.linear(x.exp().log(), self.w) + F.linear(F.linear(x, self.a), self.b))
        return torch.tanh(y).sin().cos() * 2 + 1

torch.compile(Layer(), backend="dorafx")(torch.rand(3, 12) + 0.5)
print("ran")
"""


def minified(tmp_path: Path, planted: str, **variables: str) -> tuple[str, str]:
    """What the program printed, and the script that the minifier made of it."""
    (tmp_path / "plant").mkdir()
    (tmp_path / "plant" / "sitecustomize.py").write_text(PLANT, encoding="utf-8")
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path / 'plant'}{os.pathsep}{ROOT}", "PLANTED": planted}

    def python(path: Path, **more: str) -> str:
        done = subprocess.run(
            [sys.executable, str(path)], capture_output=True, text=True, cwd=tmp_path, env={**environment, **more}
        )
        return done.stdout + done.stderr

    output = python(tmp_path / "program.py", **variables)
    (launcher,) = tmp_path.glob("torch_compile_debug/*/minifier/minifier_launcher.py")
    assert str(launcher) in output, output[-2000:]
    python(launcher, **{name: value for name, value in variables.items() if name.endswith("FORWARD_ONLY")})
    script = (tmp_path / "repro.py").read_text(encoding="utf-8")
    assert "backend='dorafx'" in script
    return output, script.partition("class Repro")[2].partition("mod = ")[0]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_wrong_result(tmp_path: Path) -> None:
    variables = {
        "TORCHDYNAMO_REPRO_AFTER": "dynamo",
        "TORCHDYNAMO_REPRO_LEVEL": "4",
        "TORCHDYNAMO_REPRO_FORWARD_ONLY": "1",
    }
    output, graph = minified(tmp_path, "wrong", **variables)
    assert "Bad accuracy detected" in output
    # What is around the layer has gone, and the norm, which the planted rewrite needs, is there.
    assert "norm(" in graph and "+" in graph, graph
    assert not re.search(r"tanh\(|\.cos\(|\.exp\(", graph), graph


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_crash(tmp_path: Path) -> None:
    output, graph = minified(tmp_path, "crash", TORCHDYNAMO_REPRO_AFTER="dynamo", TORCHDYNAMO_REPRO_LEVEL="2")
    assert "RuntimeError: planted" in output
    assert "torch.tanh(" in graph and "norm(" not in graph and "linear(" not in graph, graph
