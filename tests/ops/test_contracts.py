"""What operators tell compilers against what they do: fake results equal real ones in shape, strides, offset, dtype and device,
no result shares memory with another tensor unless the schema says so, and both kinds of kernel raise the same errors."""

from __future__ import annotations

from typing import Any

import contracts
import pytest
import torch
from contracts import DTYPES, LAYOUTS, ROWS, SIZES
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

import dorafx.ops  # noqa: F401


def operator(name: str) -> Any:
    return getattr(torch.ops.dorafx, name).default


def tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def described(tree: Any) -> list[tuple[Any, ...]]:
    """Of each tensor what a compiler knows of it. Symbolic sizes are replaced by their values."""
    return [
        (
            tuple(int(n) for n in t.shape),
            tuple(int(n) for n in t.stride()),
            int(t.storage_offset()),
            t.dtype,
            t.device.type,
        )
        for t in tensors(tree)
    ]


def storages(tree: Any) -> list[int]:
    return [t.untyped_storage()._cdata for t in tensors(tree)]


def fake(op: Any, arguments: Any, symbolic: bool) -> Any:
    mode = FakeTensorMode(shape_env=ShapeEnv() if symbolic else None)
    known: dict[int, torch.Tensor] = {}

    def converted(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return known.setdefault(id(value), mode.from_tensor(value, static_shapes=not symbolic))

    given = pytree.tree_map(converted, arguments)
    with enable_python_dispatcher(), mode:
        return described(op(*given))


def outcome(run: Any) -> Any:
    try:
        return run()
    except (ValueError, TypeError, RuntimeError) as error:
        return type(error), str(error)


def check(name: str, arguments: tuple[Any, ...], symbolic: bool) -> None:
    op = operator(name)
    # Before the real one, which may write to its arguments.
    expected = fake(op, arguments, symbolic)
    with torch.no_grad():
        out = op(*arguments)
    what = name, described(arguments), [a for a in arguments if not tensors(a)]
    assert described(out) == expected, what
    mine, theirs = storages(out), storages(arguments)
    assert len(set(mine)) == len(mine), ("results share memory", what)
    assert not set(mine) & set(theirs), ("a result is an argument", what)


def test_every_operator_has_a_row() -> None:
    assert contracts.registered() == set(ROWS)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", ROWS)
def test_fake_is_real(name: str, symbolic: bool) -> None:
    """Every size and layout, each with one dtype; operands of mixed layouts."""
    for i, size in enumerate(SIZES[i] for i in ((0, 1, 5, 9) if symbolic else range(len(SIZES)))):
        for j in range(2):
            for arguments in ROWS[name](contracts.mixed(2 * i + j), DTYPES[(i + j) % 4], size):
                check(name, arguments, symbolic)
    if not symbolic:
        for i, lay in enumerate(LAYOUTS.values()):
            for arguments in ROWS[name](lay, DTYPES[i % 4], SIZES[i % 2 * 4]):
                check(name, arguments, symbolic)


@pytest.mark.slow
@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_fake_is_real_everywhere(name: str, dtype: torch.dtype, symbolic: bool) -> None:
    for i, size in enumerate(SIZES):
        for lay in (*LAYOUTS.values(), *(contracts.mixed(100 * i + j) for j in range(10))):
            for arguments in ROWS[name](lay, dtype, size):
                check(name, arguments, symbolic)
