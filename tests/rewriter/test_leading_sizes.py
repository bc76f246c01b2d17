"""Outputs whose leading sizes are symbolic and differ from the input's: a head of its own, as keys and values of multi-query attention have,
axes of size one before and between, tokens made one axis and parted again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from programs import Layer, S, lora

import dorafx
from dorafx import rewrite_log

Shape = Callable[[torch.Tensor], torch.Tensor]

WAYS: dict[str, Shape] = {
    "one head": lambda y: y.view(*y.shape[:-1], -1, y.shape[-1]).transpose(1, 2),
    "one head, kept": lambda y: y.view(*y.shape[:-1], 1, y.shape[-1]).transpose(1, 2).contiguous(),
    "an axis in front": lambda y: y.unsqueeze(0),
    "axes around": lambda y: y[None, :, None],
    "tokens of one axis": lambda y: y.flatten(0, 1),
    "tokens of one axis, parted": lambda y: y.flatten(0, 1).unflatten(0, (y.shape[0], y.shape[1])),
    "batch and time exchanged": lambda y: y.transpose(0, 1),
    "several heads": lambda y: y.view(*y.shape[:-1], 2, -1).transpose(1, 2),
    "tokens exchanged in one axis": lambda y: y.transpose(0, 1).flatten(0, 1),
}


def layer(p: Layer, x: torch.Tensor, way: Shape) -> torch.Tensor:
    g = p.m / (p.W + S * (p.B @ p.A).detach()).norm(dim=1).detach()
    return way(g * (F.linear(x, p.W) + S * lora(p, x)))


@pytest.mark.parametrize(
    ("batch", "codegen"),
    [(1, "eager"), (3, "eager"), (1, "inductor"), pytest.param(3, "inductor", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("way", WAYS)
def test_values_and_gradients(way: str, batch: int, codegen: str) -> None:
    """Of several lengths, which one graph serves."""
    p, make = Layer(), WAYS[way]
    torch._dynamo.utils.counters.clear()
    options = {"dorafx.codegen": codegen, "dorafx.strict": True}
    compiled = torch.compile(lambda x: layer(p, x, make), backend="dorafx", options=options)
    for tokens in (4, 7):
        x = torch.randn(batch, tokens, p.W.shape[1], dtype=p.W.dtype, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 1)
        leaves = [x, p.A, p.B, p.m]
        got, wanted = compiled(x), layer(p, x, make)
        long = [axis for axis, size in enumerate(wanted.shape) if size > 1]
        assert [got.stride(axis) for axis in long] == [wanted.stride(axis) for axis in long]
        torch.testing.assert_close(got, wanted)
        weights = torch.randn_like(wanted)
        for a, b in zip(*(torch.autograd.grad((y * weights).sum(), leaves) for y in (got, wanted))):
            torch.testing.assert_close(a, b)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert [r.pattern for r in rewrite_log().rewrites] == ["linear"], str(rewrite_log())
    assert not rewrite_log().misses


def test_a_block_with_one_head_of_keys() -> None:
    """As a model generates, block by block, with prompts of several lengths."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=50,
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(use_dora=True, r=4, target_modules=names)).eval()
    prompts = [torch.randint(0, 50, (1, n)) for n in (3, 5, 9)]
    wanted = [model.generate(input_ids=ids, max_new_tokens=4, do_sample=False) for ids in prompts]
    dorafx.optimize(model, codegen="eager")
    for ids, expected in zip(prompts, wanted):
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), expected)
    assert {r.pattern for r in rewrite_log().rewrites} == {"linear"}, str(rewrite_log())
    assert len({r.site for r in rewrite_log().rewrites}) == 14
