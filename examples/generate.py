"""Generation: the prompt computes the norms, and every further token reuses them until something changes.

Takes about 1 min on two CPU cores. Needs peft; downloads nothing.
"""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

import dorafx


def main() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=500,
    )
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, use_dora=True, target_modules="all-linear")).eval()
    prompt = torch.randint(1, 500, (1, 32))
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    stock = model.generate(input_ids=prompt, **settings)
    dorafx.optimize(model, scope="model")
    ours = model.generate(input_ids=prompt, **settings)
    print("same tokens as stock PEFT:", torch.equal(stock, ours))
    print(dorafx.rewrite_log().norms)
    with torch.no_grad():
        next(p for n, p in model.named_parameters() if "lora_B" in n).add_(0.1)
    model.generate(input_ids=prompt[:, :1], **settings)
    print("after a change of one adapter,", dorafx.rewrite_log().norms)


if __name__ == "__main__":
    main()
