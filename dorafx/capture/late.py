"""Run a callback right after a module is imported by other code."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Sequence


class _AfterImport(importlib.abc.MetaPathFinder):
    """Finds one module with the other finders, and makes its loader call back after executing the module."""

    def __init__(self, name: str, callback: Callable[[], object]) -> None:
        self.name = name
        self.callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in list(sys.meta_path):
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: importlib.abc.Loader | None) -> None:
        execute = getattr(loader, "exec_module", None)
        if execute is None:
            return

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            vars(loader).pop("exec_module", None)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            self.callback()

        try:
            # On the instance, which is used for this module only. A loader of another type would be visible in the module's
            # __loader__ and __spec__, which the user's code may inspect.
            loader.exec_module = exec_module  # type: ignore[method-assign, union-attr]
        except AttributeError:
            return  # a loader with slots: no callback, so the caller must check sys.modules


def after_import(name: str, callback: Callable[[], object]) -> None:
    """Call ``callback()`` once, when the module ``name`` (not imported yet) has been imported.

    After a failed import the callback waits for the next attempt. The callback must not raise: the exception would reach the code
    that imports the module.
    """
    if not any(isinstance(finder, _AfterImport) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport(name, callback))
