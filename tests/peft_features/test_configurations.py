"""What LoraConfig and the base model can be, beyond linear layers of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from integration_support import VOCABULARY, base_model, lora_config, peft_model, randomise
from peft import LoraConfig, PeftModel, get_peft_model
from peft_features import STARTS, Twin, Way, adapted, feature, layers, lora_layers, output, perturb
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

SECTION = "Configurations"


class Stack(nn.Module):
    """Twelve layers of one shape, called one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(24, 24) for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


@pytest.mark.slow
@feature(
    SECTION,
    "`rank_pattern` with twelve ranks, `alpha_pattern`",
    "works",
    "Each rank is compiled once where layers are compiled one by one. No layer runs as stock PEFT.",
)
def test_twelve_ranks(way: Way) -> None:
    pattern = {f"layers.{k}": k + 1 for k in range(12)}
    alphas = {"layers.3": 1, "layers.7": 20}

    def build() -> Any:
        torch.manual_seed(0)
        config = LoraConfig(use_dora=True, target_modules=r"layers\.\d+", rank_pattern=pattern, alpha_pattern=alphas)
        return randomise(get_peft_model(Stack(), config)).eval()

    def check(twin: Twin) -> None:
        x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(1))
        for shape in ((1, 1), (1, 1), (3, 5)):
            with torch.no_grad():
                torch.testing.assert_close(
                    twin.call(x[: shape[0], : shape[1]]), twin.stock(x[: shape[0], : shape[1]]), rtol=2e-5, atol=2e-5
                )
        gradients = []
        for m, call in twin.pairs():
            m.zero_grad()
            call(x).sin().sum().backward()
            gradients.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
            m.zero_grad()
        torch.testing.assert_close(gradients[1], gradients[0], rtol=2e-4, atol=2e-4)

    twin = Twin(way, build)
    assert len({layer.r["default"] for layer in lora_layers(twin.model)}) == 12
    check(twin)
    twin.do(lambda m: perturb(m, seed=4))
    check(twin)
    twin.rewritten()


@feature(
    SECTION,
    "`layer_replication`",
    "works",
    "Replicated layers share their weights and have adapters of their own; each has its norm.",
)
def test_layer_replication(way: Way) -> None:
    def build() -> Any:
        config = lora_config(layer_replication=[[0, 2], [1, 2]], target_modules=["q_proj", "up_proj"])
        return randomise(get_peft_model(base_model("llama", 2), config)).eval()

    twin = Twin(way, build).warm()
    blocks = twin.model.base_model.model.model.layers
    assert len(blocks) == 3
    assert blocks[1].mlp.up_proj.base_layer.weight.data_ptr() == blocks[2].mlp.up_proj.base_layer.weight.data_ptr()
    twin.do(lambda m: perturb(m, seed=4))
    twin.check()

    def shared(m: Any) -> None:
        with torch.no_grad():
            m.base_model.model.model.layers[1].mlp.up_proj.base_layer.weight.data.mul_(1.5)

    twin.do(shared)
    twin.check()


@feature(
    SECTION,
    "`modules_to_save`",
    "works",
    "Such modules have no DoRA and run unchanged. They are trained, saved and switched with the adapter.",
)
def test_modules_to_save(way: Way, tmp_path: Path) -> None:
    def build() -> Any:
        config = lora_config(target_modules=["first"], task_type=None, modules_to_save=["second"])
        model = get_peft_model(layers(), config)
        perturb(model)
        return model.eval()

    twin = Twin(way, build).warm()

    def other(m: Any) -> None:
        config = lora_config(target_modules=["first"], task_type=None, modules_to_save=["second"], r=2)
        m.add_adapter("other", config)
        perturb(m, "other", 5)
        with torch.no_grad():
            m.base_model.model.second.modules_to_save["other"].weight.mul_(1.3)
        m.set_adapter("other")
        m.eval()

    twin.do(other)
    twin.check("training")
    twin.do(lambda m: m.set_adapter("default"))
    twin.check()
    with twin.stock.disable_adapter(), twin.model.disable_adapter():
        twin.outputs(1, 1)
    twin.model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(layers(), tmp_path).eval()
    torch.testing.assert_close(output(again, again, 3, 5), output(twin.stock, twin.stock, 3, 5))


@pytest.mark.slow
@feature(
    SECTION,
    "Tied embedding and head, of which one is adapted",
    "works",
    "The other keeps the base weight. With `modules_to_save` PEFT unties them.",
)
def test_tied(way: Way) -> None:
    for more in (
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ):

        def build(more: dict[str, Any] = more) -> Any:
            torch.manual_seed(0)
            sizes = LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                vocab_size=VOCABULARY,
                pad_token_id=0,
                tie_word_embeddings=True,
            )
            model = randomise(get_peft_model(LlamaForCausalLM(sizes), lora_config(**more)))
            with torch.no_grad():
                for name, p in model.named_parameters():
                    if "lora_embedding" in name:
                        p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
            return model.eval()

        twin = Twin(way, build).warm()
        twin.do(lambda m: perturb(m, seed=4))
        twin.check()


@feature(
    SECTION,
    "A resized vocabulary",
    "works",
    "`resize_token_embeddings` before or after compiling: the new rows are used at once. Without an adapter on the embedding, as "
    "PEFT's embedding layer cannot be resized.",
)
def test_resized_vocabulary(way: Way) -> None:
    def build() -> Any:
        return peft_model("llama", 1, target_modules=["q_proj", "down_proj"])

    twin = Twin(way, build).warm()

    def resized(m: Any) -> None:
        m.get_base_model().resize_token_embeddings(VOCABULARY + 7, mean_resizing=False)

    twin.do(resized)
    assert twin.model(torch.tensor([[VOCABULARY + 3]])).logits.shape[-1] == VOCABULARY + 7
    twin.check()


@feature(
    SECTION,
    "`low_cpu_mem_usage=True`",
    "works",
    "Adapters are created on the meta device and filled when loaded, before or after compiling.",
)
def test_low_memory(way: Way, tmp_path: Path) -> None:
    source = adapted(r=3)
    perturb(source, seed=8)
    source.save_pretrained(tmp_path)

    def build() -> Any:
        return PeftModel.from_pretrained(layers(), tmp_path, low_cpu_mem_usage=True, is_trainable=True).eval()

    twin = Twin(way, build).warm()
    for k, start in enumerate(STARTS[:2]):
        twin.do(lambda m, k=k: m.load_adapter(tmp_path, f"late{k}", low_cpu_mem_usage=True))
        twin.do(lambda m, k=k: m.set_adapter(f"late{k}"))
        twin.check(start)


@feature(
    SECTION,
    "`lora_dropout`, `use_rslora`, `lora_bias`",
    "works",
    "The same random numbers as stock PEFT draws, where the compiler keeps torch's (Inductor: "
    "`fallback_random`). PEFT refuses `lora_bias` together with DoRA.",
)
@torch._inductor.config.patch(fallback_random=True)  # Inductor's own numbers are others, for any model
def test_dropout_and_rslora(way: Way) -> None:
    twin = Twin(way, lambda: adapted(lora_dropout=0.3, use_rslora=True)).warm()
    twin.do(lambda m: perturb(m, seed=4))
    twin.check("training")
    error = twin.refused(lambda m, call: adapted(lora_bias=True))
    assert isinstance(error, ValueError) and "lora_bias" in str(error)


@feature(
    SECTION,
    "`fan_in_fan_out` (GPT-2)",
    "works",
    "Weights that are stored transposed.",
)
def test_transposed_weights(way: Way) -> None:
    twin = Twin(way, lambda: peft_model("gpt2", 1, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)).warm()
    twin.do(lambda m: perturb(m, seed=4))
    twin.check()
    twin.do(lambda m: m.merge_adapter())
    twin.outputs(1, 1)
    twin.do(lambda m: m.unmerge_adapter())
    twin.check()
