"""The table of transfer functions: what reads an operator, and in which order."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from dorafx.lift import lifter
from dorafx.lift.lifter import Reading, transfer, transfers

FAMILIES = ("arithmetic", "batched", "narrow", "norms", "layout", "rearranged")
BACKWARDS = f"""
import sys, types, importlib
import dorafx.lift.lifter as lifter
expected = {{name: [f.__qualname__ for f in fs] for name, fs in lifter.transfers().items()}}
for name in [n for n in sys.modules if n.startswith("dorafx.lift.transfer")]:
    del sys.modules[name]
lifter._TRANSFER.clear()
package = types.ModuleType("dorafx.lift.transfer")
package.__path__ = [p for p in lifter.__spec__.parent and __import__("dorafx.lift").lift.__path__]
package.__path__ = [package.__path__[0] + "/transfer"]
sys.modules["dorafx.lift.transfer"] = package
names = [m.name for m in __import__("pkgutil").iter_modules(package.__path__)]
assert set({FAMILIES!r}) < set(names)
for name in reversed(sorted(names)):
    importlib.import_module("dorafx.lift.transfer." + name)
found = {{name: [f.__qualname__ for f in fs] for name, fs in lifter.transfers().items()}}
assert found == expected, (found, expected)
"""


def test_the_order_of_imports_decides_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", BACKWARDS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_operator_is_read_in_the_order_of_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifter, "_TRANSFER", {})

    def late(lift: Any, node: Any) -> None:
        return None

    def early(lift: Any, node: Any) -> None:
        return None

    transfer("op", reading=Reading.ROW)(late)
    transfer("op", "other", reading=Reading.STACK)(early)
    assert transfers() == {"op": (early, late), "other": (early,)}
    with pytest.raises(ValueError, match="'op' is read by late as ROW already"):
        transfer("op", reading=Reading.ROW)(early)


def test_operators_that_several_families_know() -> None:
    names = {name: [f.__name__ for f in functions] for name, functions in transfers().items() if len(functions) > 1}
    assert names["view"] == ["view", "taken_apart", "matrix_again", "view", "moved", "row"]
    assert names["sum"] == ["sum_of_squares", "over_the_stack", "sum_of_squares"]
    assert names["expand"] == ["repeated", "expand"]
    assert names["bmm"] == ["bmm", "taken_apart", "bmm", "moved"]
