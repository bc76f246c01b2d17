"""One configuration in a process of its own: plain data in, raw samples out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dorafx import _compat

from .ceilings import measure_ceilings
from .clock import Clock
from .implementations import Task
from .plan import DTYPES, Case, Settings

__all__ = ["CEILINGS", "configuration", "request_for"]

CEILINGS = "ceilings"
"""The name of the configuration that measures the device instead of an implementation."""

# Several shapes in several phases are more than the 8 variants that Dynamo compiles of one code object. Stock PEFT's
# layers share one and would run eagerly from the ninth on: a handicap that is the measurement's, not the model's.
RECOMPILATIONS = 64


def request_for(settings: Settings, name: str, case: Case | None) -> dict[str, Any]:
    """What :func:`configuration` needs to know."""
    own = ("dtype", "device", "seconds", "threads", "mode", "codegen", "checkpointing", "micro_batches")
    request = {key: getattr(settings, key) for key in own}
    suite, parameters = (case.suite, case.parameters) if case is not None else (CEILINGS, {})
    return {**request, "name": name, "suite": suite, "parameters": parameters}


def configuration(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """Measure one configuration: ``{metric: [unit, samples]}``."""
    from .suites import MEASURES

    if request["threads"]:
        torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    _compat.allow_recompilations(RECOMPILATIONS)
    if torch.device(request["device"]).type == "cuda":
        torch.cuda.set_device(torch.device(request["device"]).index or 0)
    clock = Clock(request["device"], request["seconds"])
    dtype = DTYPES[request["dtype"]]
    if request["suite"] == CEILINGS:
        return {key: list(value) for key, value in measure_ceilings(clock, dtype).items()}
    settings = {key: request[key] for key in ("mode", "codegen", "checkpointing", "micro_batches")}
    task = Task(request["name"], request["parameters"], clock, dtype, **settings)
    return {key: list(value) for key, value in MEASURES[request["suite"]](task).items()}
