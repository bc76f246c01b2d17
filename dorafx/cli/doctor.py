"""``dorafx doctor``: is this installation one that dorafx supports, and do its operators compute what they should?"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from dorafx import capture
from dorafx._compat.inductor import has_cpp_compiler
from dorafx.bench.environment import describe_environment
from dorafx.self_check import check_recognition
from dorafx.versions import OPTIONAL, VERSIONS

from .self_tests import SELF_TESTS, run_self_test


def _issues() -> str:
    """Where this package's metadata says that issues are reported."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for entry in importlib.metadata.metadata("dorafx").get_all("Project-URL") or ():
            label, _, address = entry.partition(", ")
            if label == "Issues":
                return str(address)
    return "where you have dorafx from"


HOW_TO_REPORT = (
    "To report a layer that is wrong, missed or slow, add a script that rebuilds its graph: lines of your code, no values of your tensors. "
    'Write it with dorafx.rewrite_log().save_repro(record, "repro.py"), or DORAFX_REPRO=FOLDER python YOUR_PROGRAM.py for the scripts of all graphs. '
    f"Paste the block above into an issue and attach the script: {_issues()}. examples/guide/reporting.md has the rest."
)

_VARIABLES = re.compile(
    r"(DORAFX|TORCH|TORCHINDUCTOR|TORCHDYNAMO|TRITON|PYTORCH|CUDA_VISIBLE|OMP|MKL)_\w+|CUDA_HOME|CXX"
)


@dataclass(frozen=True)
class Check:
    """One line of the doctor's report.

    Attributes:
        group: ``"environment"``, ``"versions"``, ``"recognition"``, ``"polyfills"`` or ``"operators"``.
        name: what was checked.
        passed: whether it is as it should be.
        detail: the result.
    """

    group: str
    name: str
    passed: bool
    detail: str

    @property
    def mark(self) -> str:
        return "ok" if self.passed else "FAIL"


def examine() -> list[Check]:
    """All checks, in the order of the report."""
    return [*_environment(), *map(_version, VERSIONS), _recognition(), *_polyfills(), *_operators()]


def bug_report(checks: Iterable[Check]) -> str:
    """A block of Markdown for a bug report, which names no file and no person."""
    checks = list(checks)
    lines = [f"{c.name}: {c.detail}" for c in checks if c.group in ("environment", "versions")]
    for group in ("recognition", "polyfills", "operators"):
        failed = [c for c in checks if c.group == group and not c.passed]
        total = sum(c.group == group for c in checks)
        lines.append(f"{group}: {total - len(failed)} of {total} hold")
        lines += [f"  FAIL {c.name}: {c.detail}" for c in failed]
    return "\n".join(["```text", *lines, "```"])


def _environment() -> list[Check]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    environment = describe_environment(device, 0)
    facts = {
        "dorafx": " ".join(p for p in (environment["dorafx"], environment["commit"]) if p),
        "python": f"{environment['python']} on {environment['system']}",
        "processor": f"{environment['processor']}, {environment['cores']} cores, {environment['threads']} threads",
    }
    if device == "cuda":
        major, minor = torch.cuda.get_device_capability()
        facts["GPU"] = f"{environment['device']}, compute capability {major}.{minor}, CUDA {environment['cuda']}"
    else:
        facts["GPU"] = "none that torch can use"
    facts["C++ compiler"] = "found" if has_cpp_compiler() else "none: graphs on a CPU run eagerly"
    facts["variables"] = ", ".join(sorted(name for name in os.environ if _VARIABLES.fullmatch(name))) or "none set"
    return [Check("environment", name, True, detail) for name, detail in facts.items()]


def _version(name: str) -> Check:
    versions = VERSIONS[name]
    try:
        installed = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        optional = name in OPTIONAL
        return Check("versions", name, optional, "not installed (optional)" if optional else "not installed")
    if versions.is_too_old(installed):
        return Check("versions", name, False, f"{installed} is not supported ({versions.minimum} or newer is)")
    tested = f"tests ran with {versions.range}"
    return Check(
        "versions",
        name,
        True,
        f"{installed}, newer than {tested}" if versions.is_untested(installed) else f"{installed}, {tested}",
    )


def _recognition() -> Check:
    """A small layer in PEFT's own spelling, through capture and rewrite."""
    check = check_recognition()
    return Check("recognition", "a layer in PEFT's spelling", check.passed, check.reason or "rewritten whole")


def _polyfills() -> list[Check]:
    status = capture.status()
    checks = [Check("polyfills", name, True, f"holds for PEFT {status.peft_version}") for name in status.installed]
    return checks + [Check("polyfills", name, False, reason) for name, reason in status.skipped]


def _operators() -> list[Check]:
    """Every operator on every device in every dtype, and one graph through the backend."""
    checks = []
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        checks.append(_guarded("backend", device, torch.float32))
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            checks += [_guarded(name, device, dtype) for name in SELF_TESTS if name != "backend"]
    return checks


def _guarded(name: str, device: str, dtype: torch.dtype) -> Check:
    """The result of a self-test; an operator that raises is a failed check, not a failure of the command."""
    label = f"{name} {device} {str(dtype).removeprefix('torch.')}"
    try:
        passed, detail = run_self_test(name, device, dtype)
    except Exception as error:
        message = next(iter(str(error).splitlines()), "")
        return Check("operators", label, False, f"{type(error).__name__}: {message}")
    return Check("operators", label, passed, detail)
