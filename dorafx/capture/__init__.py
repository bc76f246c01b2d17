"""Capture: make stock PEFT DoRA layers traceable as one graph, without the user changing a line.

A few functions on the way of PEFT's DoRA forward break the graph, so that the product ``B·A`` and the norm that needs it
land in different graphs. Dynamo lets a library give a traceable equal of a function, which Dynamo traces in the
original's place and eager execution never sees. Such an equal is given only where the installed function is one that it
was written for: an unknown version gets none, a warning, and still works.
"""

from __future__ import annotations

from .installer import install, status
from .status import CaptureStatus

__all__ = ["CaptureStatus", "install", "status"]
