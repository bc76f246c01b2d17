"""DistributedDataParallel: graphs that Dynamo splits at the buckets of gradients."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from distributed_support import EAGER, Training, batch, loss_of, model, named, reference, relative, run_checks, seen
from quantized_support import quantized
from torch.nn.parallel import DistributedDataParallel

import dorafx

# Small enough that the tiny model has several buckets, each of which ends within a layer.
dist._DEFAULT_FIRST_BUCKET_BYTES = 1000
BUCKET_MIB = 0.002
pieces: list[int] = []


@torch._dynamo.register_backend
def counted(gm: Any, example_inputs: Any) -> Callable[..., Any]:
    """Codegen that counts the graphs that it is given."""
    pieces.append(len(gm.graph.nodes))
    return gm.forward


def wrapped(adapted: Any) -> Any:
    return DistributedDataParallel(adapted, bucket_cap_mb=BUCKET_MIB)


def _outer(adapted: Any, codegen: str) -> Any:
    return torch.compile(wrapped(adapted), backend="dorafx", options={"dorafx.codegen": codegen})


def _inner(adapted: Any, codegen: str) -> Any:
    return wrapped(torch.compile(adapted, backend="dorafx", options={"dorafx.codegen": codegen}))


def _modules(adapted: Any, codegen: str) -> Any:
    return wrapped(dorafx.optimize(adapted, codegen=codegen))


def _whole(adapted: Any, codegen: str) -> Any:
    return wrapped(dorafx.optimize(adapted, codegen=codegen, scope="model"))


HOW = {"outer": _outer, "inner": _inner, "modules": _modules, "model": _whole}


def train(how: str, codegen: str = "counted", checkpointed: bool = False) -> dict[str, Any]:
    wanted = reference(checkpointed)
    pieces.clear()
    adapted = model(checkpointed=checkpointed)
    found = Training().run(adapted, HOW[how](adapted, codegen)).against(wanted)
    return {**found, "pieces": len(pieces)}


def decode() -> dict[str, Any]:
    """Reuse, and a fused optimizer's step between two decoding steps."""
    stock, adapted = model(), model()
    calls = wrapped(stock), HOW["modules"](adapted, "eager")
    token = batch(9)[:, :1]

    def step() -> float:
        with torch.no_grad():
            return relative(calls[1](token), calls[0](token))

    before = [step(), step()]
    reused = seen()["reused"]
    for one, call in zip((stock, adapted), calls):
        optimizer = torch.optim.AdamW([p for _, p in named(one)], lr=0.1, fused=True)
        loss_of(call(batch(1))).backward()
        optimizer.step()
    return {"before": max(before), "reused_before": reused, "after": max(step(), step()), **seen()}


def explained() -> dict[str, Any]:
    """The dry runs see whole graphs, as the backend does."""
    call = wrapped(model())
    explanation, report = dorafx.explain(call, batch(0)), dorafx.verify(call, batch(0))
    return {
        "patterns": sorted({r.pattern for r in explanation.rewrites}),
        "sites": len({r.site for r in explanation.rewrites}),
        "misses": len(explanation.misses),
        "checked": len({check.site for check in report.checks if check.site}),
        "passed": report.passed,
    }


def zero3() -> dict[str, Any]:
    """Parameters that DeepSpeed marks as partitioned are left to it."""
    adapted = model().eval()
    for i, parameter in enumerate(adapted.parameters()):
        parameter.ds_id = i
    compiled = torch.compile(adapted, backend="dorafx", options=EAGER)
    with torch.no_grad():
        return {"output": relative(compiled(batch(0)), adapted(batch(0))), **seen()}


def in_four_bits() -> dict[str, Any]:
    """A base in 4 bits: what is trained has the gradients of stock in both processes."""
    stock, adapted = (quantized("nf4").train() for _ in range(2))
    calls = wrapped(stock), _outer(adapted, "eager")
    worst = 0.0
    for step in range(2):
        x = torch.randn(5, 64, generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
        for one, call in zip((stock, adapted), calls):
            one.zero_grad()
            call(x).sin().sum().backward()
        pairs = zip(stock.parameters(), adapted.parameters())
        worst = max(worst, *(relative(two.grad, one.grad) for one, two in pairs if one.requires_grad))
    return {"gradients": worst, "formats": sorted({r.dtype for r in dorafx.rewrite_log().rewrites}), **seen()}


QUICK = {"outer": lambda: train("outer"), "modules": lambda: train("modules"), "decode": decode}
MORE = {
    "inner": lambda: train("inner"),
    "model": lambda: train("model"),
    "inductor": lambda: train("outer", "inductor"),
    "outer checkpointed": lambda: train("outer", "aot_eager", checkpointed=True),
    "modules checkpointed": lambda: train("modules", checkpointed=True),
    "explained": explained,
    "zero3": zero3,
    "quantised": in_four_bits,
}

if __name__ == "__main__":
    run_checks(QUICK if sys.argv[2:] == ["quick"] else MORE)
