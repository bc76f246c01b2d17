"""Supervised fine-tuning with TRL: its trainer makes the PEFT model, and dorafx compiles that one.

Takes about 1 min on two CPU cores. Needs peft and trl; downloads nothing.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

import dorafx

LINES = [line for line in __import__("this").s.splitlines() if line]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs learned from the text itself, so that nothing is downloaded."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<pad>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def main() -> None:
    torch.manual_seed(0)
    words = tokenizer()
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(words),
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=LlamaForCausalLM(config),
            args=SFTConfig(
                folder,
                max_steps=4,
                per_device_train_batch_size=4,
                learning_rate=1e-3,
                logging_steps=2,
                report_to=[],
                use_cpu=True,
                bf16=False,
                disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict({"text": LINES * 2}),
            processing_class=words,
            peft_config=LoraConfig(r=8, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        dorafx.optimize(trainer.model)
        result = trainer.train()
    print(f"trained {result.global_step} steps, loss {result.training_loss:.3f}")
    print(dorafx.rewrite_log())


if __name__ == "__main__":
    main()
