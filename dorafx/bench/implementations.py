"""The implementations that are compared, made from one stock PEFT module each: compiled, patched or merged."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import dorafx
from dorafx._compat.inductor import inductor_backend, mode_options
from dorafx.capture.in_place import compile_in_place
from dorafx.scope import Named, groups_of

from .clock import Clock
from .models import Size, build, move_off_initial_values
from .norms import NORMS, Norm

Figures = dict[str, tuple[str, list[float]]]
"""The figures of a suite: metric -> unit and samples."""

COMPILED = {"dorafx": "dorafx", "peft-inductor": "inductor", "lora": "inductor", "merged": "inductor"}
"""The backend of each implementation that is compiled; the others run eagerly."""


@dataclass(frozen=True)
class Task:
    """One configuration, as a worker receives it.

    Attributes:
        parameters: of the case.
        autocast: fp32 adapters under ``torch.autocast`` to ``dtype``: PEFT's default, and what HF's Trainer does with bf16.
        loss_tokens: number of last tokens that logits and loss are computed for; 0 for all.
        gradients: micro-batches of an additional measurement of gradients without an optimizer step; 0 for none.
        logits: file for the last tokens' logits of a prefill, for a comparison.
        alone: called after compilation and before timing; returns when no other process uses the device.
        done: called with every figure as soon as it is measured.
    """

    name: str
    parameters: dict[str, Any]
    clock: Clock
    dtype: torch.dtype
    mode: str = "default"
    codegen: str = "inductor"
    compose: str = "auto"
    scope: str = "model"
    checkpointing: bool = False
    micro_batches: int = 1
    autocast: bool = False
    loss_tokens: int = 0
    gradients: int = 0
    logits: Path | None = None
    alone: Callable[[], None] = lambda: None
    done: Callable[[Figures], None] = lambda figures: None

    def compiled(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call``, compiled if this implementation is compiled (as one graph, or the parts that ``scope`` names), and under autocast if
        the task is."""
        return self.under_autocast(self._compiled(call))

    def under_autocast(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """``call`` under autocast if the task is; else ``call`` itself."""
        if not self.autocast:
            return call

        @functools.wraps(call)
        def cast(*args: Any, **kwargs: Any) -> Any:
            with torch.autocast(torch.device(self.clock.device).type, dtype=self.dtype):
                return call(*args, **kwargs)

        return cast

    def _compiled(self, call: Callable[..., Any]) -> Callable[..., Any]:
        backend = COMPILED.get(self.name)
        if backend is None:
            return call
        options: dict[str, Any] = {}
        if backend == "dorafx":
            settings = {"dorafx.codegen": (self.codegen, "inductor"), "dorafx.compose": (self.compose, "auto")}
            options = {key: value for key, (value, default) in settings.items() if value != default}
        mode = None if self.mode == "default" else self.mode
        if mode is not None and options:  # torch.compile takes only one of the two
            options = {**mode_options(mode), **options}
        fast: Callable[..., Any]
        if self.scope != "model" and self.name != "merged":  # merged weights have no adapter layers
            assert isinstance(call, torch.nn.Module)  # a suite that compiles models
            self.compile_in_place(call, dynamic=False)
            fast = call
        else:
            fast = torch.compile(
                call, backend=backend, dynamic=False, mode=None if options else mode, options=options or None
            )
        if mode is None:
            return fast

        @functools.wraps(call)
        def stepped(*args: Any, **kwargs: Any) -> Any:
            # With CUDA graphs, the previous call's outputs may be overwritten from here on.
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            return fast(*args, **kwargs)

        return stepped

    def compile_in_place(self, model: torch.nn.Module, dynamic: bool | None = None) -> None:
        """Compile the parts of a model that ``scope`` names, if this implementation is compiled: with ``"model"`` those that
        :func:`dorafx.optimize` chooses by itself. Plain LoRA is compiled by the same parts, in the same way."""
        mode = None if self.mode == "default" else self.mode
        scope = "auto" if self.scope == "model" else self.scope
        if self.name == "dorafx":
            dorafx.optimize(model, scope=scope, codegen=self.codegen, compose=self.compose, dynamic=dynamic, mode=mode)
        elif self.name in COMPILED:
            from peft.tuners.lora import LoraLayer

            adapters: Named = [named for named in model.named_modules() if isinstance(named[1], LoraLayer)]
            backend = inductor_backend(mode)
            for group in groups_of(model, "blocks" if scope == "auto" else scope, adapters):
                compile_in_place([layer for _, layer in group.members], backend, dynamic, group.blocks)

    def random(self, *shape: int) -> torch.Tensor:
        """Standard normal values in the task's dtype. The worker seeds the generator, so they are equal in every process."""
        return torch.randn(*shape, dtype=self.dtype, device=self.clock.device)


def build_layer(task: Task) -> torch.nn.Module:
    """PEFT's adapter layer around one ``[d_out, d_in]`` linear, without a bias."""
    from peft import LoraConfig, inject_adapter_in_model

    p = task.parameters
    torch.manual_seed(0)
    holder = torch.nn.Sequential(
        torch.nn.Linear(p["d_in"], p["d_out"], bias=False, dtype=task.dtype, device=task.clock.device)
    )
    holder.requires_grad_(False)
    lora = LoraConfig(
        r=p["rank"], lora_alpha=2 * p["rank"], use_dora=task.name != "lora", target_modules=["0"], task_type=None
    )
    # PEFT makes the factors of a half-precision layer in fp32, which is meant for autocast.
    inject_adapter_in_model(lora, holder).to(task.dtype)
    move_off_initial_values(holder)
    layer: Any = holder[0]
    if task.name == "merged":
        layer.merge()
        merged: torch.nn.Module = layer.get_base_layer()
        return merged
    return _with_norm_of(task.name, layer)


def build_model(task: Task, size: Size) -> Any:
    """The model of :func:`~dorafx.bench.models.build`, merged or with another norm if the task says so."""
    model = build(size, task.name != "lora", task.dtype, task.clock.device, task.checkpointing, task.autocast)
    if task.name == "merged":
        return model.merge_and_unload()
    return _with_norm_of(task.name, model)


def _with_norm_of(name: str, module: torch.nn.Module) -> torch.nn.Module:
    """Replace the norm of PEFT's DoRA layers in place if ``name`` is a norm; everything else stays PEFT's."""
    if name in NORMS and name != "peft":
        from peft.tuners.lora.dora import DoraLinearLayer

        for layer in module.modules():
            if type(layer) is DoraLinearLayer:
                layer.forward = functools.partial(_dora, layer, NORMS[name])  # type: ignore[method-assign]
    return module


def _dora(
    layer: Any,
    norm: Norm,
    x: torch.Tensor,
    *,
    lora_A: Any,
    lora_B: Any,
    scaling: float,
    base_layer: Any,
    base_result: torch.Tensor | None = None,
    **unused: Any,
) -> torch.Tensor:
    """What a DoRA layer adds to its base layer's output: ``(g - 1) ⊙ x·Wᵀ + g ⊙ s·x·Aᵀ·Bᵀ``, the norm without gradient."""
    weight = base_layer.weight
    with torch.no_grad():
        n = norm(weight, lora_B.weight, lora_A.weight, scaling)
    g = layer.weight / n
    if base_result is None:
        base = F.linear(x, weight)
    else:
        base = base_result if base_layer.bias is None else base_result - base_layer.bias
    added: torch.Tensor = (g - 1) * base + g * scaling * lora_B(lora_A(x))
    return added
