"""Runs the interpreted tests in a process with Triton's interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from interpreter import MARKS, interpreted

pytestmark = MARKS


@pytest.mark.parametrize("name", ["interpreted.py", "interpreted_composition.py", "interpreted_checksums.py"])
def test_kernels_in_the_interpreter(name: str) -> None:
    interpreted(str(Path(__file__).with_name(name)))


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_row_norms_of_many_more_shapes_strides_and_dtypes() -> None:
    file = Path(__file__).with_name("interpreted.py")
    interpreted(f"{file}::test_any_shape_stride_and_dtype_mix", timeout=1800, DORAFX_TEST_EXAMPLES="400")
