"""QDoRA: stock PEFT DoRA on bases that bitsandbytes, torchao and HQQ have quantised."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from quantized_support import FORMATS, Block, quantized, steps
from torch._dynamo.testing import CompileCounterWithBackend

import dorafx
from dorafx.ops import quantized as ops

pytest.importorskip("bitsandbytes")
pytest.importorskip("torchao")
pytest.importorskip("hqq")

QUANTIZED_NORM = torch.ops.dorafx.row_norm_quantized.default
EAGER = {"dorafx.codegen": "eager", "dorafx.strict": True}


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    dorafx.rewrite_log().clear()
    return torch.compile(model, backend="dorafx", fullgraph=True, options={**EAGER, **options})


@pytest.mark.parametrize("kind", FORMATS)
def test_whole_and_equal_to_stock(kind: str) -> None:
    """One graph; every layer rewritten whole, its norm in the prologue by blocks; outputs and gradients are stock's."""
    format, tolerance = FORMATS[kind]
    model, x = quantized(kind), torch.randn(2, 5, 64)
    for train in (True, False):
        model.train(train)
        wanted = steps(model, model, x, train)
        call = compiled(model, **{"dorafx.verify": True})
        for _ in range(2):
            found = steps(model, call, x, train)
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=20 * tolerance)
        records = dorafx.rewrite_log().rewrites
        assert [r.pattern for r in records] == ["linear", "linear"]
        assert {(r.dtype, r.norm_placement, r.decision, r.reason) for r in records} == {(format, "prologue", "", "")}


@pytest.mark.parametrize("kind", ["nf4 double", "torchao int8", "hqq 4 bit"])
def test_dropout(kind: str) -> None:
    """With a dropout stock multiplies by the dequantised weight itself; its norm still is that of the codes."""
    model, x = quantized(kind, lora_dropout=0.3).train(), torch.randn(5, 64)
    wanted = steps(model, model, x, True)
    found = steps(model, compiled(model), x, True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert {(r.pattern, r.dtype) for r in dorafx.rewrite_log().rewrites} == {("linear_dropout", FORMATS[kind][0])}
