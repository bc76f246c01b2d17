"""How often norms were computed, reused and invalidated."""

from __future__ import annotations

import threading
from collections import Counter
from typing import Any


class NormCounters:
    """Counts of the norm prologues of a process. Thread-safe.

    Attributes:
        computed: norms computed.
        reused: norms taken from the store instead.
        compared: norms left to a device, which compares the contents and computes those that changed. The host does not learn which.
        invalidated: norms that were removed from the store, by reason.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.clear()

    def clear(self) -> None:
        with self._lock:
            self.computed = self.reused = self.compared = 0
            self.invalidated: Counter[str] = Counter()

    def count(self, computed: int = 0, reused: int = 0, compared: int = 0) -> None:
        with self._lock:
            self.computed += computed
            self.reused += reused
            self.compared += compared

    def count_invalidated(self, reason: str, number: int = 1) -> None:
        with self._lock:
            self.invalidated[reason] += number

    def to_dict(self) -> dict[str, Any]:
        """``{"computed": int, "reused": int, "compared": int, "invalidated": {reason: int}}``."""
        with self._lock:
            counts = {"computed": self.computed, "reused": self.reused, "compared": self.compared}
            return {**counts, "invalidated": dict(self.invalidated)}

    @staticmethod
    def from_dict(values: Any) -> NormCounters:
        """The counts of a dictionary as :meth:`to_dict` makes it.

        Raises:
            ValueError: anything else.
        """
        counters = NormCounters()
        reasons = values.get("invalidated", {}) if isinstance(values, dict) else None
        if not isinstance(reasons, dict):
            raise ValueError("dorafx log: 'norms' must be an object with computed, reused, compared and invalidated")
        numbers = [*(values.get(name, 0) for name in ("computed", "reused", "compared")), *reasons.values()]
        if any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError("dorafx log: the counts in 'norms' must be whole numbers from 0")
        counters.count(*numbers[:3])
        for reason, number in reasons.items():
            counters.count_invalidated(str(reason), number)
        return counters

    def __str__(self) -> str:
        counts = self.to_dict()
        text = f"norms: {counts['computed']} computed, {counts['reused']} reused"
        if counts["compared"]:
            text += f", {counts['compared']} left to the device, which computes them if they changed"
        reasons = ", ".join(f"{n} because {why}" for why, n in sorted(counts["invalidated"].items()))
        return f"{text}; kept ones thrown away: {reasons}" if reasons else text
