"""Adapter-Hub's adapters: ``DoRAConfig`` in models of transformers."""

from __future__ import annotations

from typing import Any

import adapters
import torch
from adapters import DoRAConfig
from package_support import measured, randomised, report
from transformers import BertConfig, BertModel, LlamaConfig, LlamaModel


def _row(make: Any, **arguments: Any) -> Any:
    def measure() -> dict[str, Any]:
        model = make()
        adapters.init(model)
        model.add_adapter("dora", config=DoRAConfig(r=4, alpha=8, **arguments))
        model.train_adapter("dora")
        randomised(model)
        return measured(model, lambda x: model(inputs_embeds=x).last_hidden_state, torch.randn(2, 7, 32))

    return measure


def _llama() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaModel(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))


def _bert() -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertModel(BertConfig(vocab_size=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes))


ROWS = {
    "Llama, q and v": _row(_llama),
    "Llama, q, k, v and the MLP": _row(_llama, attn_matrices=["q", "k", "v"], intermediate_lora=True, output_lora=True),
    "BERT, q and v": _row(_bert),
    "BERT, q, v and the MLP, dropout": _row(_bert, intermediate_lora=True, output_lora=True, dropout=0.3),
}

if __name__ == "__main__":
    report(ROWS)
