"""The demo's model: a Llama-shaped PEFT model made from a config with random weights, so no download is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["Size", "build"]


@dataclass(frozen=True)
class Size:
    """Size of the demo: hidden size, decoder layers, adapter rank, tokens of the prefill and of a training step."""

    hidden: int = 1024
    layers: int = 1
    rank: int = 128
    tokens: int = 256

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "rank", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.hidden % 64:
            raise ValueError(f"hidden must be a multiple of 64, not {self.hidden}")


def build(size: Size, use_dora: bool) -> Any:
    """A causal language model with an adapter on every linear layer; adapters are moved off their initial values, where
    DoRA would do nothing."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    heads = max(1, size.hidden // 64)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 11 // 4,
        num_hidden_layers=size.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        vocab_size=1024,
        use_cache=False,
    )
    lora = LoraConfig(
        r=size.rank, lora_alpha=2 * size.rank, use_dora=use_dora, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(LlamaForCausalLM(config), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
    return model
