"""Codegens beside Inductor."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


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
