"""Which nodes of a graph count as equal: value numbering of what is computed from frozen weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from dorafx.graphs.equal_values import EqualValues
from dorafx.graphs.writes import written_nodes

Q = torch.arange(12, dtype=torch.uint8).view(3, 4)
S = torch.rand(3, 1)


def _graph(function: Callable[..., Any], *args: torch.Tensor) -> fx.Graph:
    graphs = []

    def keep(gm: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(gm.graph)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=keep, fullgraph=True)(*args)
    return graphs[0]


def _results_are_equal(function: Callable[..., Any], *args: torch.Tensor) -> bool:
    graph = _graph(function, *args)
    equal = EqualValues(written_nodes(graph), lambda node: node)
    for node in graph.nodes:
        equal.follow(node, compare=True)
    one, other = graph.output_node().args[0]
    assert one is not other
    return equal.first(one) is equal.first(other)


@pytest.mark.parametrize(
    "dequantised",
    [
        lambda q, s: (q.float() - 8) * s,
        lambda q, s: (torch.stack((q & 15, q >> 4), -1).flatten(1).to(torch.float32) - 8) * s,
        lambda q, s: torch.index_select(s.view(-1), 0, q.flatten().long() % 3).view(3, 4),
        lambda q, s: torch.ops.aten.mul.Tensor(q.bitwise_and(15).to(s.dtype), s),
        lambda q, s: s[q[:, 0].long() % 3],
        lambda q, s: torch.where(q > 3, s, 2.0),
    ],
    ids=["affine", "nibbles", "codebook", "overload", "indexed", "where"],
)
def test_the_same_computation_twice(dequantised: Any) -> None:
    assert _results_are_equal(lambda q, s: (dequantised(q, s), dequantised(q, s)), Q, S)


def _under_autocast(q: torch.Tensor, s: torch.Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        one = q.float() * s
    return one, q.float() * s


@pytest.mark.parametrize(
    "program",
    [
        lambda q, s: (q.float() * s, q.float() * (s + 1)),
        lambda q, s: (s.pow(2), s.pow(3)),
        lambda q, s: (s.mul(1), s.mul(True)),
        lambda q, s: (s / 0.0, s / -0.0),
        lambda q, s: (q.double() * s, q.float() * s),
        lambda q, s: (torch.rand_like(s), torch.rand_like(s)),
        lambda q, s: (torch.bernoulli(s), torch.bernoulli(s)),
        lambda q, s: (s.new_empty(3), s.new_empty(3)),
        lambda q, s: (torch.nn.functional.dropout(s), torch.nn.functional.dropout(s)),
        lambda q, s: (s.clone().mul_(2), s.clone().mul_(2)),
        lambda q, s: (s * 2, (s.add_(1) * 2)),
        _under_autocast,
    ],
    ids=[
        "operands", "exponents", "bool", "signs of zero", "dtypes", "rand", "bernoulli", "empty", "dropout", "written",
        "written operand", "autocast",
    ],
)  # fmt: skip
def test_what_is_not_the_same(program: Any) -> None:
    assert not _results_are_equal(program, Q.clone(), S.clone())


def test_gradients_keep_results_apart() -> None:
    assert not _results_are_equal(lambda s: (s * 2, s * 2), S.clone().requires_grad_())
    assert not _results_are_equal(lambda s: (s.detach() * 2, s * 2), S.clone().requires_grad_())
