"""Assertions in the support module explain themselves as those in tests do."""

import pytest

pytest.register_assert_rewrite("integration_support")
