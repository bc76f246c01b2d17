"""Calls of a model's blocks with a cache of keys and values.

A cache of transformers is a list of layers, and a block fills the one with its own number. A graph that does so is right for one number
and one layer of the cache, whose tensors also grow: every layer would be compiled by itself, until Dynamo's limit. So a compiled block
leaves the graph for the cache: it is given a stand-in, whose methods Dynamo calls instead of tracing them.
"""

from __future__ import annotations

import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from dorafx._compat.dynamo import call_as_it_is


def with_caches_outside(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls a compiled block.

    Args:
        compiled: called with the block and its arguments; a cache among these is replaced by its stand-in. With a cache that holds
            other caches (of an encoder and decoder) the block itself is called, as it is, with what is compiled inside of it.
    """

    def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        kind = _cache_class()
        # Where somebody compiles more than the block, the cache is theirs to trace.
        if kind is None or torch.compiler.is_compiling():
            return compiled(module, *args, **kwargs)
        caches = [value for value in (*args, *kwargs.values()) if isinstance(value, kind)]
        if not caches:
            return compiled(module, *args, **kwargs)
        if not all(_is_plain(cache, kind) for cache in caches):
            return call_as_it_is(module, *args, **kwargs)
        originals: dict[int, tuple[Any, Any]] = {}

        def stand_in(value: Any) -> Any:
            if not isinstance(value, kind):
                return value
            outside = _stand_in(value)
            originals[id(outside)] = outside, value
            return outside

        result = compiled(module, *map(stand_in, args), **{name: stand_in(value) for name, value in kwargs.items()})
        return _with_originals(result, originals)

    return call


def _cache_class() -> type | None:
    module = sys.modules.get("transformers.cache_utils")
    return None if module is None else getattr(module, "Cache", None)


def _is_plain(cache: Any, kind: type) -> bool:
    return hasattr(cache, "__dict__") and not any(isinstance(value, kind) for value in vars(cache).values())


def _stand_in(cache: Any) -> Any:
    """A cache of a subclass, on the same attributes."""
    kind = type(cache)
    if kind not in _outside:
        _outside[kind] = _methods_outside(kind)
    outside: Any = object.__new__(_outside[kind])
    outside.__dict__ = cache.__dict__
    return outside


_outside: dict[type, type] = {}


def _methods_outside(kind: type) -> type:
    """A subclass whose methods Dynamo does not trace."""
    methods = {
        name: torch.compiler.disable(method)  # type: ignore[no-untyped-call]
        for name in dir(kind)
        if not name.startswith("__")
        # Not static methods, which would become methods of the instance.
        and isinstance(method := inspect.getattr_static(kind, name), types.FunctionType)
    }
    return type(kind.__name__, (kind,), {**methods, "__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _with_originals(result: Any, originals: dict[int, tuple[Any, Any]]) -> Any:
    """What a block returns, with the caches that it was called with in place of their stand-ins."""

    def original(value: Any) -> Any:
        return originals[id(value)][1] if id(value) in originals else value

    if type(result) in (tuple, list) and any(id(value) in originals for value in result):
        return type(result)(map(original, result))
    return original(result)
