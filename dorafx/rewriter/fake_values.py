"""Fake values of new nodes: what a tracer would have left on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from dorafx._compat.tensors import FakeLayout, storage_id, under
from dorafx.graphs.shapes import of_mode


class FakeValues:
    """Runs operators on fake tensors, once for operands of the same layouts: the layers of a model have few shapes, and an
    operator's shape rule costs more than all else that is done for a node."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[FakeLayout, int | None]] = {}

    def __call__(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], mode: Any) -> Any:
        """``target(*args, **kwargs)`` in the fake mode.

        Args:
            target: an operator that writes to none of its operands and draws no random numbers.
            args, kwargs: its operands, fake tensors among them.
            mode: the fake mode of the result.
        """
        operands: list[Any] = []
        key = _key(operands, (target, args, tuple(kwargs.items()), torch.is_grad_enabled()))
        known = self._known.get(key) if key is not None else None
        if known is not None and all(operand.fake_mode is mode for operand in operands):
            layout, alias = known
            return layout.made(mode, None if alias is None else operands[alias])
        with under(mode):
            args, kwargs = fx.node.map_aggregate((args, kwargs), lambda value: of_mode(value, mode))
            result = target(*args, **kwargs)
        result_layout = FakeLayout.of(result)
        if key is not None and result_layout is not None:
            storages = [storage_id(operand) for operand in operands]
            storage = storage_id(result)
            self._known[key] = result_layout, storages.index(storage) if storage in storages else None
        return result


def _key(operands: list[torch.Tensor], value: Any) -> Any:
    """A key of arguments: tensors by their layouts, other values by themselves; None if there is one of another type. The tensors are
    appended to ``operands``."""
    if isinstance(value, torch.Tensor):
        operands.append(value)
        return FakeLayout.of(value)
    if isinstance(value, (tuple, list)):
        keys = tuple(_key(operands, item) for item in value)
        return None if any(key is None for key in keys) else (type(value), keys)
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.device)) or callable(value):
        return type(value), value
    return None
