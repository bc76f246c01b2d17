"""Memory that a graph fills by rows is the concatenation of what is written; wherever anybody could tell, the writes stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from dorafx.graphs.filled import without_filled_zeros

X = torch.arange(24).reshape(6, 4)


def _all_rows(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty((12, 4), dtype=torch.float32)
    out[:6] = x & 3
    out[6:] = x >> 2
    return out * 2


def _all_rows_in_other_order(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    out[4:] = x[:2]
    out[:4] = x[2:]
    return out + 1


def _zeros_of_another_dtype(x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros((9, 4), dtype=torch.float64)
    out[2:8] = x
    return out * 2


def _integers_of_floats(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty((6, 4), dtype=torch.int64)
    out[:6] = x * 0.7
    return out


def _some_rows(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty((12, 4), dtype=torch.int64)
    out[:6] = x
    return out[:6]


def _rows_twice(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty((6, 4), dtype=torch.int64)
    out[:6] = x
    out[2:4] = x[:2] + 100
    return out


def _added(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty((6, 4), dtype=torch.int64)
    out[:6] += x
    return out.fill_(1)


def _read_before(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty((12, 4), dtype=torch.int64)
    out[:6] = x
    first = out[:6].sum()
    out[6:] = x + first
    return out


def _changed_source(x: torch.Tensor) -> torch.Tensor:
    part = x + 1
    out = torch.empty((6, 4), dtype=torch.int64)
    out[:6] = part
    part.zero_()
    return out + part


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    part = x.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last)
    out = torch.empty((2, 2, 3, 4), dtype=torch.int64)
    out[:1] = part
    out[1:] = part
    return out.view(2, 24)


def _under_autocast_to_another_half(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        out = torch.empty((12, 4), dtype=torch.float16)
        out[:6] = x
        out[6:] = x
        return out + 1


def traced(program: Callable[[torch.Tensor], torch.Tensor]) -> fx.GraphModule:
    graphs: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    torch.compile(program, backend=backend, fullgraph=True)(X.clone())
    return graphs[0]


@pytest.mark.parametrize("program", [_all_rows, _all_rows_in_other_order, _zeros_of_another_dtype, _integers_of_floats])
def test_filled_by_rows(program: Callable[[torch.Tensor], torch.Tensor]) -> None:
    gm = traced(program)
    assert without_filled_zeros(gm.graph)
    gm.graph.lint()
    gm.recompile()
    (found,) = gm(X.clone())
    wanted = program(X.clone())
    assert torch.equal(found, wanted) and found.dtype == wanted.dtype
    assert "setitem" not in str(gm.graph)
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if node.op != "placeholder" and node.target is torch.cat:
            assert value.dtype == wanted.dtype


@pytest.mark.parametrize(
    "program",
    [
        _some_rows,
        _rows_twice,
        _added,
        _read_before,
        _changed_source,
        _channels_last,
        _under_autocast_to_another_half,
    ],
)
def test_not_told_from_the_writes(program: Callable[[torch.Tensor], torch.Tensor]) -> None:
    gm = traced(program)
    before = str(gm.graph)
    assert not without_filled_zeros(gm.graph)
    assert str(gm.graph) == before


def test_called_under_autocast_to_another_half() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty((12, 4), dtype=torch.float16)
        out[:6] = x
        out[6:] = x
        return out + 1

    gm = traced(program)
    with torch.autocast("cpu", torch.bfloat16):
        assert not without_filled_zeros(gm.graph)
    assert without_filled_zeros(gm.graph)
