"""What QDoRA allocates through stock PEFT and the backend, against plain QLoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quantized_support import FORMATS, quantized, steps

import dorafx

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")

WIDE = 256
EAGER = {"dorafx.codegen": "eager", "dorafx.strict": True, "dorafx.norm_reuse": "never"}


def large_allocations(model: Any, call: Any, x: torch.Tensor, train: bool) -> list[int]:
    """Bytes of the allocations above an eighth of a dequantised bf16 weight in one call (and its backward), after one that warms
    everything up."""
    steps(model, call, x, train)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        steps(model, call, x, train)
    sizes = (int(event.self_cpu_memory_usage) for event in profile.events())
    return sorted(size for size in sizes if size > WIDE * WIDE * 2 // 8)


@pytest.mark.parametrize(
    ("kind", "train", "activations"),
    [
        ("nf4", True, torch.float32),
        pytest.param("torchao int8", False, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param("torchao int8", True, torch.float32, marks=pytest.mark.slow),
    ],
)
def test_large_allocations(kind: str, train: bool, activations: torch.dtype) -> None:
    """A bf16 base: what is large is what plain QLoRA allocates for its products on a CPU, and nothing else, neither for the norm
    nor for stock's ``weight.to(x.dtype)``."""
    x, block = torch.randn(2, WIDE).to(activations), {"d_in": WIDE, "d_hidden": WIDE}
    plain, stock, model = (
        quantized(kind, torch.bfloat16, block=block, use_dora=use_dora).train(train) for use_dora in (False, True, True)
    )
    lora = large_allocations(plain, plain, x, train)
    assert len(large_allocations(stock, stock, x, train)) >= len(lora) + 6, (
        "the measurement does not see what stock forms"
    )
    call = torch.compile(model, backend="dorafx", fullgraph=True, options=EAGER)
    assert large_allocations(model, call, x, train) == lora
    assert {(r.dtype, r.decision) for r in dorafx.rewrite_log().rewrites} == {(FORMATS[kind], "")}
