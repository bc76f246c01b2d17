"""One configuration of the demo, in a process of its own: ``python -m dorafx.demo.worker SPEC.json RESULT.json``."""

from __future__ import annotations

import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dorafx import _compat

from .memory import peak_resident_bytes
from .models import Size, build

__all__ = ["CONFIGURATIONS", "PHASES", "run"]

PHASES = ("prefill", "decode", "step")
"""Each is named on standard output when it is done, for the parent's progress bar."""

# Seven shapes in three phases are more than the 8 variants that Dynamo compiles of one code object. Stock PEFT's layers
# share one and would run eagerly from the ninth on: a handicap that is the measurement's, not the model's.
_RECOMPILATIONS = 64

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "PEFT DoRA, eager": {"use_dora": True, "backend": None},
    "PEFT DoRA, Inductor": {"use_dora": True, "backend": "inductor"},
    "PEFT DoRA, dorafx": {"use_dora": True, "backend": "dorafx"},
    "plain LoRA, Inductor": {"use_dora": False, "backend": "inductor"},
}


def _median(step: Callable[[], Any], repeats: int) -> tuple[float, list[float]]:
    """Seconds of one call: the median after two calls that compile and warm up."""
    for _ in range(2):
        step()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples), samples


def run(name: str, size: Size, logits_file: Path, log_file: Path | None, repeats: int = 5) -> dict[str, Any]:
    """Measure one configuration: times in seconds, peak resident memory in bytes (None
    where unknown), graphs, breaks and rewrites."""
    settings = CONFIGURATIONS[name]
    _compat.allow_recompilations(_RECOMPILATIONS)
    model = build(size, bool(settings["use_dora"]))
    call: Callable[..., Any] = model
    if settings["backend"] is not None:
        call = torch.compile(model, backend=str(settings["backend"]), dynamic=False)
    ids = torch.randint(0, 1024, (1, size.tokens), generator=torch.Generator().manual_seed(1))
    result: dict[str, Any] = {"name": name, "samples": {}}

    model.eval()
    with torch.no_grad():
        torch.save(call(input_ids=ids).logits, logits_file)
        for what, tokens in (("prefill", ids), ("decode", ids[:, :1])):
            result[what], result["samples"][what] = _median(functools.partial(call, input_ids=tokens), repeats)
            print(what, flush=True)
    inference_graphs = _compat.graph_statistics()

    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def training_step() -> None:
        call(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    result["step"], result["samples"]["step"] = _median(training_step, repeats)
    print("step", flush=True)
    result["peak_memory"] = peak_resident_bytes()
    result["graphs"], result["breaks"] = _compat.graph_statistics()
    result["inference_graphs"] = inference_graphs[0]
    if settings["backend"] == "dorafx":
        from dorafx import rewrite_log

        result["rewrites"] = len({r.site for r in rewrite_log().rewrites})
        result["misses"] = len(rewrite_log().misses)
        if log_file is not None:
            log_file.write_text(rewrite_log().to_json(), encoding="utf-8")
    return result


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    log_file = Path(spec["log"]) if spec["log"] else None
    result = run(spec["name"], Size(**spec["size"]), Path(spec["logits"]), log_file, spec["repeats"])
    Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
