"""``zero_rows="finite"`` where the weight is a DTensor: sharded by rows, and by columns, whose partial norms are reduced first."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from distributed_support import run_checks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import dorafx

ROW = 3


class Layer(nn.Module):
    def __init__(self, axis: int, differentiable: bool) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (2,))
        g = torch.Generator().manual_seed(0)
        weight, a, b = (torch.randn(*shape, generator=g) for shape in ((10, 12), (4, 12), (10, 4)))
        weight[ROW], b[ROW] = 0, 0
        m = torch.rand(10, generator=g) + 0.5
        whole, rows, columns = [Replicate()], [Shard(0)], [Shard(1)]
        by_rows = axis == 0
        self.weight = nn.Parameter(distribute_tensor(weight, mesh, rows if by_rows else columns), requires_grad=False)
        self.a = nn.Parameter(distribute_tensor(a, mesh, whole if by_rows else columns))
        self.b, self.m = (nn.Parameter(distribute_tensor(t, mesh, rows if by_rows else whole)) for t in (b, m))
        self.x = distribute_tensor(torch.randn(5, 12, generator=g), mesh, whole)
        self.differentiable = differentiable

    def forward(self, x: Any) -> Any:
        n = torch.linalg.norm(self.weight + self.b @ self.a, dim=1)
        n = n if self.differentiable else n.detach()
        return self.m / n * (F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b))


def sharded(axis: int, differentiable: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    dorafx.rewrite_log().clear()
    layer = Layer(axis, differentiable)
    stock = layer(layer.x).full_tensor().detach()
    options = {"dorafx.codegen": "eager", "dorafx.zero_rows": "finite"}
    y = torch.compile(layer, backend="dorafx", options=options)(layer.x).full_tensor()
    y.sum().backward()
    others = [i for i in range(10) if i != ROW]
    return {
        "stock": bool(stock.isfinite().all()),
        "row": float(y[:, ROW].abs().max()),
        "others": float((y[:, others] - stock[:, others]).abs().max()),
        "gradients": all(bool(p.grad.to_local().isfinite().all()) for p in layer.parameters() if p.grad is not None),
        "patterns": [r.pattern for r in dorafx.rewrite_log().rewrites],
    }


if __name__ == "__main__":
    run_checks(
        {
            f"{axis} {differentiable}": lambda axis=axis, differentiable=differentiable: sharded(axis, differentiable)
            for axis in (0, 1)
            for differentiable in (False, True)
        }
    )
