"""Importing other packages for a command, without their messages."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

from dorafx.errors import DorafxWarning


@contextlib.contextmanager
def quiet_imports() -> Iterator[None]:
    """Hide warnings and log messages of other packages (PEFT imports torchao and bitsandbytes, which report missing GPU libraries).
    dorafx's own warnings are shown, and so are errors."""
    before = logging.root.manager.disable
    logging.disable(max(before, logging.WARNING))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("default", category=DorafxWarning)
            yield
    finally:
        logging.disable(before)
