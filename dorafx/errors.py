"""Exceptions and warnings."""

from __future__ import annotations

import traceback


class DorafxError(RuntimeError):
    """dorafx cannot do what was requested."""


class DorafxWarning(UserWarning):
    """dorafx fell back to something slower but correct."""


class RewriteMissError(DorafxError):
    """``dorafx.strict`` is set and a candidate was not rewritten."""


def in_a_line(error: Exception) -> tuple[str, str]:
    """The kind and message of an error, without further lines, and ``file:line`` of where it was raised."""
    message = traceback.format_exception_only(type(error), error)[-1].strip().partition("\n")[0]
    where = traceback.extract_tb(error.__traceback__)[-1]
    return message, f"{where.filename.rsplit('/', 1)[-1]}:{where.lineno}"
