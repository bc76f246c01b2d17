"""Does Inductor find a C++ compiler here?"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from dorafx._compat.inductor import has_cpp_compiler


@pytest.fixture(autouse=True)
def _uncached() -> Iterator[None]:
    has_cpp_compiler.cache_clear()
    yield
    has_cpp_compiler.cache_clear()


@pytest.mark.skipif(sys.platform == "win32", reason="Windows looks for cl by other means")
class TestSearch:
    def test_finds_a_compiler_that_answers(self, tmp_path: Path) -> None:
        compiler = tmp_path / "c++"
        compiler.write_text("#!/bin/sh\nexit 0\n")
        compiler.chmod(0o755)
        with torch._inductor.config.patch("cpp.cxx", (None, str(compiler))):
            assert has_cpp_compiler() is True
        # The answer is kept: the search starts a process each time.
        compiler.unlink()
        assert has_cpp_compiler() is True

    @pytest.mark.parametrize("kind", ["missing", "failing", "a directory"])
    def test_finds_none(self, tmp_path: Path, kind: str) -> None:
        compiler = tmp_path / kind.replace(" ", "_")
        if kind == "failing":
            compiler.write_text("#!/bin/sh\nexit 1\n")
            compiler.chmod(0o755)
        elif kind == "a directory":
            compiler.mkdir()
        with torch._inductor.config.patch("cpp.cxx", (None, str(compiler))):
            assert has_cpp_compiler() is False

    @pytest.mark.skipif(not shutil.which("g++"), reason="no g++ here")
    def test_finds_the_compiler_of_this_machine(self) -> None:
        with torch._inductor.config.patch("cpp.cxx", (None, "g++")):
            assert has_cpp_compiler() is True
