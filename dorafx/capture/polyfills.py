"""Traceable equals of functions of PEFT that Dynamo cannot trace."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["make_cache_clear", "make_dequantize_module_weight", "make_transpose"]


def make_dequantize_module_weight(original: Callable[..., Any]) -> Callable[..., Any]:
    """A traceable ``dequantize_module_weight(module)``.

    The original asks a type for its ``__module__``, which Dynamo cannot. The common cases, a plain parameter or tensor
    and HQQ, are answered here; everything else (torchao, bitsandbytes, a weight of a wrong type) goes through a copy of
    the original, so each of its branches keeps doing what the installed version does.
    """
    # A copy: the original function object itself is what Dynamo replaces.
    assert isinstance(original, types.FunctionType)
    untouched = types.FunctionType(original.__code__, original.__globals__, original.__name__, original.__defaults__)

    def dequantize_module_weight(module: torch.nn.Module) -> Any:
        if hasattr(module, "W_q"):
            return module.dequantize()  # type: ignore[operator]
        weight = module.weight
        if type(weight) is torch.nn.Parameter or type(weight) is torch.Tensor:
            return weight
        return untouched(module)

    return dequantize_module_weight


def make_cache_clear(original: Callable[..., Any]) -> Callable[..., Any]:
    """A traceable ``_cache_clear(self)`` of a DoRA layer, equal to the original in every state.

    The original clears a dict at every forward without caching. The dict is empty then, but the mutation alone keeps
    Dynamo from tracing a checkpointed body. Here an empty dict is left alone and a filled one cleared as ever.
    """

    @functools.wraps(original)
    def _cache_clear(self: Any) -> None:
        if len(self._dora_cache) != 0:
            self._dora_cache.clear()

    return _cache_clear


def make_transpose(original: Callable[..., Any]) -> Callable[..., Any]:
    """A traceable ``transpose(weight, fan_in_fan_out)`` for layers that keep their weight as ``[d_in, d_out]``.

    The original makes a new ``Parameter`` of a transposed parameter, which Dynamo cannot trace, and which is a leaf: no
    gradient flows through it to the weight. ``detach`` is the same cut.
    """

    def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
        if not fan_in_fan_out:
            return weight
        if isinstance(weight, torch.nn.Parameter):
            return weight.detach().T
        return weight.T

    return transpose
