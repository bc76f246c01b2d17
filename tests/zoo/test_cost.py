"""What a whole model costs: counted FLOPs and measured allocations, against plain LoRA and against stock DoRA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from models import ARCHITECTURES, build, decoder, dora_sites, randomise, tokens
from peft import LoraConfig, get_peft_model
from running import Collecting
from torch.utils.flop_counter import FlopCounterMode

from dorafx import rewrite_log


def forward_flops(model: Any, inputs: dict[str, torch.Tensor], rewrite: bool) -> int:
    """Matrix-product FLOPs of one forward, of which Dynamo makes one graph."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad():
        torch.compile(model, backend=Collecting(rewrite, counter), fullgraph=True, dynamic=False)(**inputs)
    return int(counter.get_total_flops())


def step_flops(model: Any, inputs: dict[str, torch.Tensor], rewrite: bool) -> int:
    """The same of a forward and backward. The graph runs eagerly, so its backward can be counted from outside."""
    forward, backward = FlopCounterMode(display=False), FlopCounterMode(display=False)
    out = torch.compile(model, backend=Collecting(rewrite, forward), fullgraph=True, dynamic=False)(**inputs)
    with backward:
        out[0].float().square().mean().backward()
    return int(forward.get_total_flops()) + int(backward.get_total_flops())


def unlabelled(name: str) -> dict[str, torch.Tensor]:
    """Without a loss: a loss function that logs a warning breaks the graph. T5 makes its decoder's inputs of labels."""
    return {k: v for k, v in ARCHITECTURES[name].inputs().items() if k != "labels" or name == "t5"}


@pytest.mark.default_cases("opt")
@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_flops_of_a_forward(name: str) -> None:
    """LoRA's FLOPs plus 2·d_out·d_in·r a module, exactly (no d_out·r² term: the tiled norm has none). The original pays
    2·d_in·d_in·r more a module, for pushing the identity through A."""
    inputs = unlabelled(name)
    lora = forward_flops(build(name, use_dora=False).eval(), inputs, rewrite=False)
    ours = forward_flops(build(name).eval(), inputs, rewrite=True)
    stock = forward_flops(build(name).eval(), inputs, rewrite=False)
    records = rewrite_log().rewrites
    assert len(records) == len(dora_sites(build(name)))
    norms = sum(2 * r.d_out * r.d_in * r.rank for r in records)
    assert norms == sum(r.flops_after for r in records) > 0
    assert ours == lora + norms
    identities = sum(2 * r.d_in * r.d_in * r.rank for r in records)
    assert stock == lora + norms + identities


@pytest.mark.default_cases("0.0")
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_flops_of_a_training_step(dropout: float) -> None:
    """Backward included: the norm is detached, so it costs its forward only. A dropout on the adapter's input takes the
    base product of the dropped input as well, as it does in the original."""
    inputs = unlabelled("llama")
    lora = step_flops(build("llama", use_dora=False, lora_dropout=dropout).train(), inputs, rewrite=False)
    ours = step_flops(build("llama", lora_dropout=dropout).train(), inputs, rewrite=True)
    stock = step_flops(build("llama", lora_dropout=dropout).train(), inputs, rewrite=False)
    records = rewrite_log().rewrites
    norms = sum(2 * r.d_out * r.d_in * r.rank for r in records)
    assert stock - ours == sum(2 * r.d_in * r.d_in * r.rank for r in records) > 0
    if dropout == 0.0:
        assert ours == lora + norms
    else:
        count = inputs["input_ids"].numel()
        base = sum(2 * count * r.d_out * r.d_in for r in records)
        assert lora + norms + base <= ours <= lora + norms + 2 * base


WIDE = 256


def wide_llama(dtype: torch.dtype, use_dora: bool) -> Any:
    """Wide enough that anything dense is larger than all the activations of a few tokens; every weight of one size."""
    torch.manual_seed(0)
    sizes = decoder(hidden_size=WIDE, intermediate_size=WIDE, num_key_value_heads=4, num_hidden_layers=1)
    base = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes)).to(dtype)
    return randomise(get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora)))


def largest_allocation(call: Any, train: bool) -> int:
    """Bytes of the largest single allocation in one call (and its backward), after one that warms everything up."""
    inputs = {k: v[:1] for k, v in tokens().items()}

    def once() -> None:
        with torch.set_grad_enabled(train):
            out = call(**inputs)
        if train:
            out.loss.backward()

    once()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        once()
    return max(int(event.self_cpu_memory_usage) for event in profile.events())


@pytest.mark.default_cases("eval-fp32-tiled")
@pytest.mark.parametrize("norm", ["tiled", "factored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
def test_largest_allocation(train: bool, dtype: torch.dtype, norm: str) -> None:
    """Nothing above an eighth of the smallest weight is allocated anywhere in a forward or a training step, unless plain
    LoRA allocates it too."""
    limit = WIDE * WIDE * dtype.itemsize // 8
    lora = largest_allocation(wide_llama(dtype, use_dora=False).train(train), train)
    model = wide_llama(dtype, use_dora=True).train(train)
    assert largest_allocation(model, train) >= 8 * limit, "the measurement does not see what the original allocates"
    options = {"dorafx.codegen": "eager", "dorafx.strict": True, "dorafx.norm": norm}
    compiled = torch.compile(model, backend="dorafx", dynamic=False, options=options)
    assert largest_allocation(compiled, train) < max(limit, lora + 1)
    assert {r.norm_algorithm for r in rewrite_log().rewrites} == {norm}
