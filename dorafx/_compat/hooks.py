"""Hooks of modules inside of what Dynamo compiles."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["guard_on_hooks"]

_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)


def guard_on_hooks() -> None:
    """While Dynamo compiles a graph: have it compile again once a module of the graph gets its first hook, or the process
    its first hook of all modules.

    Dynamo guards on the hooks that it traced, but by default (``torch._dynamo.config.skip_nnmodule_hook_guards``) not on
    there being none: a hook registered after a module's first compiled call would never run. The setting is the whole
    process's and is left alone; the guards that it suppresses are added to this graph's, one C++ comparison each.
    No effect outside of a compilation.
    """
    context: Any = torch._guards.TracingContext.try_get()
    if context is None:
        return
    from torch._dynamo.guards import GuardBuilder
    from torch._dynamo.source import AttrSource
    from torch._dynamo.symbolic_convert import InstructionTranslator, tls

    guards = context.guards_context.dynamo_guards
    unguarded = getattr(GuardBuilder, "EMPTY_NN_MODULE_HOOKS_DICT", None)
    empty = [guard for guard in guards if guard.inner_create_fn() is unguarded]
    added = [guard.originating_source.make_guard(GuardBuilder.SEQUENCE_LENGTH) for guard in empty]
    if added and getattr(tls, "current_tx", None) is not None:
        module: Any = InstructionTranslator.current_tx().import_source("torch.nn.modules.module")
        added += [AttrSource(module, name).make_guard(GuardBuilder.SEQUENCE_LENGTH) for name in _GLOBAL_HOOKS]
    for guard in added:
        guards.add(guard, collect_debug_stack=False)
