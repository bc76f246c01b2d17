"""Runs the interpreted tests in a process with Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

from dorafx.versions import minor

triton = pytest.importorskip("triton")


pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(
        minor(triton.__version__) <= (3, 6) and minor(numpy.__version__) >= (2, 4),
        reason="the interpreter of Triton 3.6 does not run with numpy 2.4 or newer",
    ),
]


def interpreted(*arguments: str, timeout: float = 280, **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env={**os.environ, "TRITON_INTERPRET": "1", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("name", ["interpreted.py", "interpreted_composition.py", "interpreted_checksums.py"])
def test_kernels_in_the_interpreter(name: str) -> None:
    interpreted(str(Path(__file__).with_name(name)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_row_norms_of_many_more_shapes_strides_and_dtypes() -> None:
    file = Path(__file__).with_name("interpreted.py")
    interpreted(f"{file}::test_any_shape_stride_and_dtype_mix", timeout=1800, DORAFX_TEST_EXAMPLES="400")
