"""The check of an adapter and its base before anything runs: :func:`dorafx.check` of a model, ``dorafx check`` of files."""

from .files import check_files
from .findings import CheckReport, Finding
from .live import check

__all__ = ["CheckReport", "Finding", "check", "check_files"]
