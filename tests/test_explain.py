"""The dry run: what it prints, in colour and plain, and what it says of graph breaks."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

import dorafx
from dorafx import Record, RewriteLog
from dorafx.explanation import Explanation, GraphBreak, graph_breaks_of


class Layer(nn.Module):
    def __init__(self, squashed: bool = False) -> None:
        super().__init__()
        self.squashed = squashed
        self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
        self.m = nn.Parameter(self.weight.norm(dim=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        delta = self.b @ self.a
        norm = (self.weight + (torch.tanh(delta) if self.squashed else delta)).norm(dim=1).detach()
        return self.m / norm * (F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer() for _ in range(32)])
        self.head = Layer(squashed=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        print("a graph break")
        return self.head(x)


def test_the_whole_answer() -> None:
    before = dorafx.rewrite_log().records
    found = dorafx.explain(Model(), torch.randn(3, 8))
    assert (found.graph_count, found.graph_break_count) == (2, 1)
    assert (len(found.rewrites), len(found.misses)) == (32, 1)
    assert dorafx.rewrite_log().records == before

    text = str(found)
    assert "2 graphs, 1 graph break\n" in text
    header, row, total = text.splitlines()[1:4]
    assert header.split() == (
        [
            "module",
            "x",
            "pattern",
            "shape",
            "rank",
            "dtype",
            "dense",
            "avoided",
            "norm",
            "FLOPs",
            "after",
            "norm",
            "codegen",
        ]
    )
    # 32 layers: one dense sum and one dense product of 256 bytes each; 2·8·8·2 FLOPs a norm, before and after.
    assert row.split("  ")[0] == "layers.*"
    assert (
        re.sub(r" {2,}", "|", row.strip()) == "layers.*|32|linear|8 x 8|2|float32|16 KiB|8.19 k|8.19 k|tiled|inductor"
    )
    assert re.sub(r" {2,}", "|", total.strip()) == "total|32|16 KiB|8.19 k|8.19 k"
    assert f"missed  head: operator tanh at {__file__}:" in text
    assert "what to do: The delta inside the norm is no low-rank product" in text
    assert "\x1b" not in text

    (cause,) = found.breaks
    assert "print" in cause.explanation
    assert cause.code == 'print("a graph break")'
    assert cause.source.startswith(f"{__file__}:")
    assert cause.function == "forward"
    assert cause.hints and not any("report an issue" in hint for hint in cause.hints)
    assert f'graph break  in forward: {cause.reason}, at `print("a graph break")` [{cause.source}]' in text
    assert "what to do: Avoid calling builtin `print`" in text


def test_colours_on_a_terminal_only() -> None:
    found = Explanation(1, [GraphBreak("r", source="f.py:1")], RewriteLog())
    found.log.add(Record("missed", "block[0]", reason="why [bold]", source="f.py:2"))
    terminal = io.StringIO()
    Console(file=terminal, force_terminal=True, color_system="standard", width=200).print(found)
    assert "\x1b[1;31mmissed" in terminal.getvalue()
    assert "block[0]: why [bold]" in terminal.getvalue()
    plain = io.StringIO()
    found.print(plain)
    assert plain.getvalue() == f"{found}\n"
    found.log.print(plain)
    assert "\x1b" not in plain.getvalue()


def test_what_dynamo_repeats_is_said_once() -> None:
    from traceback import FrameSummary

    inside = f"{torch.__path__[0]}/nn/modules/module.py"
    stack = [FrameSummary("a.py", 3, "run", line="model(x)"), FrameSummary(inside, 9, "call", line="call()")]
    reason = "Unsupported\n  Explanation: because.\n  Hint: do this.\n  Hint: Please report an issue to PyTorch.\n"
    nested = f"{reason}\n*** While handling this graph break, another graph break occurred: ***\n\n  Hint: other."
    found = graph_breaks_of([(reason, stack), (nested, stack), (reason, [])])
    assert [b.source for b in found] == ["a.py:3", ""]
    assert found[0].hints == ("do this.",)
    assert (found[0].reason, found[0].explanation) == ("Unsupported", "because.")
    assert Explanation(1, found).graph_break_count == 1  # around the only graph
    assert Explanation(1).graph_break_count == 0
    assert Explanation(3).graph_break_count == 2


def test_nothing_found_is_said() -> None:
    assert "no DoRA computation was found" in str(dorafx.explain(nn.Linear(3, 3), torch.randn(2, 3)))


@pytest.mark.parametrize("function", [dorafx.explain, dorafx.verify])
def test_what_cannot_be_called_is_said(function: Any) -> None:
    with pytest.raises(TypeError, match=r"takes an nn.Module or a function, not int"):
        function(3)


def test_narrow_terminals_get_lines_instead_of_columns() -> None:
    log = RewriteLog()
    site = "base_model.model.model.layers.{}.self_attn.q_proj"
    log.extend(Record("rewritten", site.format(i), "linear", d_out=64, d_in=32, rank=4) for i in range(3))
    for width, wide in ((90, False), (160, True)):
        terminal = io.StringIO()
        Console(file=terminal, width=width, color_system=None).print(log)
        text = terminal.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert ("module  " in text) == wide
        assert ("base_model.model.model.layers.*.self_attn.q_proj x 3\n  linear 64 x 32 rank 4" in text) == (not wide)
