"""Fine-tuning with HF Trainer: train, save, resume, and merge the adapter.

Takes about 45 s on two CPU cores. Needs peft and accelerate; downloads nothing.
One line of it knows of dorafx.
"""

from __future__ import annotations

import tempfile

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

import dorafx

TEXT = __import__("this").s  # ships with Python, in its own cipher
LENGTH = 64


def trained_tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs learned from the text, so that nothing is downloaded."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=made)


def base_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=320,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    model = get_peft_model(
        base_model(), LoraConfig(r=8, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    dorafx.optimize(model)
    tokens = torch.tensor(trained_tokenizer()(TEXT * 8)["input_ids"])
    rows = list(tokens.split(LENGTH))[:-1]
    data = [{"input_ids": row, "labels": row} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=12,
            save_steps=6,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=6,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        )
        Trainer(model, arguments, train_dataset=data).train()
        print("resumed from the checkpoint after step 6:")
        Trainer(model, arguments, train_dataset=data).train(resume_from_checkpoint=f"{folder}/checkpoint-6")
        model.save_pretrained(f"{folder}/adapter")
        again = PeftModel.from_pretrained(base_model(), f"{folder}/adapter")
        x = rows[0][None]
        with torch.no_grad():
            merged = again.merge_and_unload().eval()(input_ids=x).logits
            difference = (model.eval()(input_ids=x).logits - merged).abs().max().item()
    print(f"merged weights differ by {difference:.1e}")
    print(dorafx.rewrite_log())


if __name__ == "__main__":
    main()
