"""Programs that call DoRA layers of a served model outside of every graph, one for each cause."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import lora_config, peft_model, randomise
from peft import get_peft_model
from torch import nn

import dorafx
from dorafx.backend import dorafx as backend
from dorafx.log import ReasonKind

Run = Callable[[str], None]
PROGRAMS: dict[ReasonKind, Run] = {}
"""Of each kind a program that has records of it; the argument is the codegen."""


def _giving(kind: ReasonKind) -> Callable[[Run], Run]:
    def register(run: Run) -> Run:
        PROGRAMS[kind] = run
        return run

    return register


class Two(nn.Module):
    """Two layers, of which the second can be adapted later; no block is repeated."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(x)))


def two(*targets: str) -> Any:
    torch.manual_seed(0)
    return randomise(get_peft_model(Two(), lora_config(task_type=None, target_modules=list(targets)))).eval()


def rows(n: int) -> torch.Tensor:
    return torch.randn(n, 24, generator=torch.Generator().manual_seed(n))


def compiled(model: nn.Module, codegen: str) -> Any:
    return torch.compile(model, backend=backend, options={"dorafx.codegen": codegen})


@_giving(ReasonKind.RECOMPILE_LIMIT)
def beyond_the_limit(codegen: str) -> None:
    model = two("first", "second")
    function, stock = compiled(model, codegen), copy.deepcopy(model)
    with torch._dynamo.config.patch(recompile_limit=1):
        for n in (20, 30):
            torch.testing.assert_close(function(rows(n)), stock(rows(n)))
        with torch.no_grad():
            torch.testing.assert_close(function(rows(20)), stock(rows(20)))


@_giving(ReasonKind.COMPILER_DISABLED)
def disabled(codegen: str) -> None:
    model = two("first", "second")
    stock = copy.deepcopy(model)
    inner = model.base_model.model
    inner.forward = torch.compiler.disable(inner.forward, reason="it prints")
    torch.testing.assert_close(compiled(model, codegen)(rows(20)), stock(rows(20)))


@_giving(ReasonKind.STANCE)
def stance(codegen: str) -> None:
    model = two("first", "second")
    stock = copy.deepcopy(model)
    dorafx.optimize(model, codegen=codegen)
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(model(rows(20)), stock(rows(20)))


@_giving(ReasonKind.ANOTHER_BACKEND)
def compiled_by_another(codegen: str) -> None:
    model = two("first", "second")
    stock = copy.deepcopy(model)
    dorafx.optimize(model, codegen=codegen)
    others = torch.compile(lambda x: 2 * model(x), backend="aot_eager" if codegen == "eager" else codegen)
    for n in (20, 30, 30):
        torch.testing.assert_close(others(rows(n)), 2 * stock(rows(n)))


@_giving(ReasonKind.ADDED_LATER)
def added_later(codegen: str) -> None:
    model = two("first")
    dorafx.optimize(model, codegen=codegen)
    model.add_adapter("wider", lora_config(task_type=None, target_modules=["first", "second"]))
    model.set_adapter("wider")
    randomise(model, 1)
    stock = dorafx.restore(copy.deepcopy(model))
    for _ in range(2):
        torch.testing.assert_close(model(rows(20)), stock(rows(20)))


@_giving(ReasonKind.NOT_COMPILED)
def generation_past_the_compiled_call(codegen: str) -> None:
    model = peft_model()
    function = compiled(model, codegen)
    prompt = torch.arange(1, 6)[None]
    with torch.no_grad():
        function(prompt)
    function.generate(input_ids=prompt, max_new_tokens=2, do_sample=False)


def wrapped_by_fsdp1(codegen: str, use_orig_params: bool) -> None:
    """A model in one process, wrapped by FullyShardedDataParallel."""
    if not torch.distributed.is_available():
        pytest.skip("torch is built without torch.distributed")
    from torch.distributed.fsdp import FullyShardedDataParallel

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = two("first", "second")
        expected = model(rows(20))
        device = torch.device("cpu")
        wrapped = FullyShardedDataParallel(
            model.requires_grad_(True), device_id=device, use_orig_params=use_orig_params
        )
        torch.testing.assert_close(compiled(wrapped, codegen)(rows(20)), expected)
    finally:
        torch.distributed.destroy_process_group()


@_giving(ReasonKind.NOT_TRACED)
def fsdp1_without_original_parameters(codegen: str) -> None:
    wrapped_by_fsdp1(codegen, use_orig_params=False)


def within_the_limit(codegen: str) -> None:
    function = compiled(two("first", "second"), codegen)
    with torch._dynamo.config.patch(recompile_limit=2):
        for n in (20, 30):
            function(rows(n))


def disabled_beside(codegen: str) -> None:
    """What is disabled calls no layer."""
    model = two("first", "second")
    model.base_model.model.first.register_forward_pre_hook(torch.compiler.disable(lambda module, args: None))
    compiled(model, codegen)(rows(20))


def stance_of_other_calls(codegen: str) -> None:
    model = two("first", "second")
    dorafx.optimize(model, codegen=codegen)
    with torch.compiler.set_stance("force_eager"):
        two("first")(rows(20))
    model(rows(20))


def added_on_the_same_layers(codegen: str) -> None:
    model = two("first")
    dorafx.optimize(model, codegen=codegen)
    model.add_adapter("other", lora_config(task_type=None, target_modules=["first"]))
    model.set_adapter("other")
    model(rows(20))


class Broken(nn.Module):
    """A block that breaks every graph that would contain all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 24), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        torch._dynamo.graph_break()
        return self.second(y)


def broken_in_another_backend_s_graph(codegen: str) -> None:
    """Dynamo traces the first layer for the other backend, comes to the break, and leaves the call to Python, which calls dorafx."""
    torch.manual_seed(0)
    blocks = nn.Sequential(Broken(), Broken())
    model = randomise(get_peft_model(blocks, lora_config(task_type=None, target_modules=["first", "second"]))).eval()
    dorafx.optimize(model, scope="blocks", codegen=codegen)
    torch.compile(lambda x: 2 * model(x), backend="aot_eager")(rows(20))


def called_beside(codegen: str) -> None:
    """Who calls the model as it was, and not by a method of what was compiled, compares."""
    model = two("first", "second")
    torch.testing.assert_close(compiled(model, codegen)(rows(20)), model(rows(20)))


NEAR: dict[ReasonKind, Run] = {
    ReasonKind.RECOMPILE_LIMIT: within_the_limit,
    ReasonKind.COMPILER_DISABLED: disabled_beside,
    ReasonKind.STANCE: stance_of_other_calls,
    ReasonKind.ANOTHER_BACKEND: broken_in_another_backend_s_graph,
    ReasonKind.ADDED_LATER: added_on_the_same_layers,
    ReasonKind.NOT_COMPILED: called_beside,
    ReasonKind.NOT_TRACED: lambda codegen: wrapped_by_fsdp1(codegen, use_orig_params=True),
}
"""Of each kind a program that nearly has a record of it, whose layers are all rewritten."""
