"""Operators and their schemas: which arguments they write to, and which their results may be views of."""

from __future__ import annotations

import functools
import types
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

Argument = tuple[int | None, str]
"""Where an argument stands in a call: its position (None where only a keyword gives it), and its name."""


def is_higher_order(target: Any) -> bool:
    """Whether a call target is an operator that takes graphs or kernels."""
    return isinstance(target, torch._ops.HigherOrderOperator)


_LEAVE_THEIR_OPERANDS = frozenset(
    (
        "auto_functionalized",
        "auto_functionalized_v2",
        "flex_attention",
        "flex_attention_backward",
        "out_dtype",
        "print",
        "triton_kernel_wrapper_functional",
    )
)


def leaves_its_operands(target: Any) -> bool:
    """Whether a higher-order operator without a body writes to none of its operands; the functional forms write to copies."""
    return str(target.name()) in _LEAVE_THEIR_OPERANDS


@functools.cache
def schemas(target: Any) -> tuple[Any, ...]:
    """The schema of an overload, or of all overloads of a packet; empty for any other call target."""
    if isinstance(target, torch._ops.OpOverload):
        return (target._schema,)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return tuple(getattr(target, name)._schema for name in target.overloads())  # type: ignore[no-untyped-call]
    return ()


def packet_name(target: Any) -> str | None:
    """``"add"`` for ``aten.add``, a packet of overloads; None for anything but a packet of aten."""
    if not isinstance(target, torch._ops.OpOverloadPacket) or not target._qualified_op_name.startswith("aten::"):
        return None
    return target._qualified_op_name.removeprefix("aten::")


@functools.cache
def is_function_of_its_operands(target: Any) -> bool:
    """Whether an overload, a packet of overloads, or that of a name in aten, writes nothing and gives the same result for the same
    operands. False for what is no operator."""
    if isinstance(target, str):
        target = getattr(torch.ops.aten, target, None)
    if isinstance(target, torch._ops.OpOverload):
        overloads = [target]
    elif isinstance(target, torch._ops.OpOverloadPacket):
        overloads = [getattr(target, name) for name in target.overloads()]  # type: ignore[no-untyped-call]
    else:
        return False
    return not any(
        overload._schema.is_mutable
        or torch.Tag.nondeterministic_seeded in overload.tags
        or "empty" in overload._schema.name  # memory as it was
        for overload in overloads
        if not overload._schema.name.endswith("_out") and "out" not in overload._overloadname
    )


class recorded_calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context in which the overloads that are called, below autograd, are appended to a list."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._calls.append(func)
        return func(*args, **(kwargs or {}))


def writes(target: Any) -> frozenset[Argument]:
    """The arguments that some overload of an operator, or of a torch function's operator, writes to."""
    return _aliased(target, True)


def views(target: Any) -> frozenset[Argument]:
    """The arguments whose memory an operator's results may share."""
    return _aliased(target, False)


@functools.cache
def _aliased(target: Any, written: bool) -> frozenset[Argument]:
    candidates = schemas(target)
    if not candidates and isinstance(target, types.BuiltinFunctionType):
        candidates = schemas(getattr(torch.ops.aten, target.__name__, None))
    return frozenset(
        (None if argument.kwarg_only else position, argument.name)
        for schema in candidates
        for position, argument in enumerate(schema.arguments)
        if argument.alias_info is not None
        and (argument.alias_info.is_write if written else bool(schema.returns))
        and not _is_of_a_list(schema)
    )


def _is_of_a_list(schema: Any) -> bool:
    """Whether a schema is a method of TorchScript's lists (``aten::sort.int``), which no graph of tensors calls."""
    return not schema.returns and schema.name in ("aten::sort", "aten::reverse", "aten::append", "aten::extend")


def aten_name(target: Any) -> str | None:
    """``"add"`` for ``aten.add.Tensor``; None for anything but an overload of aten."""
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    return str(target._schema.name.split("::")[1])


def is_overload(target: Any) -> bool:
    """Whether a call target is an ``OpOverload`` of any namespace."""
    return isinstance(target, torch._ops.OpOverload)


def takes_operands_for_body(target: Any) -> bool:
    """Whether a call target is a higher-order operator whose operands are the inputs of its body, so that more can be added."""
    return target in (torch.ops.higher_order.tag_activation_checkpoint, torch.ops.higher_order.invoke_subgraph)


def body_operands_start(target: Any) -> int:
    """Where the body's operands begin among the operator's arguments: ``invoke_subgraph`` has a name before them."""
    return 2 if target is torch.ops.higher_order.invoke_subgraph else 1


def is_cond(target: Any) -> bool:
    """Whether a call target is ``torch.cond``: a predicate, two bodies, and a tuple of the operands of both."""
    return target is torch.ops.higher_order.cond
