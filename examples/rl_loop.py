"""Reinforcement learning with TRL: completions are generated unmerged, at LoRA's price, and the base weights never move.

Takes about 1 min on two CPU cores. Needs peft and trl; downloads nothing.

Shows GRPOTrainer with dorafx.TrainerCallback, then merges the adapter for a generation and unmerges it for a step, 50 times in bf16,
while the adapter moves.
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer

import dorafx

LINES = [line for line in __import__("this").s.splitlines() if line]
CYCLES = 50


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte pairs learned from the text itself."""
    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(LINES, trainers.BpeTrainer(vocab_size=200, special_tokens=["<unk>", "<pad>", "</s>"]))
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")


def vowels(completions: list[str], **kwargs: object) -> list[float]:
    """The reward: the share of vowels."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]


def base_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" not in name}


def divergence(before: torch.Tensor, after: torch.Tensor) -> float:
    """KL(before ‖ after), the mean over tokens, in nats."""
    old, new = (logits.double().log_softmax(-1) for logits in (before, after))
    return float((old.exp() * (old - new)).sum(-1).mean())


def drift(start: dict[str, torch.Tensor], model: torch.nn.Module) -> tuple[float, float]:
    """The largest change of a base weight relative to the largest weight, and the share of weights that changed."""
    now = base_weights(model)
    largest = max(float((now[n] - w).abs().max() / w.abs().max()) for n, w in start.items())
    changed = sum(int((now[n] != w).sum()) for n, w in start.items()) / sum(w.numel() for w in start.values())
    return largest, changed


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
        initializer_range=0.2,  # as it is not trained before: layers whose output is more than rounding
        pad_token_id=words.pad_token_id,
        eos_token_id=words.eos_token_id,
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=LlamaForCausalLM(config).to(torch.bfloat16),
            reward_funcs=vowels,
            args=GRPOConfig(
                folder,
                max_steps=3,
                per_device_train_batch_size=8,
                num_generations=4,
                max_completion_length=8,
                learning_rate=1e-2,
                logging_steps=3,
                report_to=[],
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                disable_tqdm=True,
                save_strategy="no",
            ),
            train_dataset=Dataset.from_dict({"prompt": LINES}),
            processing_class=words,
            peft_config=LoraConfig(r=8, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
            # Eager codegen, as this model is tiny. For one of your own leave it out: Inductor makes the kernels.
            callbacks=[dorafx.TrainerCallback(codegen="eager", keep=True)],
        )
        start = base_weights(trainer.model)
        result = trainer.train()
    print(f"trained {result.global_step} steps, each generating with the adapter as it is")
    log = dorafx.rewrite_log()
    print(f"rewritten: {len({r.site for r in log.rewrites})} modules, missed: {len(log.misses)}; {log.norms}")

    model = trainer.model.eval()
    prompt = torch.tensor(words(LINES[0])["input_ids"])[None]
    with torch.no_grad():
        served = model(input_ids=prompt).logits
        unmerged = drift(start, model)
        dorafx.restore(model)
        policy = model(input_ids=prompt).logits  # stock PEFT's
        rows = [("dorafx, never merged", *unmerged, divergence(policy, served))]
        adapter = {n: (p, p.clone()) for n, p in model.named_parameters() if "lora_" in n}
        for cycle in range(1, CYCLES + 1):
            model.merge_adapter()
            if cycle == 1:
                merged = model(input_ids=prompt).logits
                rows.append(("what merged weights generate with", *(float("nan"),) * 2, divergence(policy, merged)))
            model.unmerge_adapter()
            for parameter, _ in adapter.values():  # a step, so that the next merge is of another adapter
                parameter.add_(torch.randn_like(parameter), alpha=0.02 * float(parameter.std()))
            if cycle in (1, 10, CYCLES):
                for parameter, trained in adapter.values():
                    parameter.copy_(trained)
                after = model(input_ids=prompt).logits
                rows.append((f"merged and unmerged {cycle} times", *drift(start, model), divergence(policy, after)))
    table = Table("bf16", "largest change of W", "weights changed", "KL to the policy, nats", box=None)
    for what, largest, changed, kl in rows:
        shown = ("", "") if largest != largest else (f"{largest:.1%}", f"{changed:.1%}")
        table.add_row(what, *shown, f"{kl:.1e}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
