"""Weights and adapters of two dtypes: the rewrite rounds nowhere where the original does not."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dorafx import rewrite_log


class Layer(nn.Module):
    """fp64 adapters on a narrower weight, whose output is perhaps rounded at the end."""

    def __init__(self, weight: torch.dtype, out: torch.dtype) -> None:
        super().__init__()
        made = [torch.randn(s, dtype=torch.float64) for s in ((12, 10), (3, 10), (12, 3), (12,))]
        self.weight = nn.Parameter(made[0].to(weight), requires_grad=False)
        self.a, self.b, self.m = (nn.Parameter(t) for t in made[1:])
        self.out = out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = (self.weight + 0.5 * (self.b @ self.a)).norm(dim=1).detach()
        base = F.linear(x.to(self.weight.dtype), self.weight).to(self.a.dtype)
        return (self.m / norm * (base + 0.5 * F.linear(F.linear(x, self.a), self.b))).to(self.out)


@pytest.mark.parametrize("norm", ["tiled", "factored"])
@pytest.mark.parametrize(
    ("weight", "out"),
    [(torch.float32, torch.float64), (torch.bfloat16, torch.float64), (torch.float32, torch.float32)],
)
def test_fp64_adapters_on_a_narrow_weight(weight: torch.dtype, out: torch.dtype, norm: str) -> None:
    layer = Layer(weight, out)
    compiled = torch.compile(layer, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.norm": norm})
    x, trained = torch.randn(20, 10, dtype=torch.float64), [layer.a, layer.b, layer.m]
    actual, expected = compiled(x), layer(x)
    assert actual.dtype == expected.dtype == out
    torch.testing.assert_close(actual, expected, rtol=1e-12 if out == torch.float64 else 1e-7, atol=1e-12)
    upstream = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad(y, trained, upstream) for y in (actual, expected)), strict=True)
    for ours, stock in pairs:
        torch.testing.assert_close(ours, stock, rtol=1e-11, atol=1e-12)
    assert [r.pattern for r in rewrite_log().rewrites] == ["linear"]
