"""The part micro: every kernel and what it is compared with, all in one process, as starting and importing would take longer."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from ..ceilings import measure_ceilings
from ..peers import use_peer
from ..plan import DTYPES
from ..processes import ALONE, DEVICE, Report, one_line, turn
from ..worker import prepare, task_of


def micro(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Measure the ceilings and the items in order, until ``request["deadline"]``, in seconds since 1970.

    Reports immediately: ``{"ceilings": figures}``; ``{"begun": index}`` of each item; and then ``{"item": index}`` with ``figures``, or
    ``error``, or ``left_out`` if its estimate exceeds the remaining time.

    Raises:
        RuntimeError: the device is lost, as after an illegal access: nothing more can be measured in this process.
    """
    clock = prepare(request)
    from ..suites import MEASURES

    report(turn(DEVICE))
    report(turn(ALONE))
    if request["ceilings"]:
        ceilings = measure_ceilings(clock, DTYPES[request["dtype"]], request["side"])
        report({"ceilings": {key: list(value) for key, value in ceilings.items()}})
    for index, item in request["items"]:
        remaining = request["deadline"] - time.time()
        if item["seconds"] > remaining:
            why = f"its estimate of {item['seconds']:.0f} s was more than the {max(remaining, 0):.0f} s left"
            report({"item": index, "left_out": why})
            continue
        report({"begun": index})
        selected = {key: item[key] for key in ("suite", "name", "parameters", "compose")}
        try:
            if item["name"] in request["peers"]:  # a peer that cannot be used affects only its own items
                use_peer(item["name"], Path(request["peers"][item["name"]]))
            task = task_of({**request, **selected}, clock)
            torch.manual_seed(0)
            figures = MEASURES[item["suite"]](task)
        except Exception as error:
            if clock.cuda and is_lost(error):
                raise
            report({"item": index, "error": one_line(error)})
        else:
            report({"item": index, "figures": {key: list(value) for key, value in figures.items()}})
        if clock.cuda:
            torch.cuda.empty_cache()
    return {}


def is_lost(error: Exception) -> bool:
    """Whether no later call on the device can succeed in this process."""
    return "CUDA error" in str(error) or isinstance(error, getattr(torch, "AcceleratorError", ()))
