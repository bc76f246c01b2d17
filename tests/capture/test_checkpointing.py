"""Activation checkpointing, which keeps stock DoRA layers from being compiled at all."""

from __future__ import annotations

import pytest
import torch
from capture_support import SITES, Graphs, compare, llama
from torch import nn


def checkpointed(use_dora: bool, reentrant: bool) -> Graphs:
    model = llama(use_dora=use_dora).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.enable_input_require_grads()
    graphs = Graphs()
    compare(model, graphs, backward=True, fullgraph=False)
    return graphs


@pytest.fixture(scope="module")
def lora_graphs() -> int:
    return len(checkpointed(use_dora=False, reentrant=False))


@pytest.mark.default_cases("False")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_compiled(reentrant: bool, lora_graphs: int) -> None:
    """As many graphs as plain LoRA, and every norm inside the bodies of the checkpoint operator."""
    graphs = checkpointed(use_dora=True, reentrant=reentrant)
    assert graphs.norms(inside=True) == SITES
    assert graphs.norms(inside=False) == 0
    assert len(graphs) == lora_graphs


@pytest.mark.parametrize("reentrant", [False, True])
def test_plain_checkpoint_is_one_graph(reentrant: bool) -> None:
    model = llama(lora_dropout=0.1).train()
    layer = model.base_model.model.model.layers[0].mlp

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.mlp, x, use_reentrant=reentrant)

    # The operator leaves the random state to what compiles it: run as it is, it would draw other masks in recomputation.
    body, graphs = Body(), Graphs("aot_eager")
    x = torch.randn(3, 32, requires_grad=True)
    leaves = [x, *(p for p in body.parameters() if p.requires_grad)]
    results = []
    for call in (body, torch.compile(body, backend=graphs, fullgraph=True)):
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(2)
        y = call(x)
        y.sin().sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves)])
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)
    assert len(graphs) == 1
    assert graphs.norms(inside=True) == 3
