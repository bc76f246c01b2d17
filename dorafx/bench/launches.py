"""The kernel launches of a step on a GPU, counted in the code that Inductor generates; no GPU is needed.

    python -m dorafx.bench.launches --shape llama-3-8b --rank 16 --tokens 4096

For a decoder layer of a model's shape, in training: the launches of forward and backward of DoRA compiled by dorafx, and of plain
LoRA and PEFT's DoRA compiled by Inductor. Attention counts as one launch in the forward and three in the backward. Launches that a
step has once for all layers (norms, the optimizer) are not counted.
"""

from __future__ import annotations

import argparse
import contextlib
import re
from dataclasses import dataclass
from typing import Any

import torch

from dorafx._compat.cuda_code import captured_parts, cuda_code
from dorafx.observation import default_dtype

from .models import llama_config
from .shapes import PRESETS, Preset

IMPLEMENTATIONS = {"dorafx": ("dorafx", True), "lora": ("inductor", False), "peft": ("inductor", True)}
"""Name -> the backend, and whether the adapters are DoRA."""

# One launch each: a Triton kernel of Inductor's, a product of cuBLAS, a custom operator.
_LAUNCH = re.compile(r"\b(triton_\w+)\.run\(|\bextern_kernels\.(\w+)\(|\btorch\.ops\.([\w.]+)\(")
_SEVERAL = {"dorafx_bench.attention_backward.default": 3}


@dataclass(frozen=True)
class Launches:
    """The launches of one implementation, in order, by the names of kernels and operators."""

    forward: tuple[str, ...]
    backward: tuple[str, ...]

    @property
    def counts(self) -> tuple[int, int]:
        """The numbers of launches of the forward and of the backward."""
        forward, backward = (sum(_SEVERAL.get(name, 1) for name in part) for part in (self.forward, self.backward))
        return forward, backward


def launches(name: str, shape: Preset, rank: int, tokens: int, dtype: torch.dtype = torch.bfloat16) -> Launches:
    """The launches of one decoder layer in a training step.

    Args:
        name: one of :data:`IMPLEMENTATIONS`.
        shape: of the model that the layer belongs to.
        tokens: of one sequence.

    Raises:
        ValueError: an unknown implementation.
        RuntimeError: the layer was not compiled as one graph.
    """
    if name not in IMPLEMENTATIONS:
        raise ValueError(f"launches: unknown implementation {name!r}; there are {', '.join(IMPLEMENTATIONS)}")
    backend, use_dora = IMPLEMENTATIONS[name]
    torch.compiler.reset()
    layer = _decoder_layer(shape, rank, dtype, use_dora)
    with captured_parts() as parts:
        _give_memory(layer)
        x = torch.empty(1, tokens, shape.hidden, dtype=dtype, requires_grad=True)
        places = torch.empty(1, tokens, shape.head_dim, dtype=dtype)
        step = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
        with contextlib.suppress(TypeError):  # the captured graphs can't be run
            step(x, position_embeddings=(places, places))
    if [part.is_backward for part in parts] != [False, True]:
        raise RuntimeError(f"{name}: one forward and one backward were expected, not {len(parts)} graphs")
    forward, backward = (tuple(_launched(cuda_code(part))) for part in parts)
    return Launches(forward, backward)


def _launched(code: str) -> list[str]:
    return [next(filter(None, match.groups())) for match in _LAUNCH.finditer(code[code.index("def call(") :])]


def _decoder_layer(shape: Preset, rank: int, dtype: torch.dtype, use_dora: bool) -> torch.nn.Module:
    """One layer as transformers and PEFT make it, with adapters on its seven linears, on the meta device."""
    from peft import LoraConfig, get_peft_model
    from transformers import AttentionInterface
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    AttentionInterface.register("dorafx_bench", _attention)
    config = llama_config(shape, attn_implementation="dorafx_bench")
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=use_dora, target_modules=list(shape.linears()))
    with default_dtype(dtype), torch.device("meta"):
        holder = torch.nn.Module()
        holder.layer = LlamaDecoderLayer(config, 0)
        get_peft_model(holder, lora, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in holder.parameters()} == {dtype}
    return holder.layer


def _give_memory(module: torch.nn.Module) -> None:
    """Replace parameters on the meta device by CPU parameters, which have no data either in the fake mode."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False, remove_duplicate=False)):
            value = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            setattr(owner, name, torch.nn.Parameter(value, parameter.requires_grad))


_ATTENTION = torch.library.Library("dorafx_bench", "DEF")
"""Attention as one operator without a kernel, as the code is not run; the CPU's attention is none that a GPU has."""
_ATTENTION.define("attention(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")
_ATTENTION.define(
    "attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor sums) -> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("dorafx_bench::attention", lib=_ATTENTION)
def _attention_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As flash attention returns it: tokens before heads, and one number for each row for the backward."""
    return _tokens_first(q), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.register_fake("dorafx_bench::attention_backward", lib=_ATTENTION)
def _attention_backward_fake(grad: torch.Tensor, *saved: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(map(_tokens_first, saved[:3]))


def _tokens_first(like: torch.Tensor) -> torch.Tensor:
    return like.new_empty(like.transpose(1, 2).shape).transpose(1, 2)


def _save_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)


def _attention_backward(ctx: Any, grad: Any, _: Any) -> Any:
    return torch.ops.dorafx_bench.attention_backward.default(grad, *ctx.saved_tensors)


torch.library.register_autograd(
    "dorafx_bench::attention", _attention_backward, setup_context=_save_for_backward, lib=_ATTENTION
)


def _attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """Attention with the signature that transformers calls."""
    return torch.ops.dorafx_bench.attention.default(query, key, value)[0].transpose(1, 2), None


def main() -> None:
    """The counts as a table, and every launch in order."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(prog="python -m dorafx.bench.launches", description=__doc__)
    parser.add_argument("--shape", default="llama-3-8b", choices=list(PRESETS))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--names", action="store_true", help="print every launch")
    options = parser.parse_args()
    counted = {name: launches(name, PRESETS[options.shape], options.rank, options.tokens) for name in IMPLEMENTATIONS}
    table = Table(
        "", "forward", "backward", title=f"launches of a decoder layer of {options.shape}, rank {options.rank}"
    )
    for name, launched in counted.items():
        table.add_row(name, *map(str, launched.counts))
    console = Console()
    console.print(table)
    if options.names:
        for name, launched in counted.items():
            for part in ("forward", "backward"):
                console.print(f"{name}, {part}: {', '.join(getattr(launched, part))}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
