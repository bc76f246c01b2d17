"""One configuration in a process of its own: plain data in, raw samples out."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch

from dorafx import _compat
from dorafx.errors import DorafxError
from dorafx.log import rewrite_log

from .ceilings import measure_ceilings
from .clock import Clock
from .implementations import COMPILED, Task
from .plan import DTYPES, SUITES, Case, Settings

__all__ = ["CEILINGS", "configuration", "request_for"]

CEILINGS = "ceilings"
"""The name of the configuration that measures the device instead of an implementation."""

# Several shapes in several phases are more than the 8 variants that Dynamo compiles of one code object. Stock PEFT's
# layers share one and would run eagerly from the ninth on: a handicap that is the measurement's, not the model's.
RECOMPILATIONS = 64


def request_for(settings: Settings, name: str, case: Case | None) -> dict[str, Any]:
    """What :func:`configuration` needs to know."""
    own = (
        "dtype",
        "device",
        "seconds",
        "threads",
        "mode",
        "codegen",
        "compose",
        "scope",
        "checkpointing",
        "micro_batches",
    )
    request = {key: getattr(settings, key) for key in own}
    suite, parameters = (case.suite, case.parameters) if case is not None else (CEILINGS, {})
    return {**request, "name": name, "suite": suite, "parameters": parameters}


def configuration(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """Measure one configuration.

    Returns:
        ``figures``, ``{metric: [unit, samples]}``, and ``facts``: of what is compiled its graphs and graph breaks, of
        dorafx also how many modules it rewrote.

    Raises:
        DorafxError: dorafx left a DoRA layer as it was, or mended an anchor's, so that the figures would be another
            implementation's.
    """
    mended = "dorafx.backend" in sys.modules  # before anything of a suite is imported
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
        return {"figures": {key: list(value) for key, value in measure_ceilings(clock, dtype).items()}, "facts": {}}
    settings = {key: request[key] for key in ("mode", "codegen", "compose", "scope", "checkpointing", "micro_batches")}
    task = Task(request["name"], request["parameters"], clock, dtype, **settings)
    rewrite_log().clear()
    before = _compat.graph_statistics()
    figures = {key: list(value) for key, value in MEASURES[request["suite"]](task).items()}
    graphs, breaks = (now - then for now, then in zip(_compat.graph_statistics(), before))
    if task.name != "dorafx" and not mended and "dorafx.backend" in sys.modules:
        # Importing the backend makes PEFT's layers traceable as one graph. No anchor may profit from that.
        raise DorafxError(f"bench {request['suite']}: dorafx's polyfills were installed while {task.name} was measured")
    facts = {"graphs": graphs, "graph breaks": breaks} if task.name in COMPILED else {}
    if task.name == "dorafx" and SUITES[request["suite"]].needs_peft:  # the others call the operators
        facts["rewritten"] = _rewritten()
    return {"figures": figures, "facts": facts}


def _rewritten() -> int:
    log = rewrite_log()
    if log.misses or not log.rewrites:
        why = log.misses[0].reason if log.misses else "no DoRA layer was found"
        raise DorafxError(f"dorafx did not rewrite everything: {why}")
    return len({record.site for record in log.rewrites})
