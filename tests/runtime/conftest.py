"""Every test starts with an empty norm store."""

from __future__ import annotations

import pytest

from dorafx.runtime import norm_store


@pytest.fixture(autouse=True)
def _empty_store() -> None:
    norm_store().clear()
