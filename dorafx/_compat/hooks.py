"""Hooks and children of modules in compiled graphs."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping
from operator import itemgetter
from typing import Any

import torch
from torch.nn.modules import module as nn_module
from torch.utils.hooks import RemovableHandle

_GLOBAL_HOOKS = (
    "_global_forward_pre_hooks",
    "_global_forward_hooks",
    "_global_backward_pre_hooks",
    "_global_backward_hooks",
)
# How a dict of hooks is reached from a module: whether each step is an attribute or an item, and its name.
Step = tuple[bool, Any]
# The paths of a module's empty dicts, as a tree: a getter of those that are attributes, and the steps to more.
Tree = tuple[Callable[[Any], tuple[Any, ...]] | None, tuple[tuple[bool, Any, Any], ...]]


def has_forward_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module alone runs hooks besides its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def has_child(module: torch.nn.Module, name: str) -> bool:
    """Whether a module has a child of this name. To be traced: Dynamo guards on it by one look into a dict."""
    return name in module._modules


def guard_on_hooks() -> None:
    """While Dynamo compiles a graph: make it recompile once a module of the graph gets its first hook, or the process its first
    global module hook.

    Dynamo guards on the hooks that it traced, but by default (``torch._dynamo.config.skip_nnmodule_hook_guards``) not on their
    absence: a hook registered after a module's first compiled call would never run. The setting is global and is not changed.
    Guards on each of the dicts of hooks, six for each module, would take a quarter of the time of a small model's decoding step.
    Every registration increments ``RemovableHandle.next_id``, so one comparison for each graph is enough: if the counter has not
    changed since the module was last inspected, its dicts are still empty; else they are inspected again.

    Hooks without a registration are not noticed: those written into a module's dict directly, or those of a module that replaces
    another.

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
    empty = [guard.originating_source for guard in guards if guard.inner_create_fn() is unguarded]
    added = []
    paths: dict[Any, list[tuple[Step, ...]]] = {}
    for source in empty:
        local, path = _path_from_local(source)
        if local is None:
            added.append(source.make_guard(GuardBuilder.SEQUENCE_LENGTH))
        else:
            paths.setdefault(local, []).append(path)
    for local, paths_of_local in paths.items():
        added.append(local.make_guard(functools.partial(_no_late_hooks, paths=tuple(paths_of_local))))
    if added and getattr(tls, "current_tx", None) is not None:
        module: Any = InstructionTranslator.current_tx().import_source("torch.nn.modules.module")
        # Empty ones are inspected together with a module's own dicts.
        names = [name for name in _GLOBAL_HOOKS if not paths or getattr(nn_module, name)]
        added += [AttrSource(module, name).make_guard(GuardBuilder.SEQUENCE_LENGTH) for name in names]
    for guard in added:
        guards.add(guard, collect_debug_stack=False)


def _path_from_local(source: Any) -> tuple[Any, tuple[Step, ...]]:
    """The local variable from which a dict is reached, and the path to it; None and an empty path if it is reached otherwise."""
    from torch._dynamo.source import AttrSource, DictGetItemSource, LocalSource, NNModuleSource

    steps: list[Step] = []
    while not isinstance(source, LocalSource):
        if isinstance(source, AttrSource):
            steps.append((True, source.member))
        elif isinstance(source, DictGetItemSource) and isinstance(source.index, (str, int)):
            steps.append((False, source.index))
        elif not isinstance(source, NNModuleSource):
            return None, ()
        source = source.base
    path: list[Step] = []
    for is_attribute, key in reversed(steps):
        if path and path[-1] == (True, "__dict__"):
            path.pop()
            is_attribute = True
        path.append((is_attribute, key))
    if not path or not path[-1][0]:
        return None, ()
    return source, tuple(path)


def _no_late_hooks(builder: Any, guard: Any, *, paths: tuple[tuple[Step, ...], ...]) -> None:
    """Add the guard on the dicts of hooks that ``paths`` lead to from a local variable: a single one if the variable is a module,
    else one for each dict. The signature is that of Dynamo's guards."""
    name = guard.originating_source.local_name
    module = builder.get(guard)
    if isinstance(module, torch.nn.Module):
        check = _hook_check(name, _tree(paths))
        # At the root, which Dynamo always checks; it skips the guards below a module whose dicts are unchanged.
        add: Any = getattr(builder.guard_manager.root, "add_epilogue_lambda_guard", None)
        messages = [f"no hook of the modules under {guard.name} since this was compiled"]
        if check({name: module}) and add is not None:
            for user_stack in ((guard.user_stack,), ()):  # older versions of torch take none
                try:
                    add(check, messages, *user_stack)
                except TypeError:
                    continue
                return
    for path in paths:
        source = _source_of(guard.originating_source, path)
        builder.SEQUENCE_LENGTH(source.make_guard(type(builder).SEQUENCE_LENGTH))


def _source_of(local: Any, path: tuple[Step, ...]) -> Any:
    from torch._dynamo.source import AttrSource, DictGetItemSource

    source = local
    for is_attribute, key in path:
        source = AttrSource(source, key) if is_attribute else DictGetItemSource(source, key)
    return source


def _hook_check(name: str, tree: Tree) -> Callable[[Mapping[str, Any]], bool]:
    """A test of a frame's local variables: whether the module in the variable ``name`` still has no hook in the dicts of ``tree``, and
    no global hook was added to an empty dict.

    One graph serves many modules, so the result is cached for each as long as it lives, by identity (a module may define its own
    ``__eq__`` and ``__hash__``).
    """
    seen: dict[int, int] = {}  # id of a module -> the counter when it was last found to be without hooks
    alive: dict[int, weakref.ref[Any]] = {}
    everywhere = [getattr(nn_module, hooks) for hooks in _GLOBAL_HOOKS if not getattr(nn_module, hooks)]

    def forget(key: int) -> Callable[[Any], None]:
        def remove(_: Any) -> None:
            seen.pop(key, None)
            alive.pop(key, None)

        return remove

    def inspect_hooks(module: Any) -> bool:
        count = RemovableHandle.next_id  # before inspecting: another thread may register a hook meanwhile
        try:
            if any(everywhere) or not _all_empty(module, tree):
                return False
        except (AttributeError, KeyError, TypeError):  # a dict that is not there any more
            return False
        key = id(module)
        if key not in alive:
            alive[key] = weakref.ref(module, forget(key))
        seen[key] = count
        return True

    def check(local_variables: Mapping[str, Any]) -> bool:
        module = local_variables[name]
        return seen.get(id(module)) == RemovableHandle.next_id or inspect_hooks(module)

    return check


def _tree(paths: tuple[tuple[Step, ...], ...]) -> Tree:
    ends: list[str] = []
    after: dict[Step, list[tuple[Step, ...]]] = {}
    for first, *rest in paths:
        if rest:
            after.setdefault(first, []).append(tuple(rest))
        else:
            ends.append(first[1])
    # An itemgetter of one name returns no tuple, so the first name is given twice.
    getter = itemgetter(*ends, ends[0]) if ends else None
    return getter, tuple((*step, _tree(tuple(rests))) for step, rests in after.items())


def _all_empty(value: Any, tree: Tree) -> bool:
    # Modules store all of this in their ``__dict__``, where a look-up takes a third of the time of an attribute's.
    dicts_of, branches = tree
    if dicts_of is not None and any(dicts_of(value.__dict__)):
        return False
    for is_attribute, key, below in branches:
        if not _all_empty(value.__dict__[key] if is_attribute else value[key], below):
            return False
    return True
