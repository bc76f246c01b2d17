"""What the code blocks of README.md take for granted: a base model, an adapted one, tokens, and what a Trainer is given."""

from __future__ import annotations

import tempfile

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

__all__ = [
    "LoraConfig",
    "MyLayer",
    "args",
    "base",
    "data",
    "get_peft_model",
    "layer",
    "tokens",
    "torch",
    "transformers",
    "x",
]

torch.manual_seed(0)
config = transformers.LlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    vocab_size=100,
)
base = transformers.LlamaForCausalLM(config)
tokens = torch.arange(8)[None]
data = [{"input_ids": tokens[0], "labels": tokens[0]}] * 2
args = transformers.TrainingArguments(
    tempfile.mkdtemp(), max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no"
)
layer = get_peft_model(nn.Sequential(nn.Linear(8, 8)), LoraConfig(use_dora=True, target_modules=["0"]))
x = torch.randn(2, 8)


class MyLayer(nn.Module):
    """A layer with a tanh in its norm, which is no DoRA any more."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(4, 64)), nn.Parameter(torch.randn(64, 4))
        self.m = nn.Parameter(torch.randn(64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = (self.weight + torch.tanh(self.b @ self.a)).norm(dim=1).detach()
        return (x @ self.weight.T + x @ self.a.T @ self.b.T) * (self.m / norm)
