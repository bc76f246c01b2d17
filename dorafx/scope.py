"""Scope: which modules ``optimize`` compiles, and how modules of one shape come to share their graphs."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch

from dorafx.selection import Exclusion, Selection, joined

SCOPES = ("auto", "model", "blocks", "modules")

Named = list[tuple[str, torch.nn.Module]]
"""Modules and their names."""

_LISTS = (torch.nn.ModuleList, torch.nn.Sequential)
# With more kinds of blocks the time of compilation would grow with depth: each with a rank, or a probability to be dropped, of its own.
_MOST_KINDS = 8
_PLAIN = (bool, float, str, bytes, type(None), torch.dtype)
_ALL = Selection()


def adapted_modules(model: torch.nn.Module) -> Named:
    """The modules whose forward holds a DoRA computation and nothing else: adapter layers with a magnitude vector."""
    adapted = []
    for name, module in model.named_modules():
        magnitudes = getattr(module, "lora_magnitude_vector", None)
        if isinstance(magnitudes, torch.nn.Module) and any(True for _ in magnitudes.children()):
            adapted.append((name, module))
    return adapted


def adapter_layer(name: str) -> str:
    """The adapter layer that PEFT's module or parameter of a magnitude belongs to; other names as they are."""
    return name.partition(".lora_magnitude_vector")[0]


def check_scope(scope: str) -> None:
    """Raises:
    ValueError: an unknown scope."""
    if scope not in SCOPES:
        raise ValueError(f"scope: {scope!r} is not one of {', '.join(map(repr, SCOPES))}")


def resolve_scope(model: torch.nn.Module, scope: str, selection: Selection = _ALL) -> str:
    """``auto`` is ``blocks`` where the model has adapter layers inside of repeated blocks of at most eight kinds, ``modules`` where it
    has others, else ``model``.

    Args:
        model: the model.
        scope: one of ``SCOPES``.
        selection: what is left alone; blocks in which other layers are left alone are of another kind.

    Raises:
        ValueError: an unknown scope; ``modules`` or ``blocks`` for a model without such layers; ``blocks`` for one without
            blocks that contain them.
    """
    check_scope(scope)
    if scope == "model":
        return scope
    if not adapted_modules(model):
        if scope == "auto":
            return "model"
        raise ValueError(
            f'scope="{scope}" needs adapter layers with a lora_magnitude_vector, and the model has none; use scope="model"'
        )
    if scope == "modules":
        return scope
    blocks = repeated_blocks(model)
    if scope == "auto":
        return "blocks" if blocks and len(module_groups(blocks, selection)) <= _MOST_KINDS else "modules"
    if blocks:
        return scope
    raise ValueError(
        'scope="blocks" needs adapter layers inside of repeated blocks (modules of one class in a ModuleList or Sequential, or '
        'of a class that the model names in _repeated_blocks or _no_split_modules), and the model has none; use scope="modules"'
    )


@dataclass(frozen=True)
class Group:
    """Modules that share their graphs.

    Attributes:
        members: the modules and their names.
        blocks: whether they are blocks, that is contain adapter layers among other things.
    """

    members: Named
    blocks: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the modules."""
        return tuple(name for name, _ in self.members)

    @property
    def inner(self) -> frozenset[str]:
        """The names of the modules inside of each block; empty if they are no blocks."""
        return frozenset(name for name, _ in self.members[0][1].named_modules()) if self.blocks else frozenset()


def groups_of(
    model: torch.nn.Module, scope: str, adapters: Named | None = None, selection: Selection = _ALL
) -> list[Group]:
    """What to compile in a model.

    Args:
        model: the model.
        scope: as resolved.
        adapters: its adapter layers; those of :func:`adapted_modules` by default.
        selection: what is left alone. Such adapter layers are not compiled by themselves, nor are blocks that have no other; blocks that
            share their graphs have the same layers left alone.
    """
    if scope == "model":
        return [Group([entry]) for entry in entry_modules(model)]
    adapted = adapted_modules(model) if adapters is None else adapters
    adapted = [(name, module) for name, module in adapted if selection.excluded(name) is None]
    # Also those inside of blocks: where a block runs as it is, they are compiled.
    groups = [Group(members) for members in module_groups(adapted, selection)]
    if scope == "blocks":
        groups += [Group(members, True) for members in module_groups(repeated_blocks(model, adapted), selection)]
    return groups


def not_compiled(
    model: torch.nn.Module, scope: str, groups: list[Group], selection: Selection
) -> list[tuple[str, Exclusion]]:
    """The adapter layers that are in nothing that is compiled, because they are left alone: the name of each, and why."""
    if scope == "model":
        return []
    compiled = {id(inner) for group in groups for _, module in group.members for inner in module.modules()}
    reasons = [
        (name, selection.excluded(name)) for name, module in adapted_modules(model) if id(module) not in compiled
    ]
    return [(name, why) for name, why in reasons if why is not None]


def repeated_blocks(model: torch.nn.Module, adapters: Named | None = None) -> Named:
    """The outermost modules that a model repeats, and that contain adapter layers: decoder layers, transformer blocks.

    Modules of one class in a ``ModuleList`` or ``Sequential`` are repeated, and so is a module of a class that the model names in
    ``_no_split_modules`` (transformers). Where a model has ``_repeated_blocks`` (diffusers), only the classes named there are.

    Args:
        model: the model.
        adapters: its adapter layers; those of :func:`adapted_modules` by default.
    """
    adapted = {id(module) for _, module in (adapted_modules(model) if adapters is None else adapters)}
    holds = {id(m): any(id(inner) in adapted for inner in m.modules() if inner is not m) for m in model.modules()}
    blocks: Named = []
    seen: set[int] = set()

    def walk(name: str, parent: torch.nn.Module, named: frozenset[str], only: frozenset[str] | None) -> None:
        named |= frozenset(getattr(parent, "_no_split_modules", None) or ())
        own = getattr(parent, "_repeated_blocks", None)
        only = frozenset(own) if own else only
        classes = Counter(map(type, parent.children())) if isinstance(parent, _LISTS) else {}
        for child_name, child in parent.named_children():
            path = f"{name}.{child_name}" if name else child_name
            if id(child) in seen or not holds[id(child)] or id(child) in adapted:
                continue
            seen.add(id(child))
            kind = type(child)
            repeated = kind.__name__ in only if only is not None else classes.get(kind, 0) > 1 or kind.__name__ in named
            if repeated and not isinstance(child, _LISTS):
                blocks.append((path, child))
            else:
                walk(path, child, named, only)

    walk("", model, frozenset(), None)
    return blocks


def entry_modules(model: torch.nn.Module) -> Named:
    """The modules through which callers enter a model: itself, and the model inside a PEFT wrapper, whose ``generate`` the
    wrapper calls without passing through its own forward."""
    entries = [("", model)]
    unwrap = getattr(model, "get_base_model", None)
    inner = unwrap() if callable(unwrap) else None
    if isinstance(inner, torch.nn.Module) and inner is not model:
        entries += [(name, module) for name, module in model.named_modules() if module is inner]
    return entries


def module_groups(modules: Named, selection: Selection = _ALL) -> list[Named]:
    """Modules that a compiler can serve with one graph: same class, same parameter names, shapes, dtypes, devices, and the same
    switches in all that they contain. Numbers do not count: layers are numbered.

    Args:
        modules: the modules.
        selection: what is left alone; in modules of one graph it must be the same.
    """
    groups: dict[Any, Named] = {}
    for name, module in modules:
        key = (
            type(module),
            tuple((n, tuple(p.shape), p.dtype, p.device, p.requires_grad) for n, p in module.named_parameters()),
            tuple((n, tuple(b.shape), b.dtype, b.device) for n, b in module.named_buffers()),
            tuple((n, type(m), _switches(m)) for n, m in module.named_modules()),
            _excluded_inside(name, module, selection),
        )
        groups.setdefault(key, []).append((name, module))
    return list(groups.values())


def _switches(module: torch.nn.Module) -> tuple[Any, ...]:
    return tuple((name, value) for name, value in vars(module).items() if type(value) in _PLAIN)


def _excluded_inside(name: str, module: torch.nn.Module, selection: Selection) -> tuple[str, ...]:
    if not selection:
        return ()
    inner = (path for path, _ in module.named_modules(remove_duplicate=False))
    return tuple(path for path in inner if selection.excluded(joined(name, path)) is not None)
