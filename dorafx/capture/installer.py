"""Installing the polyfills: when, and for which PEFT."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import threading
import types
import warnings
from typing import Any

import torch

from dorafx._compat.dynamo import trace_instead, watch_native_calls
from dorafx.errors import DorafxWarning

from .fingerprint import fingerprint
from .late import after_import
from .outside import note_outside, note_skipped
from .polyfills import OF_BITSANDBYTES, POLYFILLS, Polyfill
from .status import CaptureStatus

_lock = threading.Lock()
_status: CaptureStatus | None = None


def install() -> CaptureStatus:
    """Install the polyfills for the PEFT of this process; later calls cost a comparison.

    Called when the backend is looked up, which is before Dynamo traces anything for it. If PEFT is imported already, as it is when
    it made the user's model, its polyfills are installed here. Otherwise PEFT is not imported, which takes seconds that a model
    without PEFT should not pay: the polyfills are installed at the end of PEFT's own import. The next call of the backend would be
    too late, because Dynamo has traced, and broken, the graph by then.

    Returns:
        The installed polyfills; empty while PEFT is not imported.
    """
    global _status
    if _status is not None:
        return _status
    if sys.modules.get("peft") is None:
        after_import("peft", _install_after_import)
        return CaptureStatus()
    # Before the lock is taken: another thread may be importing PEFT, whose import calls this function at its end.
    peft = importlib.import_module("peft")
    with _lock:
        if _status is None:
            _status = _install(peft)
            _report(_status)
    return _status


def status() -> CaptureStatus:
    """The polyfills for the installed PEFT, which is imported to find out."""
    try:
        if importlib.util.find_spec("peft") is not None:
            importlib.import_module("peft")
    except Exception as error:  # a broken installation of another package is reported, and does not raise here
        return CaptureStatus(skipped=[("peft", f"import failed: {type(error).__name__}: {error}")])
    return install()


def _install_after_import() -> None:
    try:
        install()
    except Exception as error:  # the user's import of PEFT must succeed
        warnings.warn(f"dorafx could not install its polyfills: {error}", DorafxWarning, stacklevel=2)


def _install(peft: types.ModuleType) -> CaptureStatus:
    status = CaptureStatus(peft_version=str(getattr(peft, "__version__", "unknown")))
    _install_all(POLYFILLS, status)
    layers = getattr(sys.modules.get("peft.tuners.lora.dora"), "DoraLinearLayer", None)  # the class of all others
    if isinstance(layers, type) and issubclass(layers, torch.nn.Module):
        watch_native_calls(layers, note_outside, note_skipped)
    if sys.modules.get("bitsandbytes") is None:
        after_import("bitsandbytes", _install_for_bitsandbytes)
    else:
        _install_all(OF_BITSANDBYTES, status)
    return status


def _install_for_bitsandbytes() -> None:
    """At the end of an import of bitsandbytes that comes after PEFT's."""
    found = CaptureStatus()
    try:
        with _lock:
            _install_all(OF_BITSANDBYTES, found)
            if _status is not None:
                _status.installed += found.installed
                _status.skipped += found.skipped
        _report(found)
    except Exception as error:  # the user's import must succeed
        warnings.warn(f"dorafx could not install its polyfills: {error}", DorafxWarning, stacklevel=2)


def _install_all(polyfills: tuple[Polyfill, ...], status: CaptureStatus) -> None:
    for polyfill in polyfills:
        reason = _install_one(polyfill)
        if reason is None:
            status.installed.append(polyfill.qualified)
        elif reason and not polyfill.only_faster:
            status.skipped.append((polyfill.qualified, reason))


def _install_one(polyfill: Polyfill) -> str | None:
    """None if installed, "" if not needed, else the reason why it is not installed."""
    try:
        target: Any = importlib.import_module(polyfill.module)
    except Exception as error:
        return f"{polyfill.module} cannot be imported: {error}"
    if polyfill.needed_for and not hasattr(target, polyfill.needed_for):
        return ""
    for part in polyfill.name.split("."):
        target = getattr(target, part, None)
    if target is None:
        return "" if polyfill.optional else "the function is not there"
    print_ = fingerprint(target)
    if not print_:
        return "the function's source cannot be had, or it wraps another function"
    if print_ not in polyfill.known:
        return "the function differs from those that the polyfill was written for"
    substitute = polyfill.make(target)
    if polyfill.method:
        # Dynamo looks substitutes up for function values, which bound methods are not.
        return None if trace_instead(target, substitute) else "this version of torch traces methods otherwise"
    try:
        torch.compiler.substitute_in_graph(target)(substitute)
    except Exception as error:  # another library may have substituted it already
        return f"{type(error).__name__}: {error}"
    return None


def _report(status: CaptureStatus) -> None:
    from dorafx.log import rewrite_log

    log = rewrite_log()
    for name in status.installed:
        log.add_note(f"polyfill installed: {name} ({_package(name, status)})")
    for name, reason in status.skipped:
        log.add_note(f"polyfill not installed: {name} ({_package(name, status)}): {reason}")
    of_peft = [entry for entry in status.skipped if not _of_bitsandbytes(entry[0])]
    if of_peft:
        functions = "; ".join(f"{name}: {reason}" for name, reason in of_peft)
        warnings.warn(
            f"dorafx has no polyfill for these functions of PEFT {status.peft_version}: {functions}. DoRA layers work "
            "as ever, but may break the graph, and are not rewritten where they do.",
            DorafxWarning,
            stacklevel=3,
        )
    for name, reason in status.skipped:
        if _of_bitsandbytes(name):
            warnings.warn(
                f"dorafx has no polyfill for {name} ({_package(name, status)}): {reason}. On a CPU with AVX512-BF16 this "
                "function changes a weight's layout in the first evaluation, and a compiled first call may fail there: call "
                "the model once in evaluation before it is compiled.",
                DorafxWarning,
                stacklevel=3,
            )


def _of_bitsandbytes(name: str) -> bool:
    return name.startswith("bitsandbytes.")


def _package(name: str, status: CaptureStatus) -> str:
    if not _of_bitsandbytes(name):
        return f"PEFT {status.peft_version}"
    return f"bitsandbytes {getattr(sys.modules.get('bitsandbytes'), '__version__', 'unknown')}"
