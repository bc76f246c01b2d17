"""torchtune's ``DoRALinear``, alone and in an attention block of a model that torchtune builds; its QDoRA keeps the base in NF4."""

from __future__ import annotations

from typing import Any

import torch
from package_support import measured, randomised, report
from torchtune.models.llama3 import lora_llama3
from torchtune.modules.peft import DoRALinear


def _layer(**arguments: Any) -> Any:
    def measure() -> dict[str, Any]:
        layer = DoRALinear(64, 128, rank=4, alpha=8, **arguments)
        layer.weight.requires_grad_(False)
        randomised(layer).initialize_dora_magnitude()
        return measured(layer, layer, torch.randn(3, 5, 64))

    return measure


def _model() -> dict[str, Any]:
    model = lora_llama3(
        lora_attn_modules=["q_proj", "v_proj"],
        apply_lora_to_mlp=True,
        vocab_size=64,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        embed_dim=32,
        max_seq_len=16,
        intermediate_dim=48,
        lora_rank=4,
        lora_alpha=8,
        use_dora=True,
    )
    for module in model.modules():
        if isinstance(module, DoRALinear):
            module.weight.requires_grad_(False)
            randomised(module).initialize_dora_magnitude()
    embeddings = torch.randn(2, 7, 32)
    block = model.layers[0]
    return measured(block, block, embeddings)


ROWS = {
    "DoRALinear": _layer(),
    "DoRALinear with bias": _layer(use_bias=True),
    "DoRALinear with dropout": _layer(dropout=0.3),
    "a block of lora_llama3, use_dora": _model,
    "DoRALinear, base in NF4": _layer(quantize_base=True, block_size=64, scaler_block_size=32),
}

if __name__ == "__main__":
    report(ROWS)
