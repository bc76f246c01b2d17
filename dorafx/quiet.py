"""Importing other packages for a command: what they say about themselves is not what was asked for."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from dorafx.errors import DorafxWarning


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Warnings and log messages of others do not show (PEFT imports torchao and bitsandbytes, which tell of libraries for GPUs that
    they do not find); dorafx's own do, and so do errors."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=DorafxWarning)
            yield
    finally:
        logging.disable(before)
