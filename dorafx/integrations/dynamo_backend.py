"""``torch_compile_backend="dorafx"``: the name, made known to accelerate.

accelerate looks names of backends up in an enumeration of its own, not in torch's registry of backends, so that a backend which is
installed with an entry point is refused there. An enumeration calls its class method ``_missing_`` for a value that is none of its
members (documented by Python's ``enum``), and only then. This adds one where accelerate has none: nothing that works is changed, and
every other unknown name is refused as before.
"""

from __future__ import annotations

import enum
import sys
from typing import Any

from dorafx.capture.late import after_import

_MODULE = "accelerate.utils.dataclasses"
_VALUE = "DORAFX"  # accelerate compares in capitals, and hands the name in small letters to torch.compile


def make_known_to_accelerate() -> None:
    """Make ``DynamoBackend("DORAFX")`` a backend of accelerate: now if accelerate is imported already, else right after its import."""
    if _MODULE in sys.modules:
        _extend()
    else:
        after_import(_MODULE, _extend)


def _extend() -> None:
    # Also called in the middle of accelerate's import, where an error would reach the user's own import.
    backends: Any = getattr(sys.modules.get(_MODULE), "DynamoBackend", None)
    members: Any = getattr(backends, "__members__", None)
    is_enumeration = isinstance(backends, enum.EnumMeta)
    if not (is_enumeration and members and all(isinstance(member, str) for member in members.values())):
        return  # another accelerate: it refuses the name, or knows it by other means
    if _VALUE in members or "_missing_" in vars(backends):
        return
    member: Any = str.__new__(backends, _VALUE)
    member._name_ = member._value_ = _VALUE

    def missing(kind: Any, value: object) -> Any:
        return member if value == _VALUE else None

    backends._missing_ = classmethod(missing)
