"""A merged weight that is made in fp32 and multiplied in half precision is rounded once. Nothing that dorafx makes of it rounds more."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dorafx import rewrite_log
from dorafx.backend import dorafx as backend

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DRAWS = 12


class Merged(nn.Module):
    """``F.linear(x, m·W'/‖W'‖)``, W' in fp32 or as its parts are.

    Args:
        dim: of the norm.
        base: dtype of the base weight.
        rest: dtype of everything else.
        delta: whether the base product is added to that of the weight's delta.
    """

    def __init__(self, dim: int, base: torch.dtype, rest: torch.dtype, delta: bool) -> None:
        super().__init__()
        self.dim, self.delta = dim, delta
        W = torch.randn(96, 80) / 9
        self.W = nn.Parameter(W.to(base), requires_grad=False)
        self.A, self.B = (
            nn.Parameter((torch.randn(4, 80) / 9).to(rest)),
            nn.Parameter((torch.randn(96, 4) / 9).to(rest)),
        )
        self.m = nn.Parameter((W.norm(dim=dim, keepdim=True) * (1 + 0.1 * torch.rand(1))).to(rest))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        V = self.W + self.B @ self.A
        V = self.m * (V / V.norm(dim=self.dim, keepdim=True).detach())
        V = V - self.W if self.delta else V
        if not torch.is_autocast_enabled("cpu"):
            V = V.to(x.dtype)
        return F.linear(x, V)


def step(
    module: nn.Module, run: Callable[..., torch.Tensor], x: torch.Tensor, autocast: torch.dtype | None
) -> list[Any]:
    """Output and gradients."""
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", autocast or BF16, enabled=autocast is not None):
        y = run(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape)
    leaves = [x, *(p for p in module.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad((y.double() * weights).sum(), leaves)]


def ratios(
    module_of: Callable[[], nn.Module], x_dtype: torch.dtype, autocast: torch.dtype | None, codegen: str
) -> list[float]:
    """Geometric mean over draws of dorafx's error against fp64 over the program's own, for the output and each gradient."""
    compiled = torch.compile(
        module := module_of(), backend=backend, options={"dorafx.codegen": codegen}, fullgraph=True
    )
    logs = []
    for seed in range(DRAWS):
        torch.manual_seed(seed)
        module.load_state_dict(module_of().state_dict())
        x = torch.randn(2, 64, 80).to(x_dtype)
        exact = copy.deepcopy(module).double()
        expected = step(exact, exact, x.double(), None)
        errors = [
            [((a.double() - b).norm() / b.norm()).item() for a, b in zip(step(module, run, x, autocast), expected)]
            for run in (module, compiled)
        ]
        logs.append([math.log(ours / theirs) for theirs, ours in zip(*errors)])
    return [math.exp(sum(column) / DRAWS) for column in zip(*logs)]


@pytest.mark.default_cases(*(f"eager-{case}" for case in ("autocast", "autocast_fp16", "cast")), "inductor-autocast")
@pytest.mark.parametrize(
    ("base", "x_dtype", "autocast"),
    [(FP32, FP32, BF16), (FP32, FP32, FP16), (BF16, BF16, None)],
    ids=["autocast", "autocast_fp16", "cast"],
)
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_no_less_accurate(base: torch.dtype, x_dtype: torch.dtype, autocast: torch.dtype | None, codegen: str) -> None:
    for dim in (1, 0):
        for delta in (False, True):
            torch._dynamo.reset()
            rewrite_log().clear()
            measured = ratios(lambda dim=dim, delta=delta: Merged(dim, base, FP32, delta), x_dtype, autocast, codegen)
            assert max(measured) <= 1.05, (dim, delta, measured)
            ((status, kind),) = {(r.status, r.kind) for r in rewrite_log().records}
            assert (status, kind) == ("rewritten", "merged-rounds-once")


def test_in_one_dtype_it_is_taken_apart() -> None:
    """What the program rounds at each step is rounded less."""
    for dim in (1, 0):
        torch._dynamo.reset()
        rewrite_log().clear()
        assert max(ratios(lambda dim=dim: Merged(dim, BF16, BF16, False), BF16, None, "eager")) <= 1.0
        assert [r.pattern for r in rewrite_log().records] == ["linear" if dim == 1 else "linear_columns"]
