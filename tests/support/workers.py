"""Workers: scripts of the tests that run in processes of their own and write what they measured to a JSON file."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["run_worker"]


def run_worker(
    arguments: Sequence[str],
    results: Path,
    paths: Sequence[str | Path],
    environment: Mapping[str, str],
    timeout: float | None = None,
) -> dict[str, Any]:
    """Run Python with these arguments, and these folders before the others of ``PYTHONPATH``, and return what it wrote to ``results``.

    Where it fails, the failure's first line is the first error that it printed.
    """
    path = os.pathsep.join([*map(str, paths), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments],
        env={**os.environ, **environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    said = done.stdout + done.stderr
    cause = next((line for line in said.splitlines() if re.search(r"\w(Error|Exception)\b|SIG[A-Z]+", line)), "")
    assert done.returncode == 0, f"{cause}\n{said[-6000:]}"
    found: dict[str, Any] = json.loads(results.read_text())
    return found
