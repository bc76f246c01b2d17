"""The memory of a process."""

from __future__ import annotations

import sys
from pathlib import Path


def peak_resident_bytes() -> int | None:
    """Peak resident memory of this process in bytes; None if the system does not provide it.

    On Linux ``ru_maxrss`` is not usable: it survives ``exec``, so a child starts with its parent's peak.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * unit
