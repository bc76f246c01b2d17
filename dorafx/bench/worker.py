"""One configuration in a process of its own: plain data in, raw samples out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from dorafx._compat.dynamo import allow_recompilations, graph_statistics
from dorafx._compat.inductor import limit_compile_threads
from dorafx.errors import DorafxError
from dorafx.log import rewrite_log

from .ceilings import measure_ceilings
from .clock import Clock
from .implementations import COMPILED, Task
from .peers import use_peer
from .plan import DTYPES, SUITES, Case, Settings
from .processes import ALONE, DEVICE, Report, turn

CEILINGS = "ceilings"
"""The name of the configuration that measures the device instead of an implementation."""

# Several shapes in several phases need more than the 8 variants that Dynamo compiles of one code object. Stock PEFT's layers share
# one, and would run eagerly from the ninth variant on, because of the measurement, not of the model.
RECOMPILATIONS = 64

OPERATORS = tuple(name for name, suite in SUITES.items() if not suite.needs_peft)
"""Suites without a layer to rewrite."""


_OWN = ("mode", "codegen", "compose", "scope", "checkpointing", "micro_batches", "autocast")
_FURTHER = ("loss_tokens", "gradients")
"""Fields that only some requests have."""


def request_for(settings: Settings, name: str, case: Case | None) -> dict[str, Any]:
    """The request that :func:`configuration` takes."""
    request = {key: getattr(settings, key) for key in ("dtype", "device", "seconds", "threads", *_OWN)}
    suite, parameters = (case.suite, case.parameters) if case is not None else (CEILINGS, {})
    return {**request, "name": name, "suite": suite, "parameters": parameters}


def prepare(request: dict[str, Any]) -> Clock:
    """Set up a measuring process: a peer's code, threads, seed, limits of the compilers, and the device."""
    peer = request.get("peer")
    if peer:
        use_peer(request["name"], Path(peer))
    if request["threads"]:
        torch.set_num_threads(request["threads"])
    torch.manual_seed(0)
    allow_recompilations(RECOMPILATIONS)
    if request.get("compile_threads"):
        limit_compile_threads(request["compile_threads"])
    if torch.device(request["device"]).type == "cuda":
        torch.cuda.set_device(torch.device(request["device"]).index or 0)
    return Clock(request["device"], request["seconds"], request.get("least", 3))


def task_of(request: dict[str, Any], clock: Clock, report: Report = lambda what: None) -> Task:
    """The task that a request describes, which reports its turns and figures."""
    logits = request.get("logits")
    return Task(
        request["name"],
        request["parameters"],
        clock,
        DTYPES[request["dtype"]],
        **{key: request[key] for key in _OWN},
        **{key: request[key] for key in _FURTHER if key in request},
        logits=Path(logits) if logits else None,
        alone=lambda: report(turn(ALONE)),
        done=lambda figures: report({"figures": {key: list(value) for key, value in figures.items()}}),
    )


def configuration(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Measure one configuration.

    Returns:
        ``figures``, ``{metric: [unit, samples]}``, and ``facts``: graphs and graph breaks of compiled implementations, and for
        dorafx the number of rewritten modules.

    Raises:
        DorafxError: dorafx did not rewrite a DoRA layer, or its polyfills were installed for an anchor, so that the figures
            would not be the implementation's.
    """
    already_imported = "dorafx.backend" in sys.modules  # before anything of a suite is imported
    clock = prepare(request)
    from .suites import MEASURES

    report(turn(DEVICE))
    if request["suite"] == CEILINGS:
        ceilings = measure_ceilings(clock, DTYPES[request["dtype"]])
        return {"figures": {key: list(value) for key, value in ceilings.items()}, "facts": {}}
    task = task_of(request, clock, report)
    rewrite_log().clear()
    before = graph_statistics()
    figures = {key: list(value) for key, value in MEASURES[request["suite"]](task).items()}
    graphs, breaks = (end - start for end, start in zip(graph_statistics(), before))
    if task.name != "dorafx" and not already_imported and "dorafx.backend" in sys.modules:
        # Importing the backend makes PEFT's layers traceable as one graph, from which no anchor may benefit.
        raise DorafxError(f"bench {request['suite']}: dorafx's polyfills were installed while {task.name} was measured")
    facts = {"graphs": graphs, "graph breaks": breaks} if task.name in COMPILED else {}
    if task.name == "dorafx" and request["suite"] not in OPERATORS:  # these call the operators
        facts["rewritten"] = _rewritten()
    return {"figures": figures, "facts": facts}


def _rewritten() -> int:
    log = rewrite_log()
    if log.misses or not log.rewrites:
        why = log.misses[0].reason if log.misses else "no DoRA layer was found"
        raise DorafxError(f"dorafx did not rewrite everything: {why}")
    return len({record.site for record in log.rewrites})
