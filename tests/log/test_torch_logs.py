"""torch's own ways to watch a compilation: TORCH_LOGS, and the structured trace that tlparse reads."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dorafx import Record, RewriteLog, rewrite_log

PROGRAM = """
import torch
import torch.nn.functional as F

def good(x, w, a, b, m):
    return m / (w + b @ a).norm(dim=1).detach() * (F.linear(x, w) + F.linear(F.linear(x, a), b))

def squashed(x, w, a, b, m):
    return m / (w + torch.tanh(b @ a)).norm(dim=1).detach() * F.linear(x, w)

operands = [torch.randn(s) for s in ((50, 6), (8, 6), (2, 6), (8, 2), (8,))]
for program in (good, squashed, lambda *args: args[0].sin()):
    torch.compile(program, backend="dorafx", options={"dorafx.codegen": "eager"})(*operands)
"""


def run(tmp_path: Path, **environment: str) -> str:
    """What a process that does not import dorafx writes to standard error."""
    script = tmp_path / "program.py"
    script.write_text(PROGRAM, encoding="utf-8")
    own = {k: v for k, v in os.environ.items() if k not in ("TORCH_LOGS", "TORCH_TRACE", "DORAFX_LOG")}
    done = subprocess.run(
        [sys.executable, str(script)], env={**own, **environment}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def test_torch_logs_and_the_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    text = run(tmp_path, TORCH_LOGS="dorafx", TORCH_TRACE=str(trace))
    (rewritten,) = [line for line in text.splitlines() if "rewritten (function): linear [8, 6] rank 2" in line]
    (missed,) = [line for line in text.splitlines() if "missed (function): operator tanh" in line]
    assert rewritten.startswith("I") and missed.startswith("I")  # torch's prefix: level, time, file, compile id
    assert "[0/0]" in rewritten and "[1/0]" in missed
    assert "graph before" not in text

    # tlparse's format: a line of metadata, then the payload's lines, each with a tab in front.
    entries: list[tuple[dict[str, object], list[str]]] = []
    (file,) = trace.glob("*.log")
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("\t"):
            entries[-1][1].append(line[1:])
        else:
            entries.append((json.loads(line[line.index("{") :]), []))
    artifacts = [(meta, "\n".join(payload)) for meta, payload in entries if "artifact" in meta]
    ours = [(m, p) for m, p in artifacts if m["artifact"] == {"name": "dorafx_rewrite_log", "encoding": "json"}]
    assert [m["frame_id"] for m, _ in ours] == [0, 1, 2]
    logs = [RewriteLog.from_json(payload) for _, payload in ours]
    assert [(len(log.rewrites), len(log.misses)) for log in logs] == [(1, 0), (0, 1), (0, 0)]
    assert logs[0].drawings[logs[0].records[0].drawing].after
    graphs = [p for m, p in artifacts if m["artifact"] == {"name": "dorafx_rewritten_graph", "encoding": "string"}]
    assert len(graphs) == 1 and "torch.ops.dorafx.compose" in graphs[0]


@pytest.mark.slow
def test_verbose_logs_show_the_plan_and_both_graphs(tmp_path: Path) -> None:
    text = run(tmp_path, TORCH_LOGS="+dorafx")
    assert text.count("graph before") == text.count("graph after") == 1
    assert "torch.ops.dorafx.compose" in text
    assert "low-rank product accumulated in the GEMM" in text
    assert run(tmp_path) == ""


def test_loggers_are_silent_by_default(caplog: pytest.LogCaptureFixture) -> None:
    rewrite_log().add(Record("missed", reason="why"))
    assert not [r for r in caplog.records if r.name.startswith("dorafx")]
    with caplog.at_level(logging.INFO, logger="dorafx"):
        rewrite_log().add(Record("missed", "a.b", reason="why", source="f.py:1"))
        RewriteLog().add(Record("missed", "another log's"))
    assert [r.getMessage() for r in caplog.records if r.name.startswith("dorafx")] == ["missed a.b: why [f.py:1]"]


def test_set_logs_takes_the_name() -> None:
    level = logging.getLogger("dorafx").level
    try:
        torch._logging.set_logs(modules={"dorafx": logging.DEBUG})
        assert logging.getLogger("dorafx.backend").isEnabledFor(logging.DEBUG)
    finally:
        torch._logging.set_logs()
        logging.getLogger("dorafx").setLevel(level)
