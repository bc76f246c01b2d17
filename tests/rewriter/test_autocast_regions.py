"""Products outside of an autocast region, or in one where autocast is off, and their composition inside of one that rounds: what is made
anew in place of such products is as exact as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dorafx
from dorafx.graphs.autocast import is_decided, regions_of, rounds_to

S = 1.5


class Layer(nn.Module):
    """In fp32; W ``[48, 64]``, rank 4."""

    def __init__(self, trained_bias: bool = False) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator))

        self.W = parameter(48, 64).requires_grad_(False)
        self.A, self.B, self.C = parameter(4, 64), parameter(48, 4), parameter(4, 4)
        self.m, self.m_in = (nn.Parameter(torch.rand(n, generator=generator) + 0.5) for n in (48, 64))
        self.b = parameter(48).requires_grad_(trained_bias)

    def scaling(self) -> torch.Tensor:
        return self.m / (self.W + S * (self.B @ self.A).detach()).norm(dim=1).detach()

    def lora(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.A), self.B)


def on(enabled: bool = True, dtype: torch.dtype = torch.bfloat16) -> Any:
    return torch.autocast("cpu", dtype, enabled=enabled)


Program = Callable[[Layer, torch.Tensor], torch.Tensor]
PROGRAMS: dict[str, Program] = {}
TWINS = ("peft", "a delta of the weight", "merged where autocast is off")
"""Of these the variants through Inductor run by default."""


def program(name: str) -> Callable[[Program], Program]:
    def register(function: Program) -> Program:
        PROGRAMS[name] = function
        return function

    return register


@program("peft")
def as_peft(p: Layer, x: torch.Tensor) -> torch.Tensor:
    base, lora, g = F.linear(x, p.W, p.b), p.lora(x), p.scaling()
    with on():
        return base + ((g - 1) * (base - p.b) + g * S * lora)


@program("where autocast is off")
def where_it_is_off(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = p.scaling()
    with on():
        with on(False):
            base, lora = F.linear(x, p.W, p.b), p.lora(x)
        return base + ((g - 1) * (base - p.b) + g * S * lora)


@program("added where autocast is off")
def added_where_it_is_off(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = p.scaling()
    with on():
        with on(False):
            y = F.linear(x, p.W, p.b) + S * p.lora(x) - p.b
        return y * g + p.b


@program("a delta of the weight")
def delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    g = p.m / adapted.norm(dim=1).detach()
    base, change = F.linear(x, p.W, p.b), F.linear(x, g[:, None] * adapted - p.W)
    with on():
        return base + change


@program("merged, a bias added")
def merged(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    y = F.linear(x, (p.m / adapted.norm(dim=1).detach())[:, None] * adapted)
    with on():
        return y + p.b


@program("merged where autocast is off")
def merged_where_it_is_off(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with on():
        with on(False):
            adapted = p.W + S * (p.B @ p.A)
            g, y = p.m / adapted.norm(dim=1).detach(), F.linear(x, adapted)
        return y * g + p.b


@program("another bias")
def another_bias(p: Layer, x: torch.Tensor) -> torch.Tensor:
    base, lora, g = F.linear(x, p.W, p.b), p.lora(x), p.scaling()
    with on():
        return g * (base - p.b + S * lora) + 2 * p.b


@program("a convolution")
def convolution(p: Layer, x: torch.Tensor) -> torch.Tensor:
    pixels = x.t()[None, :, :, None]
    W, A, B = (t[:, :, None, None] for t in (p.W, p.A, p.B))
    g = p.scaling()[None, :, None, None]
    base, lora = F.conv2d(pixels, W, p.b), F.conv2d(F.conv2d(pixels, A), B)
    with on():
        return base + ((g - 1) * (base - p.b[None, :, None, None]) + g * S * lora)


@program("an embedding")
def embedding(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    rows = x.detach()[:, 0].abs().mul(7).long().clamp(max=47)
    y = F.embedding(rows, p.W) + S * (F.embedding(rows, p.B) @ p.A)
    with on():
        return y * (p.m_in / adapted.norm(dim=0).detach())


@program("an embedding that something is added to")
def embedding_and_more(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return embedding(p, x) + x.sum() / 100


@program("experts")
def experts(p: Layer, x: torch.Tensor) -> torch.Tensor:
    weights, A, B = (torch.stack((t, t.flip(0))) for t in (p.W, p.A, p.B))
    adapted = weights + S * (B @ A)
    y = torch.bmm(x[None].expand(2, -1, -1), adapted.mT)
    with on():
        return y * (p.m / adapted.norm(dim=-1).detach())[:, None]


@program("a norm of three factors")
def norm_of_three_factors(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ (p.C @ p.A))
    base, lora = F.linear(x, p.W), F.linear(F.linear(F.linear(x, p.A), p.C), p.B)
    with on():
        return p.m / adapted.norm(dim=1).detach() * (base + S * lora) + p.b


@program("a trained norm of three factors")
def trained_norm_of_three_factors(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ (p.C @ p.A))
    with on():
        n = adapted.norm(dim=1)
    return (F.linear(x, p.W) + S * F.linear(F.linear(F.linear(x, p.A), p.C), p.B)) * (p.m / n) + p.b


@program("in a region of another dtype")
def another_dtype(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = p.scaling()
    with on(False), on(True, torch.float16), on(False):
        y = F.linear(x, p.W + S * (p.B @ p.A))
    with on():
        return y * g + p.b


@program("in a checkpoint")
def in_a_checkpoint(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with on():
        return checkpoint(merged_where_it_is_off, p, x, use_reentrant=False) * 1.0


@program("surrounded in a checkpoint")
def surrounded_in_a_checkpoint(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """The body itself enters the region where autocast is off alone."""

    def body(x: torch.Tensor) -> torch.Tensor:
        with on(False):
            adapted = p.W + S * (p.B @ p.A)
            g, y = p.m / adapted.norm(dim=1).detach(), F.linear(x, adapted)
        return y * g + p.b

    with on():
        return checkpoint(body, x, use_reentrant=False) * 1.0


def results(
    function: Callable[..., torch.Tensor], p: Layer, x: torch.Tensor, around: bool
) -> list[torch.Tensor | None]:
    with on(around):
        y = function(p, x)
    if not torch.is_grad_enabled():
        return [y]
    leaves = [x, *(t for t in p.parameters() if t.requires_grad)]
    return [y, *torch.autograd.grad(y.float().sin().sum(), leaves, allow_unused=True)]


def compare(run: Program, p: Layer, codegen: str, around: bool = False) -> None:
    """``around``: called in a region that rounds."""
    x = torch.randn(24, 64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    compiled = torch.compile(run, backend="dorafx", options={"dorafx.codegen": codegen, "dorafx.strict": True})
    for got, wanted in zip(results(compiled, p, x, around), results(run, p, x, around)):
        assert (got is None) == (wanted is None)
        if got is not None and wanted is not None:
            assert got.dtype == wanted.dtype
            assert (got - wanted).norm() < 1e-5 * wanted.norm()
    assert dorafx.rewrite_log().rewrites and not dorafx.rewrite_log().misses


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_digits_are_lost(name: str, trained: bool) -> None:
    compare(PROGRAMS[name], Layer(trained), "eager")


@pytest.mark.parametrize("name", [n if n in TWINS else pytest.param(n, marks=pytest.mark.slow) for n in PROGRAMS])
def test_no_digits_are_lost_through_inductor(name: str) -> None:
    compare(PROGRAMS[name], Layer(True), "inductor")


def compiled_in_a_region(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with on(False):
        adapted = p.W + S * (p.B @ p.A)
        g, y = p.m / adapted.norm(dim=1).detach(), F.linear(x, adapted)
    return y * g + p.b


def test_compiled_in_a_region() -> None:
    """The region is the caller's, so that the graph says nothing of it."""
    compare(compiled_in_a_region, Layer(), "eager", around=True)


def test_compiled_in_a_region_through_inductor() -> None:
    """The values alone: a backward that AOT autograd compiles rounds as its forward's caller did, with and without dorafx."""
    with torch.no_grad():
        compare(compiled_in_a_region, Layer(), "inductor", around=True)


def test_regions() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    first = graph.call_function(torch.relu, (x,))
    enter = graph.call_function(torch.amp._enter_autocast, ("cpu", torch.bfloat16, True, None))
    second = graph.call_function(torch.relu, (x,))
    off = graph.call_function(torch.amp._enter_autocast, ("cpu", None, False, None))
    third = graph.call_function(torch.relu, (x,))
    graph.call_function(torch.amp._exit_autocast, (off,))
    fourth = graph.call_function(torch.relu, (x,))
    graph.call_function(torch.amp._exit_autocast, (enter,))
    last = graph.output(first)
    regions = regions_of(graph)
    assert [regions[n] for n in (first, second, third, fourth, last)] == [(), (enter,), (enter, off), (enter,), ()]
    dtypes = [rounds_to(regions[n], "cpu") for n in (first, second, third, fourth, last)]
    assert dtypes == [None, torch.bfloat16, None, torch.bfloat16, None]
    assert [is_decided(regions[n], "cpu") for n in (first, second, third)] == [False, True, True]
    assert rounds_to(regions[second], "cuda") is None and not is_decided(regions[second], "cuda")
    with torch.autocast("cpu", torch.float16):
        assert rounds_to((), "cpu") is torch.float16
