"""Codegens beside Inductor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from dorafx import rewrite_log


def test_eager_codegen_repeats_the_dropout_of_a_checkpointed_body() -> None:
    """The backward computes the body again, and must meet the mask of the forward."""

    def body(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x.sin(), 0.5, True)

    def program(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(body, x, use_reentrant=False)

    x = torch.randn(64, requires_grad=True)
    y = torch.compile(program, backend="dorafx", fullgraph=True, options={"dorafx.codegen": "eager"})(x)
    y.sum().backward()
    mask = (y != 0).to(x.dtype) * 2
    torch.testing.assert_close(x.grad, mask * x.detach().cos())


def test_a_sum_with_a_factor_keeps_it_through_inductor() -> None:
    """Inductor leaves out the factor of ``add(x, a @ b, alpha=c)`` where a reader that is not pointwise is left alone: here once
    the norm is made of something else."""
    W, A, m = torch.randn(6, 5), torch.randn(2, 5), torch.rand(6)
    B = torch.randn(6, 2, requires_grad=True)

    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        adapted = torch.add(W, B @ A, alpha=1.7)
        low = F.linear(F.linear(x, A), B) * 1.7
        return m / adapted.norm(dim=1) * (F.linear(x, W) + low), adapted.pow(2).sum(1)

    x = torch.randn(3, 5)
    compiled = torch.compile(program, backend="dorafx")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            got, wanted = compiled(x), program(x)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
        if grad:
            gradients = [torch.autograd.grad([y.sum() for y in outputs], B)[0] for outputs in (got, wanted)]
            torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)
    assert rewrite_log().rewrites
