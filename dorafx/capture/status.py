"""Which polyfills are installed."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CaptureStatus:
    """Which functions of PEFT and bitsandbytes have a polyfill.

    Attributes:
        peft_version: of the imported PEFT; empty while none is imported.
        installed: qualified names of the functions that have a polyfill.
        skipped: (qualified name, reason) of the functions whose polyfill could not be installed.
    """

    peft_version: str = ""
    installed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
