"""The measured model: Llama-shaped, made from a config with random weights, so that no download is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from dorafx.observation import default_dtype

from .shapes import Preset

VOCABULARY = 1024
"""Small, so that the head, which has no adapter, has little influence on the comparison, even with few layers."""


@dataclass(frozen=True)
class Size:
    """Size of a model and of its input.

    Attributes:
        hidden: hidden size.
        layers: decoder layers.
        rank: of the adapters.
        tokens: of a prefill and of a training step.
        intermediate, heads, kv_heads, head_dim: if 0, derived from ``hidden``: 11/4 of it, and heads of 64.

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
    size: Size,
    use_dora: bool,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    checkpointing: bool = False,
    fp32_adapters: bool = False,
) -> Any:
    """A causal language model with an adapter on every linear layer of the decoder. The adapters do not have their initial values,
    with which DoRA has no effect. They have the model's dtype, or with ``fp32_adapters`` PEFT's default, which is meant for
    autocast."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    config = llama_config(size, vocab_size=VOCABULARY, use_cache=False)
    lora = LoraConfig(
        r=size.rank, lora_alpha=2 * size.rank, use_dora=use_dora, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    # Made on its device: initialising a model of billions of weights on the host takes minutes.
    with default_dtype(dtype), torch.device(device):
        base = LlamaForCausalLM(config)
        model: Any = get_peft_model(base, lora, autocast_adapter_dtype=fp32_adapters)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            # Only reentrant checkpointing needs the embedding's output to require gradients, and it breaks the graph.
            model.disable_input_require_grads()
    move_off_initial_values(model)
    return model


def llama_config(size: Size | Preset, **further: Any) -> Any:
    """The config of transformers for a model of a size, with further fields."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        **further,
    )


def move_off_initial_values(model: torch.nn.Module) -> None:
    """Change PEFT's adapters as training would: initially ``B`` is zero, and the magnitude the row norm."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))
