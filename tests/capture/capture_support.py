"""Stock PEFT models without weights from anywhere, and a backend that keeps the graphs it is given and runs them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import fx
from transformers import LlamaConfig, LlamaForCausalLM

from dorafx._compat.dynamo import lookup_backend

SITES = 7
"""Linear layers of one Llama decoder layer."""


class Graphs:
    """A backend. ``len`` is the number of graphs; ``norms`` counts norm nodes by whether they sit in the body of a
    higher-order operator. ``run`` is the backend that runs them; without one they run as they are."""

    def __init__(self, run: str = "") -> None:
        self.modules: list[fx.GraphModule] = []
        self.run = lookup_backend(run) if run else None

    def __call__(self, gm: fx.GraphModule, example_inputs: Any) -> Callable[..., Any]:
        self.modules.append(gm)
        return self.run(gm, example_inputs) if self.run else gm.forward

    def __len__(self) -> int:
        return len(self.modules)

    def norms(self, *, inside: bool) -> int:
        return sum(
            "norm" in str(node.target) and node.op in ("call_function", "call_method")
            for gm in self.modules
            for body in (_bodies(gm) if inside else (gm,))
            for node in body.graph.nodes
        )


def _bodies(gm: fx.GraphModule) -> Iterator[fx.GraphModule]:
    return (m for name, m in gm.named_modules() if name and isinstance(m, fx.GraphModule))


def llama(layers: int = 1, *, use_dora: bool = True, adapters: tuple[str, ...] = ("default",), **config: Any) -> Any:
    """A Llama of a few thousand parameters with DoRA (or LoRA) on every linear layer, no adapter at its start."""
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=64,
            use_cache=False,
        )
    )
    lora = LoraConfig(r=4, target_modules="all-linear", use_dora=use_dora, init_lora_weights=False, **config)
    model = get_peft_model(base, lora, adapter_name=adapters[0])
    for name in adapters[1:]:
        model.add_adapter(name, lora)
    return model


def mlp(**config: Any) -> Any:
    """The three linear layers of a decoder layer, which compile quickly."""
    return llama(**config).base_model.model.model.layers[0].mlp


def check_mlp(graphs: Graphs, *, fullgraph: bool) -> None:
    """The compiled MLP in eval mode against itself in eager."""
    block, x = mlp().eval(), torch.randn(3, 32)
    expected = block(x)
    torch.testing.assert_close(torch.compile(block, backend=graphs, fullgraph=fullgraph)(x), expected)


def tokens() -> torch.Tensor:
    return torch.arange(12).reshape(2, 6) * 5 % 64


def compare(model: Any, graphs: Graphs, *, backward: bool = False, fullgraph: bool = True) -> None:
    """The compiled model against itself in eager: values, and gradients of every trainable parameter."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run(call: Callable[..., Any]) -> list[torch.Tensor]:
        torch.manual_seed(1)  # the same dropout masks
        logits = call(input_ids=tokens()).logits
        if not backward:
            return [logits]
        model.zero_grad()
        logits.sin().sum().backward()
        assert all(p.grad is not None for p in parameters)
        return [logits.detach(), *(p.grad.clone() for p in parameters)]

    expected = run(model)
    actual = run(torch.compile(model, backend=graphs, fullgraph=fullgraph))
    for wanted, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def in_new_process(program: str, path: str = "") -> dict[str, Any]:
    """Run a program in a process of its own: polyfills stay for a process's life. Its last line is JSON.

    Args:
        program: Python source.
        path: a directory whose packages go before the installed ones.
    """
    here = os.path.dirname(__file__)
    folders = [path, here, os.path.dirname(os.path.dirname(here)), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, folders)), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer
