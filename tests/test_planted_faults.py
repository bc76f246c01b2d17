"""Faults planted in dorafx itself: what would be wrong without verification is refused with it, for the true reason."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from dorafx.patterns.linear import Linear
from torch import fx

import dorafx.pipeline
from dorafx import rewrite_log
from dorafx.graphs.copying import copy_graph_module
from dorafx.lift import algebra
from dorafx.lift.lifter import Lifter
from dorafx.match import CompositionPlan, Match
from dorafx.observation import differences, observe
from dorafx.rewriter import Emitter, apply
from dorafx.rewriter.memory import Ownership

S = 0.7
FP32, FP64, BF16 = torch.float32, torch.float64, torch.bfloat16


class Layer:
    """W ``[7, 6]``, A ``[2, 6]``, B ``[7, 2]``, m ``[7]`` and a tensor that only some programs read."""

    def __init__(self, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(*shape, dtype=FP64, generator=generator).to(dtype))

        self.W = parameter(7, 6).requires_grad_(False)
        self.A, self.B, self.m, self.extra = parameter(2, 6), parameter(7, 2), parameter(7), parameter(4)

    def adapted(self) -> torch.Tensor:
        return self.W + S * (self.B @ self.A)

    def norm(self) -> torch.Tensor:
        return self.adapted().norm(dim=1).detach()

    def scaled(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
        return self.m / n * (F.linear(x, self.W) + S * F.linear(F.linear(x, self.A), self.B))


def plain(p: Layer, x: torch.Tensor) -> Any:
    return p.scaled(x, p.norm())


def differentiable(p: Layer, x: torch.Tensor) -> Any:
    return p.scaled(x, p.adapted().norm(dim=1))


def two_layers(p: Layer, x: torch.Tensor) -> Any:
    def merged() -> torch.Tensor:
        return F.linear(x, p.m[:, None] * F.normalize(p.adapted(), dim=1))

    return merged(), merged()


def zero_term(p: Layer, x: torch.Tensor) -> Any:
    return p.scaled(x, p.norm()) + 0.0 * p.extra.sum()


def reciprocal_root(p: Layer, x: torch.Tensor) -> Any:
    return F.relu(F.linear(x, p.W)) * p.m * (p.adapted() ** 2).sum(1).rsqrt()


def written_input(p: Layer, x: torch.Tensor) -> Any:
    x.add_(1.0)
    return p.scaled(x, p.norm())


def rounded_weight(p: Layer, x: torch.Tensor) -> Any:
    adapted = p.W.bfloat16().float() + S * (p.B @ p.A)
    return F.linear(x, p.m[:, None] * adapted / adapted.norm(dim=1, keepdim=True))


def from_the_left(p: Layer, x: torch.Tensor) -> Any:
    columns = x.T
    return (p.m / p.norm())[:, None] * (p.W @ columns + S * (p.B @ (p.A @ columns)))


def wide(p: Layer, x: torch.Tensor) -> Any:
    W, A, B = p.W.double(), p.A.double(), p.B.double()
    n = (W + S * (B @ A)).norm(dim=1).detach()
    return p.m.double() / n * (F.linear(x.double(), W) + S * F.linear(F.linear(x.double(), A), B))


def widened(p: Layer, x: torch.Tensor) -> Any:
    """In bf16 but for the norm."""
    n = (p.W.float() + S * (p.B.float() @ p.A.float())).norm(dim=1).detach()
    return (p.m / n * (F.linear(x, p.W) + S * F.linear(F.linear(x, p.A), p.B))).bfloat16()


Plant = Callable[[pytest.MonkeyPatch], None]


def nothing_done(place: Any, name: str, instead: Callable[..., Any]) -> Plant:
    return lambda patch: patch.setattr(place, name, instead)


def composition(change: Callable[[Emitter, fx.Node], fx.Node]) -> Plant:
    right = Linear.rewrite
    return lambda patch: patch.setattr(
        Linear, "rewrite", lambda self, m, plan, emit: change(emit, right(self, m, plan, emit))
    )


def norm(change: Callable[[Emitter, fx.Node], fx.Node]) -> Plant:
    right = apply._emit_norm
    return lambda patch: patch.setattr(apply, "_emit_norm", lambda *a: change(a[-1], right(*a)))


def norm_in_place(change: Callable[[Emitter, fx.Node], fx.Node]) -> Plant:
    right = apply._norm_in_place_of
    return lambda patch: patch.setattr(apply, "_norm_in_place_of", lambda *a: change(a[-1], right(*a)))


def no_cast_rounds(patch: pytest.MonkeyPatch) -> None:
    for module in ("lifter", "transfer.rearranged", "transfer.layout", "transfer.norms"):
        patch.setattr(importlib.import_module(f"dorafx.lift.{module}"), "loses_accuracy", lambda before, after: False)


def equal_terms_are_one(patch: pytest.MonkeyPatch) -> None:
    """Of two compositions of one term the second is the first, and gets no memory of its own."""
    right, emitted = Linear.rewrite, {}  # type: ignore[var-annotated]

    def rewrite(self: Linear, match: Match, plan: CompositionPlan, emit: Emitter) -> fx.Node:
        key = id(emit.graph), match.expr
        if key not in emitted:
            emitted[key] = right(self, match, plan, emit)
        replacement: fx.Node = emitted[key]
        return replacement

    patch.setattr(Linear, "rewrite", rewrite)
    patch.setattr(Ownership, "of", lambda self, emit, original, replacement: replacement)


def write_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = dorafx.pipeline.functional_copy

    def functional_copy(gm: fx.GraphModule) -> fx.GraphModule:
        copy, _ = copy_graph_module(right(gm))
        for node in copy.graph.find_nodes(op="call_method", target="add_"):
            node.target = "add"
            written = node.args[0]
            assert isinstance(written, fx.Node)
            written.replace_all_uses_with(node, lambda user, node=node: user is not node)
        return copy

    patch.setattr(dorafx.pipeline, "functional_copy", functional_copy)


def through(dtype: torch.dtype) -> Callable[[Emitter, fx.Node], fx.Node]:
    return lambda emit, replacement: emit.cast(emit.cast(replacement, dtype), emit.tensor(replacement).dtype)


FAULTS: dict[str, tuple[Callable[[Layer, torch.Tensor], Any], torch.dtype, Plant, str]] = {
    "outputs that are one": (
        two_layers,
        FP64,
        equal_terms_are_one,
        "output 1 shares memory with output 0",
    ),
    "zero term": (
        zero_term,
        FP64,
        nothing_done(algebra, "_remaining", lambda *a: frozenset()),
        "gradient flows differ",
    ),
    "n for 1/n": (
        reciprocal_root,
        FP64,
        norm_in_place(lambda emit, replacement: emit.call(torch.reciprocal, replacement)),
        "outputs differ",
    ),
    "write forgotten": (written_input, FP64, write_forgotten, "after the run differs"),
    "cast forgotten": (rounded_weight, FP32, no_cast_rounds, "the program's own casts, output 0 differs"),
    "dtype": (
        plain,
        FP32,
        composition(lambda emit, replacement: emit.method("double", replacement)),
        "has dtype torch.float64, not torch.float32",
    ),
    "strides": (
        from_the_left,
        FP64,
        nothing_done(apply, "laid_out_like", lambda emit, node, replacement: replacement),
        "has strides (1, 7), not (5, 1)",
    ),
    "detach forgotten": (
        plain,
        FP64,
        nothing_done(Lifter, "detached", lambda self, term: term),
        "gradients differ",
    ),
    "detach of the norm": (
        differentiable,
        FP64,
        norm(lambda emit, replacement: emit.method("detach", replacement)),
        "gradient flows differ",
    ),
    "detach": (
        plain,
        FP64,
        composition(lambda emit, replacement: emit.method("detach", replacement)),
        "gradient flows differ",
    ),
    "norm in fp32 of fp64": (wide, FP32, norm(through(FP32)), "the norm is"),
    "norm in bf16 of fp32": (plain, FP32, norm(through(BF16)), "the norm is"),
    "norm in bf16 of bf16": (widened, BF16, norm(through(BF16)), "the norm is"),
    "result in bf16 of fp32": (plain, FP32, composition(through(BF16)), "in its own dtypes, output 0 is"),
}
QUICK = ("outputs that are one", "zero term", "n for 1/n", "write forgotten", "cast forgotten", "dtype", "strides")


@pytest.mark.parametrize(
    "fault", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS]
)
def test_planted_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program, dtype, plant, reason = FAULTS[fault]
    layer, x = Layer(dtype), torch.randn(5, 6, dtype=dtype)
    compose = "auto" if dtype is BF16 else "accumulated"  # the more can go wrong
    tolerance = {FP64: 1e-9, FP32: 1e-9 if program is wide else 1e-5, BF16: 2e-2}[dtype]

    def seen(**options: Any) -> Any:
        torch._dynamo.reset()
        rewrite_log().clear()
        call = torch.compile(
            lambda value: program(layer, value),
            backend="dorafx",
            options={"dorafx.codegen": "eager", "dorafx.compose": compose, **options},
        )
        return observe(call, (x,), vars(layer))

    original = observe(lambda value: program(layer, value), (x,), vars(layer))
    assert not differences(original, seen(**{"dorafx.verify": True}), tolerance)
    assert rewrite_log().rewrites, "the right program passes"
    plant(monkeypatch)
    if dtype is not BF16:  # there the results' own rounding hides it
        assert differences(original, seen(), tolerance), "the fault shows"
    assert not differences(original, seen(**{"dorafx.verify": True}), tolerance)
    assert any(reason in record.reason for record in rewrite_log().records), rewrite_log().records
