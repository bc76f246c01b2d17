"""What is in place."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CaptureStatus:
    """Which functions of PEFT have a polyfill.

    Attributes:
        peft_version: of the PEFT that was imported; empty while none is.
        installed: qualified names of the functions that have one.
        skipped: (qualified name, reason) of those that should have one and have none.
    """

    peft_version: str = ""
    installed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
