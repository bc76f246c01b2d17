"""Architectures from transformers, tiny and random, with DoRA (or plain LoRA) on every linear layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from peft import LoraConfig, get_peft_model

VOCABULARY, HIDDEN, LENGTH, LABELS = 67, 32, 9, 11


@dataclass(frozen=True)
class Architecture:
    """How to make one and what to call it with."""

    make: Callable[..., torch.nn.Module]
    """Takes changes to the config."""
    inputs: Callable[..., dict[str, torch.Tensor]]
    targets: str | list[str] = "all-linear"


def tokens(seed: int = 1, batch: int = 2, length: int = LENGTH) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def pictures(seed: int = 1, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(batch, 3, 16, 16, generator=generator)
    return {"pixel_values": values, "labels": (torch.arange(batch) * 3 + seed) % LABELS}


def decoder(**changes: Any) -> dict[str, Any]:
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "use_cache": False,
        "attention_dropout": 0.0,
    }
    return {**sizes, **changes}


def without(values: dict[str, Any], *names: str) -> dict[str, Any]:
    return {k: v for k, v in values.items() if k not in names}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(lambda **c: hf.LlamaForCausalLM(hf.LlamaConfig(**decoder(**c))), tokens),
    "mistral": Architecture(
        lambda **c: hf.MistralForCausalLM(hf.MistralConfig(**decoder(sliding_window=4, **c))), tokens
    ),
    "qwen2": Architecture(lambda **c: hf.Qwen2ForCausalLM(hf.Qwen2Config(**decoder(**c))), tokens),
    "gemma3": Architecture(
        lambda **c: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**decoder(head_dim=8, sliding_window=4, **c))), tokens
    ),
    "phi3": Architecture(
        lambda **c: hf.Phi3ForCausalLM(hf.Phi3Config(**decoder(resid_pdrop=0.0, embd_pdrop=0.0, **c))), tokens
    ),
    "gpt2": Architecture(
        lambda **c: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                n_embd=HIDDEN,
                n_layer=2,
                n_head=4,
                vocab_size=VOCABULARY,
                n_positions=64,
                use_cache=False,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **c,
            )
        ),
        tokens,
    ),
    "opt": Architecture(
        lambda **c: hf.OPTForCausalLM(
            hf.OPTConfig(
                hidden_size=HIDDEN,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                vocab_size=VOCABULARY,
                max_position_embeddings=64,
                word_embed_proj_dim=HIDDEN,
                dropout=0.0,
                use_cache=False,
                pad_token_id=0,
                **c,
            )
        ),
        tokens,
    ),
    "bert": Architecture(
        lambda **c: hf.BertForMaskedLM(
            hf.BertConfig(
                **without(decoder(), "num_key_value_heads", "use_cache", "attention_dropout"),
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                **c,
            )
        ),
        tokens,
        ["query", "key", "value", "dense"],
    ),
    "t5": Architecture(
        lambda **c: hf.T5ForConditionalGeneration(
            hf.T5Config(
                d_model=HIDDEN,
                d_kv=8,
                d_ff=48,
                num_layers=2,
                num_heads=4,
                vocab_size=VOCABULARY,
                dropout_rate=0.0,
                use_cache=False,
                decoder_start_token_id=0,
                **c,
            )
        ),
        tokens,
        ["q", "k", "v", "o", "wi", "wo"],
    ),
    "vit": Architecture(
        lambda **c: hf.ViTForImageClassification(
            hf.ViTConfig(
                hidden_size=HIDDEN,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=16,
                patch_size=8,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                num_labels=LABELS,
                **c,
            )
        ),
        pictures,
    ),
}


def build(
    name: str,
    use_dora: bool = True,
    dtype: torch.dtype = torch.float32,
    config: dict[str, Any] | None = None,
    **lora: Any,
) -> Any:
    """An adapted model with everything random that starts at zero or at one.

    ``config`` changes the model's configuration, ``lora`` PEFT's. PEFT keeps the adapters of a half-precision model in fp32.
    """
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    settings = {"r": 4, "lora_alpha": 6, "target_modules": architecture.targets, **lora}
    base = architecture.make(**(config or {})).to(dtype)
    return randomise(get_peft_model(base, LoraConfig(use_dora=use_dora, **settings)))


def randomise(model: Any, seed: int = 2) -> Any:
    """Move what starts at zero or at one off it: there half of a wrong rewrite is invisible."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "lora_B" in name:
                parameter.copy_(0.1 * noise)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
    return model


def dora_sites(model: torch.nn.Module) -> list[str]:
    """Names of the modules that PEFT gave a magnitude vector."""
    return sorted(n for n, m in model.named_modules() if any(True for _ in getattr(m, "lora_magnitude_vector", {})))
