"""The model that :func:`dorafx.optimize` was called with, as its graphs need to know it when they are compiled and run."""

from __future__ import annotations

import weakref
from typing import Any

import torch

from dorafx._compat.dynamo import has_compiled_call
from dorafx.log import rewrite_log
from dorafx.scope import adapted_modules


class WholeModel:
    """Names of a model's parameters, and adapter layers that came later. It does not keep the model alive.

    Args:
        model: the model.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = weakref.ref(model)
        self._noted: set[str] = set()

    def name_of(self, parameter: Any) -> str:
        """The name of a parameter; empty for what is none of the model's."""
        model = self._model()
        named = () if model is None else model.named_parameters()
        return next((name for name, p in named if p is parameter), "")

    def note_later_layers(self) -> None:
        """Note in the log which adapter layers nothing compiles: those that an adapter was added to later, where layers are compiled by
        themselves. To be called when a graph is compiled, which a switch to that adapter leads to."""
        model = self._model()
        if model is None:
            return
        later = [name for name, _ in adapted_modules(model) if not self._is_compiled(model, name)]
        new = [name for name in later if name not in self._noted]
        if not new:
            return
        self._noted.update(new)
        shown = ", ".join(new[:8]) + (f" and {len(new) - 8} more" if len(new) > 8 else "")
        rewrite_log().add_note(
            f"{shown}: had no adapter when dorafx.optimize was called, and run as stock PEFT. Call dorafx.restore(model) and "
            "dorafx.optimize(model) once all adapters are there"
        )

    def _is_compiled(self, model: torch.nn.Module, name: str) -> bool:
        """Whether a module is compiled, or one that contains it."""
        module = model
        for part in ("", *name.split(".")):
            module = getattr(module, part) if part else module
            if has_compiled_call(module):
                return True
        return False
