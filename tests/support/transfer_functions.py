"""Put something around the transfer functions of an operator."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dorafx.lift import lifter
from dorafx.lift.lifter import Transfer

__all__ = ["wrap"]


def wrap(patch: pytest.MonkeyPatch, name: str, around: Callable[[Transfer], Transfer]) -> None:
    """Replace each of an operator's transfer functions by ``around`` it."""
    known = lifter._TRANSFER[name]
    patch.setitem(lifter._TRANSFER, name, {reading: around(function) for reading, function in known.items()})
