"""Activation checkpointing, which keeps stock DoRA layers from being compiled at all."""

from __future__ import annotations

import pytest
import torch
from capture_support import SITES, Graphs, compare, llama
from torch import nn


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_are_compiled(reentrant: bool) -> None:
    """As many graphs as plain LoRA, and every norm inside the bodies of the checkpoint operator."""
    count = {}
    for use_dora in (False, True):
        model = llama(2, use_dora=use_dora).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        graphs = Graphs()
        torch._dynamo.reset()
        compare(model, graphs, backward=True, fullgraph=False)
        count[use_dora] = len(graphs)
        if use_dora:
            assert graphs.norms(inside=True) >= 2 * SITES
            assert graphs.norms(inside=False) == 0
    assert count[True] == count[False]


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

    body, graphs = Body(), Graphs()
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
