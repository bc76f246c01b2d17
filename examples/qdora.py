"""QDoRA: a stock PEFT DoRA model on a base in 4 bits, trained and compared with stock PEFT.

Takes about 1 min on two CPU cores. Needs peft and bitsandbytes; downloads nothing.
The base is NF4 with double quantisation.
"""

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
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


def in_four_bits(linear: nn.Linear) -> nn.Module:
    """Random weights have no checkpoint: with one, ``from_pretrained(…, quantization_config=BitsAndBytesConfig(…))`` does this."""
    made = bnb.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4"
    )
    made.load_state_dict(linear.state_dict())
    # On some CPUs bitsandbytes would lay the weights out anew for evaluation, and stock PEFT, which this example compares
    # with at its end, would then compute norms of scrambled weights.
    made.support_avx512bf16_for_cpu = False
    return made.to("cuda" if torch.cuda.is_available() else "cpu")


torch.manual_seed(0)
model = LlamaForCausalLM(config)
for layer in model.model.layers:
    for part in (layer.self_attn, layer.mlp):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                setattr(part, name, in_four_bits(child))
model.is_loaded_in_4bit = True
model = get_peft_model(model, LoraConfig(r=16, use_dora=True, target_modules="all-linear"))
if torch.cuda.is_available():
    model.cuda()
tokens = torch.arange(64, device=model.device)[None]

dorafx.optimize(model)
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
for step in range(1, 4):
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.3f}")
codes = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
print(f"trained on {codes.dtype} codes")
print(dorafx.rewrite_log())

with torch.no_grad():
    model.eval()
    logits = model(input_ids=tokens).logits
    dorafx.restore(model)
    print(f"logits differ by {(logits - model(input_ids=tokens).logits).abs().max().item():.1e}")
