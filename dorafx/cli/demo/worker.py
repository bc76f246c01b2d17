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
from dorafx.bench.worker import RECOMPILATIONS

PHASES = ("prefill", "decode", "step")
"""Each is reported when it is finished, for the parent's progress bar."""

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "PEFT DoRA, eager": {"use_dora": True, "backend": None},
    "PEFT DoRA, Inductor": {"use_dora": True, "backend": "inductor"},
    "PEFT DoRA, dorafx": {"use_dora": True, "backend": "dorafx"},
    "plain LoRA, Inductor": {"use_dora": False, "backend": "inductor"},
}


def run(request: dict[str, Any], report: Callable[[str], None]) -> dict[str, Any]:
    """Measure one configuration: times in seconds (medians after two calls that compile and warm up), peak resident
    memory in bytes (None where unknown), graphs, breaks and rewrites."""
    settings, size = CONFIGURATIONS[request["name"]], Size(**request["size"])
    allow_recompilations(RECOMPILATIONS)
    clock = Clock("cpu", 0, least=request["repeats"])
    model = build(size, bool(settings["use_dora"]))
    call: Callable[..., Any] = model
    if settings["backend"] is not None:
        call = torch.compile(model, backend=str(settings["backend"]), dynamic=False)
    ids = torch.randint(0, VOCABULARY, (1, size.tokens), generator=torch.Generator().manual_seed(1))
    result: dict[str, Any] = {"name": request["name"], "samples": {}}

    def timed(phase: str, step: Callable[[], Any]) -> None:
        samples = clock.samples(step)
        result[phase], result["samples"][phase] = statistics.median(samples), samples
        report(phase)

    model.eval()
    with torch.no_grad():
        torch.save(call(input_ids=ids).logits, request["logits"])
        timed("prefill", functools.partial(call, input_ids=ids))
        timed("decode", functools.partial(call, input_ids=ids[:, :1]))
    inference_graphs = graph_statistics()

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def training_step() -> None:
        call(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    timed("step", training_step)
    result["peak_memory"] = peak_resident_bytes()
    result["graphs"], result["breaks"] = graph_statistics()
    result["inference_graphs"] = inference_graphs[0]
    if settings["backend"] == "dorafx":
        from dorafx import rewrite_log

        result["rewrites"] = len({r.site for r in rewrite_log().rewrites})
        result["misses"] = len(rewrite_log().misses)
        if request["log"]:
            Path(request["log"]).write_text(rewrite_log().to_json(), encoding="utf-8")
    return result
