"""The model that is measured: Llama-shaped, made from a config with random weights, so that no download is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = ["VOCABULARY", "Size", "build"]

VOCABULARY = 1024
"""Small, so that the head, which has no adapter, does not blur what is compared; the more where ``layers`` were cut."""


@dataclass(frozen=True)
class Size:
    """Size of a model and of its input.

    Attributes:
        hidden: hidden size.
        layers: decoder layers.
        rank: of the adapters.
        tokens: of a prefill and of a training step.
        intermediate, heads, kv_heads, head_dim: 0 derives them from ``hidden``: 11/4 of it, and heads of 64.

    Raises:
        ValueError: a number below 1, or a hidden size that the derived heads do not divide.
    """

    hidden: int = 1024
    layers: int = 1
    rank: int = 128
    tokens: int = 256
    intermediate: int = 0
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0

    def __post_init__(self) -> None:
        for name in ("hidden", "layers", "rank", "tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.head_dim and self.hidden % 64:
            raise ValueError(f"hidden must be a multiple of 64, not {self.hidden}")
        heads = self.heads or self.hidden // 64
        derived = {"intermediate": self.hidden * 11 // 4, "heads": heads, "kv_heads": heads, "head_dim": 64}
        for name, value in derived.items():
            if not getattr(self, name):
                object.__setattr__(self, name, value)


def build(
    size: Size, use_dora: bool, dtype: torch.dtype = torch.float32, device: str = "cpu", checkpointing: bool = False
) -> Any:
    """A causal language model with an adapter on every linear layer of the decoder; adapters are moved off their initial
    values, where DoRA would do nothing. They have the model's dtype: PEFT's default, fp32 adapters on a half-precision
    model, is meant for autocast."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    lora = LoraConfig(
        r=size.rank, lora_alpha=2 * size.rank, use_dora=use_dora, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        # Made where it will live: initialising a model of billions of weights on the host takes minutes.
        with torch.device(device):
            base = LlamaForCausalLM(config)
            if checkpointing:
                base.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[no-untyped-call]
            model = get_peft_model(base, lora, autocast_adapter_dtype=False)
    finally:
        torch.set_default_dtype(default)
    move_off_initial_values(model)
    return model


def move_off_initial_values(model: torch.nn.Module) -> None:
    """Give PEFT's adapters values as training would: ``B`` starts at zero, the magnitude at the row norm."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
