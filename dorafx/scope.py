"""Scope: which modules ``optimize`` compiles, and how modules of one shape come to share their graphs."""

from __future__ import annotations

from typing import Any

import torch

SCOPES = ("auto", "model", "modules")


def adapted_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The modules whose forward holds a DoRA computation and nothing else: adapter layers with a magnitude vector."""
    adapted = []
    for name, module in model.named_modules():
        magnitudes = getattr(module, "lora_magnitude_vector", None)
        if isinstance(magnitudes, torch.nn.Module) and any(True for _ in magnitudes.children()):
            adapted.append((name, module))
    return adapted


def resolve_scope(model: torch.nn.Module, scope: str) -> str:
    """``auto`` is ``modules`` where the model has adapter layers that can be compiled one by one, else ``model``.

    Raises:
        ValueError: an unknown scope, or ``modules`` for a model without such layers.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope: {scope!r} is not one of {', '.join(map(repr, SCOPES))}")
    has_adapters = bool(adapted_modules(model))
    if scope == "modules" and not has_adapters:
        raise ValueError(
            'scope="modules" needs adapter layers with a lora_magnitude_vector, and the model has none; use scope="model"'
        )
    if scope == "auto":
        return "modules" if has_adapters else "model"
    return scope


def entry_modules(model: torch.nn.Module) -> list[tuple[str, torch.nn.Module]]:
    """The modules through which callers enter a model: itself, and the model inside a PEFT wrapper, whose ``generate`` the
    wrapper calls without passing through its own forward."""
    entries = [("", model)]
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else None
    if isinstance(inner, torch.nn.Module) and inner is not model:
        entries += [(name, module) for name, module in model.named_modules() if module is inner]
    return entries


def module_groups(modules: list[tuple[str, torch.nn.Module]]) -> list[list[tuple[str, torch.nn.Module]]]:
    """Modules that a compiler can serve with one graph: same class, same parameter names, shapes, dtypes, devices."""
    groups: dict[Any, list[tuple[str, torch.nn.Module]]] = {}
    for name, module in modules:
        key = (
            type(module),
            tuple((n, tuple(p.shape), p.dtype, p.device, p.requires_grad) for n, p in module.named_parameters()),
            tuple((n, tuple(b.shape), b.dtype, b.device) for n, b in module.named_buffers()),
        )
        groups.setdefault(key, []).append((name, module))
    return list(groups.values())
