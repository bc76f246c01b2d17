"""Tests that run in a process of their own with Triton's interpreter, which is switched on for a whole process, before Triton is imported."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy
import pytest
import triton

from dorafx.versions import minor

MARKS = [
    pytest.mark.triton,
    pytest.mark.skipif(
        minor(triton.__version__) <= (3, 6) and minor(numpy.__version__) >= (2, 4),
        reason="the interpreter of Triton 3.6 does not run with numpy 2.4 or newer",
    ),
]


def interpreted(*arguments: str, timeout: float = 280, **environment: str) -> None:
    """Run pytest with these arguments and additional environment variables; some test must run, and all must pass."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
