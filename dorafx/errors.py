"""Exceptions and warnings."""

from __future__ import annotations


class DorafxError(RuntimeError):
    """dorafx cannot do what was requested."""


class DorafxWarning(UserWarning):
    """dorafx fell back to something slower but correct."""


class RewriteMissError(DorafxError):
    """``dorafx.strict`` is set and a candidate was not rewritten."""
