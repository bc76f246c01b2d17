"""Capture: make stock PEFT DoRA layers traceable as one graph, without the user changing a line.

A few functions that PEFT's DoRA forward calls break the graph, so that the product ``B·A`` and the norm that needs it end up in
different graphs. A library can register a traceable equivalent of a function with Dynamo (a polyfill), which is traced in place
of the original and never used in eager execution. A polyfill is registered only for the function versions that it was written
for; an unknown version causes a warning, and works without it.
"""

from __future__ import annotations

from .installer import install, status
from .outside import explained, named_in_model, serve, serve_compiled
from .status import CaptureStatus

__all__ = ["CaptureStatus", "explained", "install", "named_in_model", "serve", "serve_compiled", "status"]
