"""One configuration of the demo, in a process of its own."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dorafx._compat.dynamo import allow_recompilations, graph_statistics
from dorafx.bench.clock import Clock
from dorafx.bench.memory import peak_resident_bytes
from dorafx.bench.models import VOCABULARY, Size, build
from dorafx.bench.processes import ALONE, Report, turn
from dorafx.bench.worker import RECOMPILATIONS
from dorafx.quiet import quiet_imports

PHASES = {"prefill": "prefill", "decode": "one token", "step": "the training step"}
"""What is measured, by its key in the results, in words."""

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "PEFT DoRA, eager": {"use_dora": True, "backend": None},
    "PEFT DoRA, Inductor": {"use_dora": True, "backend": "inductor"},
    "PEFT DoRA, dorafx": {"use_dora": True, "backend": "dorafx"},
    "plain LoRA, Inductor": {"use_dora": False, "backend": "inductor"},
}

STEPS = 2 + 2 * len(PHASES)
"""Reports of a job before its result: making the model, the first call of each phase, waiting, and timing each phase."""
WAITING = "waiting for the others to compile"


def run(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Measure one configuration: first everything is compiled, beside the other configurations; then it is timed, alone.

    Each report is what is done next, in words.

    Returns:
        Times in seconds (medians after three calls that compile and warm up), peak memory in bytes (of the process, on a GPU what torch
        allocated there; None where unknown), graphs, breaks and rewrites.
    """
    settings, size, device = CONFIGURATIONS[request["name"]], Size(**request["size"]), request["device"]
    cuda = torch.device(device).type == "cuda"
    report("making the model")
    if cuda:
        torch.cuda.set_device(torch.device(device).index or 0)
    allow_recompilations(RECOMPILATIONS)
    clock = Clock(device, 0, least=request["repeats"])
    with quiet_imports():  # where the process is not forked from one that has imported them
        model = build(size, bool(settings["use_dora"]), getattr(torch, request["dtype"]), device)
    call: Callable[..., Any] = model
    if settings["backend"] is not None:
        call = torch.compile(model, backend=str(settings["backend"]), dynamic=False)
    ids = torch.randint(0, VOCABULARY, (1, size.tokens), generator=torch.Generator().manual_seed(1)).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    result: dict[str, Any] = {"name": request["name"], "samples": {}}

    def training_step() -> None:
        call(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    phases: dict[str, Callable[[], Any]] = {
        "prefill": functools.partial(call, input_ids=ids),
        "decode": functools.partial(call, input_ids=ids[:, :1]),
        "step": training_step,
    }

    def in_phase(phase: str, measure: Callable[[Callable[[], Any]], Any]) -> Any:
        model.train(phase == "step")
        with torch.set_grad_enabled(phase == "step"):
            return measure(phases[phase])

    first = "the first call of" if settings["backend"] is None else "compiling"
    for phase, words in PHASES.items():
        report(f"{first} {words}")
        output = in_phase(phase, lambda step: step())
        if phase == "prefill":
            torch.save(output.logits.float().cpu(), request["logits"])
        elif phase == "decode":
            result["inference_graphs"] = graph_statistics()[0]
    report(WAITING)
    report(turn(ALONE))
    for phase, words in PHASES.items():
        report(f"timing {words}")
        samples = in_phase(phase, clock.samples)
        result[phase], result["samples"][phase] = statistics.median(samples), samples
    result["peak_memory"] = torch.cuda.max_memory_allocated() if cuda else peak_resident_bytes()
    result["graphs"], result["breaks"] = graph_statistics()
    if settings["backend"] == "dorafx":
        from dorafx import rewrite_log

        result["rewrites"] = len({r.site for r in rewrite_log().rewrites})
        result["misses"] = len(rewrite_log().misses)
        if request["log"]:
            Path(request["log"]).write_text(rewrite_log().to_json(), encoding="utf-8")
    return result
