"""Capture: make stock PEFT DoRA layers traceable as one graph, without the user changing a line.

PEFT's DoRA forward breaks the graph in a few functions. Dynamo lets a library give a traceable substitute for a function
(``torch.compiler.substitute_in_graph``), which eager execution never sees; for a method there is no such thing, so an
equal one takes its place. A substitute is given only where the installed function is one that it was written for: an
unknown version gets none, a warning, and still works.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from dorafx.errors import DorafxWarning
from dorafx.log import rewrite_log

from .fingerprint import fingerprint
from .polyfills import make_cache_clear, make_dequantize_module_weight, make_transpose

__all__ = ["CaptureStatus", "install", "status"]


@dataclass(frozen=True)
class _Polyfill:
    module: str
    name: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    known: frozenset[str]
    """Fingerprints of the originals that the substitute stands for."""
    method: bool = False
    """Dynamo has no substitutes for methods: an equal method takes the original's place on the class, for eager too."""
    optional: bool = False
    """Absent in versions that do not need it."""


# Fingerprints were taken from PEFT 0.15.2, 0.16.0, 0.17.1, 0.18.1, 0.19.1, 0.20.0 and 0.21.2; in all of them that have
# these functions at all, they are the same.
_POLYFILLS = (
    _Polyfill(
        "peft.utils.integrations",
        "dequantize_module_weight",
        make_dequantize_module_weight,
        frozenset({"c10f2488cf63b414"}),
    ),
    _Polyfill(
        "peft.utils.other",
        "transpose",
        make_transpose,
        # The same body without and with annotations.
        frozenset({"048a020e16aef8c9", "bb233edb97159947"}),
    ),
    _Polyfill(
        "peft.tuners.lora.dora",
        "DoraLinearLayer._cache_clear",
        make_cache_clear,
        frozenset({"f6a0ca6fa44fafd6"}),
        method=True,
        optional=True,
    ),
)


@dataclass
class CaptureStatus:
    """Which substitutes are in place.

    Attributes:
        peft_version: of the PEFT found; empty without PEFT.
        installed: qualified names of the functions that have a substitute.
        skipped: (qualified name, reason) of those that have none.
    """

    peft_version: str = ""
    installed: list[str] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)


_lock = threading.Lock()
_status: CaptureStatus | None = None


def install() -> CaptureStatus:
    """Install the substitutes once; later calls cost a comparison.

    Called when the backend is looked up, which is before Dynamo traces anything for it. PEFT is imported here if it is
    installed: a model may be compiled first and adapted later, and a substitute must be in place before the first trace.

    Returns:
        What is in place.
    """
    global _status
    if _status is not None:
        return _status
    with _lock:
        if _status is None:
            _status = _install()
    return _status


def status() -> CaptureStatus:
    """What :func:`install` did."""
    return install()


def _install() -> CaptureStatus:
    if "peft" not in sys.modules and importlib.util.find_spec("peft") is None:
        return CaptureStatus()
    try:
        import peft
    except Exception as error:  # a broken installation of somebody else's package is not ours to report by crashing
        return CaptureStatus(skipped=[("peft", f"import failed: {type(error).__name__}: {error}")])
    found = CaptureStatus(peft_version=str(peft.__version__))
    for polyfill in _POLYFILLS:
        qualified = f"{polyfill.module}.{polyfill.name}"
        reason = _install_one(polyfill)
        if reason is None:
            found.installed.append(qualified)
        elif reason:
            found.skipped.append((qualified, reason))
    log = rewrite_log()
    for name in found.installed:
        log.add_note(f"polyfill installed: {name} (PEFT {found.peft_version})")
    for name, reason in found.skipped:
        log.add_note(f"polyfill not installed: {name} (PEFT {found.peft_version}): {reason}")
        warnings.warn(
            f"dorafx has no polyfill for {name} of PEFT {found.peft_version} ({reason}); DoRA layers still work, "
            "but may break the graph and then are not rewritten",
            DorafxWarning,
            stacklevel=4,
        )
    return found


def _install_one(polyfill: _Polyfill) -> str | None:
    """None if installed, "" if not needed, else the reason why not."""
    try:
        target: Any = importlib.import_module(polyfill.module)
    except ImportError as error:
        return f"{polyfill.module} cannot be imported: {error}"
    owner: Any = None
    for part in polyfill.name.split("."):
        owner, target = target, getattr(target, part, None)
    if target is None:
        return "" if polyfill.optional else "the function is not there"
    if fingerprint(target) not in polyfill.known:
        return "the function differs from the versions that the polyfill was written for"
    if polyfill.method:
        setattr(owner, target.__name__, polyfill.make(target))
        return None
    try:
        torch.compiler.substitute_in_graph(target, skip_signature_check=True)(polyfill.make(target))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
