"""Names by which a script can call what a graph calls."""

from __future__ import annotations

import builtins
import functools
import importlib
import math
import operator
from typing import Any

import torch

_NAMESPACES = frozenset({"aten", "prims", "dorafx"})


@functools.cache
def _names() -> dict[int, str]:
    """Path of each function that public modules have, by its id."""
    modules: list[tuple[str, Any]] = [
        ("torch.nn.functional", torch.nn.functional),
        ("torch", torch),
        ("torch.linalg", torch.linalg),
        ("torch.special", torch.special),
        ("torch.fft", torch.fft),
        ("math", math),
        ("operator", operator),
        ("torch.Tensor", torch.Tensor),
    ]
    names: dict[int, str] = {}
    for path, module in modules:
        for name in dir(module):
            value = getattr(module, name, None)
            if callable(value) and not isinstance(value, type) and not name.startswith("__"):
                names.setdefault(id(value), f"{path}.{name}")
    for name, value in vars(builtins).items():
        if callable(value) and not name.startswith("_"):
            names.setdefault(id(value), name)
    return names


def script_name(target: Any) -> str:
    """The expression by which a script with torch, and nothing else that is installed, can call a function or an operator; empty if
    there is none, as for operators that another package registers."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        namespace, _, name = str(target).partition(".")
        return f"torch.ops.{namespace}.{name}" if namespace in _NAMESPACES else ""
    known = _names().get(id(target), "")
    if known:
        return known
    module, name = getattr(target, "__module__", None) or "", getattr(target, "__qualname__", "")
    if module.partition(".")[0] != "torch" or not name.replace(".", "").isidentifier():
        return ""
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError):
        return ""
    return f"{module}.{name}" if value is target else ""


def higher_order_name(target: Any) -> str:
    """The name of an operator that takes graphs; empty for any other call target."""
    return str(target.name()) if isinstance(target, torch._ops.HigherOrderOperator) else ""  # type: ignore[no-untyped-call]


def autocast_state() -> list[tuple[str, torch.dtype]]:
    """The device types on which autocast is on here, each with its dtype."""
    return [(kind, torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]


def let_vary(tensor: torch.Tensor, dimension: int) -> None:
    """Let a dimension of an input be symbolic where the program that is compiled allows it."""
    import torch._dynamo

    torch._dynamo.maybe_mark_dynamic(tensor, dimension)


def forget_compilations() -> None:
    """Forget everything that was compiled in this process."""
    import torch._dynamo

    torch._dynamo.reset()


def numbers_of_tensors_in_graphs() -> Any:
    """A context in which Dynamo captures ``Tensor.item()``, as it does by itself for the floats that a program is called with."""
    import torch._dynamo.config as config

    return config.patch(capture_scalar_outputs=True)
