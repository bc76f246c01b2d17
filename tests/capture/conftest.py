"""The polyfills are in place, as they are when a backend was looked up; assertions of the support module explain themselves."""

from __future__ import annotations

import pytest

from dorafx import capture

pytest.register_assert_rewrite("capture_support")


@pytest.fixture(autouse=True, scope="session")
def _installed() -> None:
    capture.status()
