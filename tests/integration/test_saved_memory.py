"""What autograd saves for a backward, in bytes: stock PEFT, dorafx, plain LoRA."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from integration_support import base_model, dora_sites, lora_config, peft_model, randomise, tokens
from peft import get_peft_model, inject_adapter_in_model
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import CheckpointPolicy

from dorafx.bench.allocations import saved_bytes

TOKENS, D_IN, D_OUT = 96, 40, 56
# Of each module: g, the norm, the magnitude as a row, and what g is made of, in fp32.
VECTORS = 4 * 4

JOINT_GRAPHS: list[torch.fx.Graph] = []
"""Forward and backward in one, as what decides what to save is given them."""


def _partition(gm: torch.fx.GraphModule, inputs: Any, **how: Any) -> Any:
    JOINT_GRAPHS.append(copy.deepcopy(gm.graph))
    return min_cut_rematerialization_partition(gm, inputs, **how)


torch._dynamo.register_backend(
    aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm), partition_fn=_partition), name="dorafx_test_joint"
)


def layer(use_dora: bool, dropout: float, dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    holder = torch.nn.Sequential(torch.nn.Linear(D_IN, D_OUT, dtype=dtype)).requires_grad_(False)
    config = lora_config(use_dora=use_dora, target_modules=["0"], task_type=None, lora_dropout=dropout)
    return randomise(inject_adapter_in_model(config, holder).to(dtype)).train()[0]


def freeze(module: torch.nn.Module) -> None:
    for name, parameter in module.named_parameters():
        if "magnitude" in name:
            parameter.requires_grad_(False)


def saved(module: torch.nn.Module, call: Callable[[], Any]) -> int:
    call()  # compile
    return saved_bytes(call, [*module.parameters(), *module.buffers()])


def compiled(module: torch.nn.Module, backend: str | None, codegen: str) -> Any:
    torch.compiler.reset()
    options: dict[str, Any] | None = None
    if backend == "dorafx":
        options = {"dorafx.codegen": codegen, "dorafx.strict": True}
    elif codegen == "eager":
        return module
    return module if backend is None else torch.compile(module, backend=backend, options=options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_layer(trained: bool, dropout: float, dtype: torch.dtype) -> None:
    """One ``[tokens, d_out]`` more than LoRA where the magnitude is trained; no more than vectors where it is not."""
    x = torch.randn(TOKENS, D_IN, dtype=dtype, requires_grad=True)
    found = {}
    for name, use_dora, backend in (("lora", False, "inductor"), ("stock", True, None), ("dorafx", True, "dorafx")):
        module = layer(use_dora, dropout, dtype)
        if not trained:
            freeze(module)
        call = compiled(module, backend, "eager")
        found[name] = saved(module, lambda call=call: call(x))
    extra = TOKENS * D_OUT * dtype.itemsize if trained else 0
    assert found["dorafx"] <= found["lora"] + extra + VECTORS * D_OUT, found
    assert found["dorafx"] < found["stock"], found


@pytest.mark.default_cases("0.0")
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_half_precision_compiled_by_inductor(dropout: float) -> None:
    """One ``[tokens, d_out]`` in half precision, the sum, and not both products of which it is the sum."""
    x = torch.randn(TOKENS, D_IN, dtype=torch.bfloat16, requires_grad=True)
    found = {}
    for name, backend in (("lora", "inductor"), ("dorafx", "dorafx")):
        module = layer(name != "lora", dropout, torch.bfloat16)
        call = compiled(module, backend, "inductor")
        found[name] = saved(module, lambda call=call: call(x))
    assert found["lora"] + 2 * TOKENS * D_OUT <= found["dorafx"], found
    assert found["dorafx"] <= found["lora"] + (2 * TOKENS + VECTORS) * D_OUT, found


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_no_cast_reads_the_sum_that_is_saved(dropout: float) -> None:
    """Of two casts, one after the other, some versions of Inductor (2.11) make one before they choose what to save."""
    JOINT_GRAPHS.clear()
    module = layer(True, dropout, torch.bfloat16)
    compiled(module, "dorafx", "dorafx_test_joint")(torch.randn(TOKENS, D_IN, dtype=torch.bfloat16))
    (graph,) = JOINT_GRAPHS
    (kept,) = (node for node in graph.nodes if node.meta.get("recompute") is CheckpointPolicy.MUST_SAVE)
    assert kept.target is torch.ops.aten._to_copy.default and kept.meta["val"].dtype == torch.bfloat16
    assert [user.target for user in kept.users if user.op != "output"] == [torch.ops.aten.mul.Tensor]


def with_fp32_adapters(module: Any) -> Any:
    """PEFT's default for a half-precision base."""
    for name, parameter in module.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.float()
    return module


def saved_by_fp32_adapters(codegen: str, autocast: bool, dropout: float, **options: Any) -> dict[str, int]:
    """Bytes of plain LoRA and of dorafx, compiled alike, over a bf16 base. ``checkpointed``: all of the layer is."""
    x = torch.randn(TOKENS, D_IN, dtype=torch.bfloat16, requires_grad=True)
    found = {}
    for name, backend in (("lora", codegen), ("dorafx", "dorafx")):
        module = with_fp32_adapters(layer(name != "lora", dropout, torch.bfloat16))
        if not options.get("trained", True):
            freeze(module)
        body = Checkpointed(module) if options.get("checkpointed") else module
        call = compiled(body, backend, codegen)

        def under_autocast(call: Any = call) -> Any:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return call(x)

        found[name] = saved(module, under_autocast)
    return found


class Checkpointed(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=False)


@pytest.mark.parametrize(
    ("codegen", "autocast", "dropout"),
    [
        *(
            (codegen, autocast, p)
            for codegen in ("eager", "aot_eager")
            for autocast in (True, False)
            for p in (0.0, 0.1)
        ),
        ("inductor", True, 0.1),
        *(
            pytest.param("inductor", *rest, marks=pytest.mark.slow)
            for rest in ((True, 0.0), (False, 0.0), (False, 0.1))
        ),
    ],
)
def test_fp32_adapters_on_a_bf16_base(codegen: str, autocast: bool, dropout: float) -> None:
    """One fp32 ``[tokens, d_out]`` more than LoRA, not both products of which it is the sum, and no copy of the weight."""
    found = saved_by_fp32_adapters(codegen, autocast, dropout)
    assert found["lora"] + 4 * TOKENS * D_OUT <= found["dorafx"], found
    assert found["dorafx"] <= found["lora"] + (4 * TOKENS + VECTORS) * D_OUT, found


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_nothing_is_kept_for_a_frozen_magnitude_or_in_a_checkpointed_region(dropout: float) -> None:
    for options in ({"trained": False}, {"checkpointed": True}):
        found = saved_by_fp32_adapters("aot_eager", False, dropout, **options)
        assert found["dorafx"] <= found["lora"] + VECTORS * D_OUT, (options, found)


def model_bytes(trained: bool, codegen: str) -> tuple[dict[str, int], int]:
    """Of a 4-layer Llama, and how much one ``[tokens, d_out]`` a module and its vectors are."""
    ids, found = tokens(2, 24), {}
    plain = get_peft_model(base_model("llama", 4), lora_config(use_dora=False))
    for name, model, backend in (
        ("lora", plain, "inductor"),
        ("stock", peft_model(layers=4), None),
        ("dorafx", peft_model(layers=4), "dorafx"),
    ):
        model.train()
        if not trained:
            freeze(model)
        call = compiled(model, backend, codegen)
        found[name] = saved(model, lambda call=call: call(input_ids=ids, labels=ids).loss)
    sites = dora_sites(model)
    assert len(sites) == 4 * 7
    width = sum(model.get_submodule(site).out_features for site in sites)
    return found, width * (VECTORS + (4 * ids.numel() if trained else 0))


@pytest.mark.slow
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_model(codegen: str, trained: bool) -> None:
    found, allowed = model_bytes(trained, codegen)
    assert found["dorafx"] <= found["lora"] + allowed, found
    assert found["dorafx"] < found["stock"], found


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_no_more_than_lora_where_the_graph_holds_what_follows(dtype: torch.dtype) -> None:
    """The sums for the gradients of the magnitudes are saved in place of what the backward computes from them, not besides."""
    ids, found = tokens(2, 24), {}
    for name, backend in (("lora", "inductor"), ("dorafx", "dorafx")):
        plain = name == "lora"
        model = get_peft_model(base_model("llama", 2), lora_config(use_dora=False)) if plain else peft_model(layers=2)
        model = model.to(dtype).train()
        call = compiled(model, backend, "inductor")
        found[name] = saved(model, lambda call=call: call(input_ids=ids, labels=ids).loss)
    assert found["dorafx"] <= 1.02 * found["lora"], found
