"""Products that accumulate into the base product: where their factor is, and what that makes of the backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch.nn import functional as F

S = 0.3


def layer(x: Any, w: Any, a: Any, b: Any, m: Any) -> torch.Tensor:
    norm = (w + S * (b @ a)).norm(dim=1).detach()
    y: torch.Tensor = m / norm * (F.linear(x, w) + S * F.linear(F.linear(x, a), b))
    return y


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((20, 12), (16, 12), (3, 12), (16, 3), (16,))
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [made[0], made[1], *(t.requires_grad_() for t in made[2:])]


GRAPHS: list[fx.GraphModule] = []


def _noted(gm: fx.GraphModule, inputs: Any) -> Any:
    GRAPHS.append(gm)
    return gm.forward


torch._dynamo.register_backend(aot_autograd(fw_compiler=_noted), name="dorafx_test_noted")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_where_the_factor_is(dtype: torch.dtype) -> None:
    """In full precision it is on what has the rank's columns, so that no gradient of a matrix has to be multiplied by it. In half precision
    that would be rounded once more."""
    GRAPHS.clear()
    options = {"dorafx.codegen": "dorafx_test_noted", "dorafx.strict": True, "dorafx.compose": "accumulated"}
    compiled = torch.compile(layer, backend="dorafx", options=options)
    ours, stock = operands(dtype), operands(dtype)
    results = []
    for call, tensors in ((compiled, ours), (layer, stock)):
        y = call(*tensors)
        y.sin().sum().backward()
        results.append([y, *(t.grad for t in tensors[2:])])
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for got, expected in zip(*results):
        assert got is not None and expected is not None
        size = expected.abs().max()
        assert (got - expected).abs().max() <= tolerance * size
    forward, backward = GRAPHS
    scaled = [
        tuple(node.meta["val"].shape)
        for gm in (forward, backward)
        for node in gm.graph.nodes
        if node.target is torch.ops.aten.mul.Tensor and S in node.args
    ]
    (added,) = [n for n in forward.graph.nodes if n.target is torch.ops.aten.addmm.default]
    alphas = added.kwargs.get("alpha", 1.0)
    if dtype == torch.bfloat16:
        assert alphas == S
    else:
        assert alphas == 1.0
        assert scaled == [(20, 3)] * 2, "forward and backward, of the rank's columns"
