"""What hidden blocks of pages need: models that are read by name, from the folder that the page runs in, instead of from the network."""

from __future__ import annotations

from pathlib import Path

__all__ = ["tiny_adapter", "tiny_llama"]


def tiny_llama(folder: str) -> None:
    """Save a Llama with random weights and a tokenizer of single bytes, for ``from_pretrained(folder)``."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(vocabulary),
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def tiny_adapter(folder: str, base: str) -> None:
    """Save a DoRA adapter of ``tiny_llama(base)``, which is saved too if it is not there."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if not Path(base).exists():
        tiny_llama(base)
    lora = LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder)
