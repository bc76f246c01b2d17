"""Does dorafx recognise DoRA on this torch? Releases of torch change what graphs look like, which a version number does not show.

A small layer, written as in PEFT, goes through Dynamo, lift, match, plan and rewrite. On a torch that is newer than all tested
versions this is done once, at the first graph, so that a failure is reported to the user.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dorafx.errors import DorafxWarning
from dorafx.log import RewriteLog, rewrite_log
from dorafx.options import Options
from dorafx.pipeline import rewrite_graph
from dorafx.versions import VERSIONS, untested

_TOKENS, _D_OUT, _D_IN, _RANK, _SCALE = 3, 4, 5, 2, 2.0
_lock = threading.Lock()
_announced = False


@dataclass(frozen=True)
class SelfCheck:
    """The result for the test layer.

    Attributes:
        passed: whether it was captured as one graph, rewritten whole, and gives the same numbers.
        reason: what went wrong; empty if nothing did.
    """

    passed: bool
    reason: str = ""


def layer(x: torch.Tensor, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    """``m/‖W + s·BA‖ ⊙ (xWᵀ + s·xAᵀBᵀ)`` in the steps of PEFT's linear layer: the delta by way of an identity matrix, its transpose
    by ``.T``, a detached norm, and ``(g - 1)·xWᵀ + g·s·xAᵀBᵀ`` added to the base layer's output."""
    linear = torch.nn.functional.linear
    delta = linear(linear(torch.eye(A.shape[1], dtype=A.dtype), A), B).T
    norm = torch.linalg.norm(W + _SCALE * delta, dim=1).to(W.dtype).detach()
    g = (m / norm).view(1, -1)
    base = linear(x, W)
    y: torch.Tensor = base + (g - 1) * base + g * linear(linear(x, A), B) * _SCALE
    return y


def check_recognition() -> SelfCheck:
    """Capture and rewrite the layer with small tensors, and compare results. The process's log is not changed."""
    log = RewriteLog()
    graphs: list[fx.GraphModule] = []

    def backend(gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        graphs.append(gm)
        return rewrite_graph(gm, Options(), log=log).graph

    def function(*operands: torch.Tensor) -> torch.Tensor:
        return layer(*operands)

    shapes = ((_TOKENS, _D_IN), (_D_OUT, _D_IN), (_RANK, _D_IN), (_D_OUT, _RANK), (_D_OUT,))
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        operands = [_numbers(i, shape) for i, shape in enumerate(shapes)]
        try:
            compiled: Any = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
            result, expected = compiled(*operands), layer(*operands)
        except Exception as error:
            return SelfCheck(False, f"it fails: {type(error).__name__}: {next(iter(str(error).splitlines()), '')}")
    if not graphs:
        return SelfCheck(True)  # compilation is switched off: there is nothing to recognise
    if [(r.pattern, r.status) for r in log.records] != [("linear", "rewritten")]:
        reasons = [r.reason for r in log.records if r.reason] or ["it is passed over"]
        return SelfCheck(False, reasons[0])
    difference = float((result - expected).detach().abs().max() / expected.detach().abs().max())
    return SelfCheck(difference < 1e-12, "" if difference < 1e-12 else f"its result is off by {difference:.1e}")


def announce_untested_versions() -> None:
    """At the first graph of a process: if a package is newer than all tested versions, write a note to the log and warn once, saying
    whether DoRA is still recognised. Never raises; later calls cost a comparison."""
    global _announced
    if _announced:
        return
    with _lock:
        if _announced:
            return
        _announced = True
    newer = untested()
    if not newer:
        return
    names = " and ".join(
        f"{name} {version.partition('+')[0]} ({VERSIONS[name].range})" for name, version in newer.items()
    )
    check = check_recognition() if "torch" in newer else None
    message = f"newer than what dorafx was tested with (in brackets): {names}"
    if check is None:
        message += "; run `dorafx.verify` on your model to be sure of it"
    elif check.passed:
        message += "; a test layer is rewritten as it should be; run `dorafx.verify` on your model to be sure of it"
    else:
        message += (
            f"; a test layer is not rewritten ({check.reason}), so yours may be left as they are; install "
            f"torch {VERSIONS['torch'].tested[-1]} or a newer dorafx"
        )
    rewrite_log().add_note(message)
    warnings.warn(message, DorafxWarning, stacklevel=3)


def _numbers(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Numbers between 1 and 2, made without a random generator."""
    count = torch.Size(shape).numel()
    values = 1.5 + 0.5 * torch.arange(1 + seed, 1 + seed + count, dtype=torch.float64, device="cpu").cos()
    return values.view(shape).requires_grad_(len(shape) == 1 or _RANK in shape)
