"""Compiling modules in place: only the way they are called changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dorafx._compat.dynamo import block_compiler, group_compiler, set_compiled_call

from .caches import with_caches_outside

OPTIMIZED = "_dorafx_restore"
"""The attribute of an optimized model: what puts it back."""


def is_optimized(model: torch.nn.Module) -> bool:
    """Whether a model, or a part of it, has been passed to ``optimize`` and not to ``restore`` since."""
    return any(module.__dict__.get(OPTIMIZED) for module in model.modules())


def compile_in_place(
    modules: list[torch.nn.Module], backend: Callable[..., Any], dynamic: bool | None, blocks: bool
) -> list[tuple[torch.nn.Module, Any]]:
    """Compile modules that share their graphs.

    Args:
        modules: equal modules.
        backend: a Dynamo backend.
        dynamic: as for ``torch.compile``.
        blocks: whether they are blocks of a model, which fill a cache and contain what may break a graph.

    Returns:
        Each module, with what :func:`dorafx._compat.dynamo.restore_compiled_call` puts back.
    """
    compiled = with_caches_outside(block_compiler(backend, dynamic)) if blocks else group_compiler(backend, dynamic)
    return [(module, set_compiled_call(module, compiled)) for module in modules]
