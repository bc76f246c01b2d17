"""Exceptions and warnings."""

from __future__ import annotations


class DorafxError(RuntimeError):
    """dorafx was asked for something that it cannot do."""


class DorafxWarning(UserWarning):
    """dorafx fell back to something slower but right."""


class RewriteMissError(DorafxError):
    """``dorafx.strict`` is set and a candidate was not rewritten."""
