"""A DoRA layer written out, small enough to be compiled by Inductor again and again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    """``y [.., 10] -> [.., 10]`` in fp64, of rank 4, with a square weight that is frozen."""

    def __init__(self, differentiable: bool = False) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(3)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=made, dtype=torch.float64)

        self.w = nn.Parameter(random(10, 10), requires_grad=False)
        self.a, self.b, self.m = nn.Parameter(random(4, 10)), nn.Parameter(random(10, 4)), nn.Parameter(random(10))
        self.differentiable = differentiable

    def norm(self) -> torch.Tensor:
        norm = (self.w + 0.3 * (self.b @ self.a)).norm(dim=1)
        return norm if self.differentiable else norm.detach()

    def composed(self, x: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        return (F.linear(x, self.w) + 0.3 * F.linear(F.linear(x, self.a), self.b)) * (self.m / norm)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.composed(x, self.norm())


def one_row() -> torch.Tensor:
    return torch.randn((1, 10), generator=torch.Generator().manual_seed(6), dtype=torch.float64)


def rows() -> torch.Tensor:
    return torch.randn((40, 10), generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def compiled(program: Callable[..., Any], codegen: str = "eager", **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    options = {"dorafx.codegen": codegen, **{f"dorafx.{key}": value for key, value in options.items()}}
    call: Callable[..., Any] = torch.compile(program, backend="dorafx", options=options)
    return call
