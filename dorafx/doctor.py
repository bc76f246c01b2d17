"""``dorafx doctor``: is this installation one that dorafx supports, and do its operators compute what they should?"""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dorafx import _compat, capture
from dorafx.ops import reference

__all__ = ["Check", "examine"]

# First version supported, and the first that is not known to work ("" for open).
SUPPORTED = {"torch": ("2.11", "2.14"), "peft": ("0.15", "0.22"), "transformers": ("4.57", ""), "triton": ("3.6", "")}
_OPTIONAL = ("peft", "transformers", "triton")


@dataclass(frozen=True)
class Check:
    """One line of the doctor's answer."""

    name: str
    passed: bool
    detail: str
    optional: bool = False

    @property
    def mark(self) -> str:
        return "ok" if self.passed else "FAIL"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Check]:
    """All checks, in the order to read them."""
    checks = [Check("python", True, f"{platform.python_version()} on {platform.platform()}")]
    checks += [_version(name) for name in SUPPORTED]
    compiler = _compat.has_cpp_compiler()
    checks.append(Check("C++ compiler", True, "found" if compiler else "none: graphs on a CPU run eagerly"))
    status = capture.status()
    for name in status.installed:
        checks.append(Check("polyfill", True, name))
    for name, reason in status.skipped:
        checks.append(Check("polyfill", False, f"{name}: {reason}"))
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            for operator in (_row_norm, _compose, _compose_delta):
                checks.append(_guarded(operator, device, dtype))
    return checks


def _parts(version: str) -> tuple[int, ...]:
    # "2.12rc1" counts as 2.12.
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    return (int(found[1]), int(found[2] or 0)) if found else (0, 0)


def _version(name: str) -> Check:
    first, beyond = SUPPORTED[name]
    wanted = f"{first} or newer" + (f", below {beyond}" if beyond else "")
    try:
        found = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Check(name, name in _OPTIONAL, "not installed (optional)" if name in _OPTIONAL else "not installed")
    supported = _parts(found) >= _parts(first) and (not beyond or _parts(found) < _parts(beyond))
    return Check(name, supported, found if supported else f"{found}; supported: {wanted}")


def _guarded(check: Callable[[str, torch.dtype], Check], device: str, dtype: torch.dtype) -> Check:
    """The check's answer; an operator that cannot even run is the doctor's finding, not the doctor's failure."""
    try:
        return check(device, dtype)
    except Exception as error:
        name = check.__name__.lstrip("_")
        message = next(iter(str(error).splitlines()), "")
        return Check(f"{name} {device} {_short(dtype)}", False, f"{type(error).__name__}: {message}")


def _tolerance(dtype: torch.dtype) -> float:
    return 4 * torch.finfo(dtype).eps


def _row_norm(device: str, dtype: torch.dtype) -> Check:
    generator = torch.Generator().manual_seed(0)
    weight, left, right = (torch.randn(*s, generator=generator).to(dtype) for s in ((96, 160), (96, 8), (8, 160)))
    exact = reference.row_norm(weight.double(), left.double(), right.double(), 1.5)
    got = torch.ops.dorafx.row_norm(weight.to(device), left.to(device), right.to(device), 1.5)
    error = float(((got.cpu().double() - exact) / exact).abs().max())
    # Inputs are exact, the accumulation is fp32 whatever the dtype.
    return Check(f"row_norm {device} {_short(dtype)}", error < 1e-5, f"relative error {error:.1e}")


def _compose(device: str, dtype: torch.dtype) -> Check:
    generator = torch.Generator().manual_seed(0)
    base, lora = (torch.randn(33, 96, generator=generator).to(dtype) for _ in range(2))
    g = torch.rand(96, generator=generator) + 0.5
    exact = reference.compose(base.double(), lora.double(), g.double(), None, 1.5)
    got = torch.ops.dorafx.compose(base.to(device), lora.to(device), g.to(device), None, 1.5, dtype)
    error = float((got.cpu().double() - exact).abs().max() / exact.abs().max())
    return Check(f"compose {device} {_short(dtype)}", error < _tolerance(dtype), f"relative error {error:.1e}")


def _compose_delta(device: str, dtype: torch.dtype) -> Check:
    generator = torch.Generator().manual_seed(0)
    result, base, lora = (torch.randn(33, 96, generator=generator).to(dtype) for _ in range(3))
    g = torch.rand(96, generator=generator) + 0.5
    exact = reference.compose_delta(result.double(), base.double(), lora.double(), g.double(), 1.5)
    tensors = (t.to(device) for t in (result, base, lora, g))
    got = torch.ops.dorafx.compose_delta(*tensors, 1.5, dtype)
    error = float((got.cpu().double() - exact).abs().max() / exact.abs().max())
    return Check(f"compose_delta {device} {_short(dtype)}", error < _tolerance(dtype), f"relative error {error:.1e}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
