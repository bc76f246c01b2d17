"""Tiny stock PEFT models, and how a stock run is compared with a run through dorafx."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import fx, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from dorafx import Record, rewrite_log

VOCABULARY = 61
HIDDEN = 32


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Move the adapters, magnitudes and biases off their initial values, where half of a wrong rewrite is invisible
    (``B`` is zero and the magnitude equals the norm)."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.copy_(0.1 * noise)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.3 * noise)
    return model


def _decoder_sizes(layers: int) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }


def base_model(kind: str = "llama", layers: int = 1, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**_decoder_sizes(layers)))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**_decoder_sizes(layers)))
    assert kind == "gpt2"
    config = GPT2Config(n_embd=HIDDEN, n_layer=layers, n_head=4, vocab_size=VOCABULARY, n_positions=64)
    # Dropout of the model itself: off, so that a training run has no random numbers but the adapters'.
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2LMHeadModel(config)


def lora_config(**changes: Any) -> LoraConfig:
    """A DoRA config on every linear layer; ``changes`` override."""
    settings: dict[str, Any] = {
        "r": 4,
        "lora_alpha": 6,
        "use_dora": True,
        "target_modules": "all-linear",
        "task_type": "CAUSAL_LM",
        **changes,
    }
    return LoraConfig(**settings)


def peft_model(kind: str = "llama", layers: int = 1, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    """A causal language model with DoRA on every linear layer, in evaluation mode, random weights."""
    model = get_peft_model(base_model(kind, layers).to(dtype), lora_config(**lora))
    return randomise(model).eval()


class Perceptron(nn.Module):
    """Two linear layers with bias: the smallest thing that PEFT adapts."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.nn.functional.silu(self.first(x)))


def peft_perceptron(width: int = 24, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    torch.manual_seed(0)
    config = lora_config(target_modules=["first", "second"], task_type=None, **lora)
    return randomise(get_peft_model(Perceptron(width).to(dtype), config)).eval()


def tokens(batch: int = 2, length: int = 7, seed: int = 3) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def dora_sites(model: nn.Module) -> list[str]:
    """The names of the modules that carry a DoRA adapter, found without dorafx."""
    return sorted(
        name
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_magnitude_vector", None), nn.ModuleDict) and module.lora_magnitude_vector
    )


def rewritten_sites(records: Iterable[Record] | None = None) -> list[str]:
    return sorted(r.site for r in (rewrite_log().rewrites if records is None else records))


def graphs_in_log() -> int:
    return len({r.graph for r in rewrite_log().records})


def assert_all_rewritten(model: nn.Module, times: int = 1) -> None:
    """Every DoRA module is in the log ``times`` times, composition included, and nothing was missed."""
    log = rewrite_log()
    assert not log.misses, [r.reason for r in log.misses]
    assert rewritten_sites() == sorted(dora_sites(model) * times)
    assert {r.pattern for r in log.rewrites} <= {"linear", "linear_dropout"}, {r.pattern for r in log.rewrites}
    assert all(r.dense_bytes_avoided > 0 and r.flops_after < r.flops_before for r in log.rewrites)


def compile_eagerly(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """``torch.compile`` through the entry point: one graph, eager codegen, anything not rewritten raises."""
    chosen = {"dorafx.codegen": "eager", "dorafx.strict": True, **options}
    return torch.compile(function, backend="dorafx", fullgraph=True, options=chosen)


@dataclass
class Run:
    """Outputs and gradients of one forward and backward."""

    output: torch.Tensor
    gradients: dict[str, torch.Tensor]


def run(model: nn.Module, call: Callable[[], torch.Tensor], seed: int = 11) -> Run:
    """``call()`` and the gradients of a fixed function of its result with respect to every trainable parameter."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    output = call()
    gradients: dict[str, torch.Tensor] = {}
    if output.requires_grad:
        output.float().sin().sum().backward()
        gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return Run(output.detach().clone(), gradients)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str = "") -> None:
    """Largest difference at most ``tolerance`` times the largest value expected."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    if expected.numel() == 0:
        return
    error = (actual.double() - expected.double()).abs().max().item()
    scale = max(expected.double().abs().max().item(), 1e-3)
    assert error <= tolerance * scale, f"{what}: error {error:.3g} with values up to {scale:.3g}"


def assert_same_run(actual: Run, expected: Run, tolerance: float = 1e-5) -> None:
    assert_close(actual.output, expected.output, tolerance, "output")
    assert actual.gradients.keys() == expected.gradients.keys()
    for name, gradient in expected.gradients.items():
        assert_close(actual.gradients[name], gradient, tolerance, name)


def check_model(model: Any, tolerance: float = 1e-5, times: int = 1, **options: Any) -> None:
    """Outputs and all gradients of a language model or a perceptron, stock eager against dorafx, and the log complete."""
    expected = run(model, lambda: call(model, model))
    compiled = compile_eagerly(model, **options)
    actual = run(model, lambda: call(compiled, model))
    assert_same_run(actual, expected, tolerance)
    assert_all_rewritten(model, times)


def call(function: Callable[..., Any], model: nn.Module) -> torch.Tensor:
    """``function`` (the model or what was compiled of it) on a fixed input of the kind that the model takes."""
    if any(isinstance(module, Perceptron) for module in model.modules()):
        return function(torch.randn((3, 5, 24), generator=torch.Generator().manual_seed(6)))
    return function(input_ids=tokens()).logits


def squared_errors(actual: Run, exact: Run) -> dict[str, float]:
    """Squared error of the output and of each kind of gradient, relative to the squared size."""
    assert actual.gradients.keys() == exact.gradients.keys()
    found = {"output": _relative_square(actual.output, exact.output)}
    for name, gradient in exact.gradients.items():
        kind = "gradient of " + next(k for k in ("lora_A", "lora_B", "lora_magnitude_vector") if k in name)
        found[kind] = found.get(kind, 0.0) + _relative_square(actual.gradients[name], gradient)
    return found


def _relative_square(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return float((actual.double() - exact.double()).square().sum() / exact.double().square().sum())


def in_double(model: Any) -> Any:
    """A copy with the same numbers, computed in fp64."""
    return copy.deepcopy(model).double()


def captured_graph(function: Any, *args: Any) -> fx.GraphModule:
    """The one graph that a call is captured as."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(function, backend=keep, fullgraph=True)(*args)
    (graph,) = graphs
    return graph
