"""A stock PEFT DoRA model, compiled through dorafx, and what dorafx did to it.

Takes about 40 s on two CPU cores. Needs peft; downloads nothing.
"""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import dorafx

config = LlamaConfig(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=1000,
)
model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=16, use_dora=True, target_modules="all-linear"))
model = torch.compile(model, backend="dorafx")

tokens = torch.randint(0, 1000, (1, 64))
loss = model(input_ids=tokens, labels=tokens).loss
loss.backward()
print(f"loss {loss.item():.3f}")
print(dorafx.rewrite_log())
