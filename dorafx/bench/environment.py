"""Where a measurement was made: hardware, versions, and the commit of dorafx if it is a git checkout."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import dorafx

_PACKAGES = ("torch", "triton", "peft", "transformers", "numpy")


def describe_environment(device: str, threads: int) -> dict[str, Any]:
    """Plain data; what is not available is an empty string.

    Args:
        device: the measured one.
        threads: of each process; 0 stands for torch's own choice.
    """
    cuda = torch.device(device).type == "cuda"
    return {
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(device) if cuda else _processor(),
        "cuda": torch.version.cuda or "",
        "driver": _driver() if cuda else "",
        "processor": _processor(),
        "cores": os.cpu_count() or 0,
        "threads": threads or torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "dorafx": dorafx.__version__,
        "commit": _commit(Path(dorafx.__file__).parent),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _driver() -> str:
    """Driver, highest clock and power limit of the GPUs, from ``nvidia-smi``."""
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    return (_output(query) or "").replace("\n", "; ")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _commit(package: Path) -> str:
    """The commit that is checked out, with ``+changes`` if files of the package differ from it."""
    # A package that is installed inside another repository is in its folder but not in its index.
    if _git(package, "ls-files", "--error-unmatch", "__init__.py") is None:
        return ""
    commit = _git(package, "rev-parse", "HEAD") or ""
    return f"{commit}+changes" if _git(package, "status", "--porcelain", "--", str(package)) else commit


def _git(folder: Path, *arguments: str) -> str | None:
    """The output of a git command; None if it fails or git is not installed."""
    return _output(["git", "-C", str(folder), *arguments])


def _output(command: list[str]) -> str | None:
    """The output of a command; None if it fails or does not exist."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
