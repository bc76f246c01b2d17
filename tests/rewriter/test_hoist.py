"""The norm prologue: which norms leave the graph, which stay, and that the result is the same either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import assert_close, captured_graph, peft_perceptron
from torch import fx, nn
from torch.nn import functional as F

import dorafx
from dorafx import rewrite_log
from dorafx.options import Options
from dorafx.pipeline import rewrite_graph


class Layer(nn.Module):
    """A DoRA layer from scratch; ``norm`` computes the row norm of a formed weight."""

    def __init__(self, norm: Callable[[torch.Tensor], torch.Tensor], d_out: int = 12, d_in: int = 10) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d_out, d_in, dtype=torch.float64), requires_grad=False)
        self.a = nn.Parameter(torch.randn(3, d_in, dtype=torch.float64))
        self.b = nn.Parameter(torch.randn(d_out, 3, dtype=torch.float64))
        self.m = nn.Parameter(torch.rand(d_out, dtype=torch.float64) + 0.5)
        self.norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = self.norm(self.weight + 0.5 * self.b @ self.a)
        return self.m / n * (F.linear(x, self.weight) + 0.5 * F.linear(F.linear(x, self.a), self.b))


def detached(w: torch.Tensor) -> torch.Tensor:
    return w.norm(dim=1).detach()


def differentiable(w: torch.Tensor) -> torch.Tensor:
    return w.norm(dim=1)


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(call: Callable[..., torch.Tensor], model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    leaves = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(call(x).sin().sum(), leaves))


def check(model: nn.Module, x: torch.Tensor, codegen: str = "eager") -> None:
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="dorafx", fullgraph=True, options={"dorafx.codegen": codegen, "dorafx.strict": True}
    )
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-12, atol=1e-12)
    for actual, expected in zip(gradients(compiled, model, x), gradients(model, model, x)):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def placements() -> list[str]:
    return [r.norm_placement for r in rewrite_log().rewrites]


@pytest.mark.parametrize("codegen", ["eager", "aot_eager", "inductor"])
def test_detached_norm_leaves(codegen: str) -> None:
    check(Layer(detached), x_of(20, 10), codegen)
    assert set(placements()) == {"prologue"}
    assert (rewrite_log().norms.computed, rewrite_log().norms.reused) == (1, 1), "one of two forwards, equal in content"


@pytest.mark.parametrize("codegen", ["eager", "aot_eager"])
def test_differentiable_norm_stays(codegen: str) -> None:
    check(Layer(differentiable), x_of(20, 10), codegen)
    assert set(placements()) == {"graph"}
    assert rewrite_log().norms.computed == 0


def test_differentiable_norm_leaves_where_nothing_is_trained() -> None:
    model = Layer(differentiable)
    model.a.requires_grad_(False)
    model.b.requires_grad_(False)
    check(model, x_of(20, 10))
    assert set(placements()) == {"prologue"}


def test_norm_of_a_changed_weight_stays() -> None:
    """The weight is an input of the graph, and the graph scales it first: the norm is not one of the inputs alone."""

    class Scaled(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            w = torch.tanh(self.weight)
            n = (w + 0.5 * self.b @ self.a).norm(dim=1).detach()
            return self.m / n * (F.linear(x, w) + 0.5 * F.linear(F.linear(x, self.a), self.b))

    check(Scaled(detached), x_of(20, 10))
    assert set(placements()) == {"graph"}


def test_norm_of_a_written_factor_stays_right() -> None:
    class Written(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                self.weight.mul_(1.001)
            return super().forward(x)

    ours, stock = Written(detached), Written(detached)
    stock.load_state_dict(ours.state_dict())
    compiled = torch.compile(ours, backend="dorafx", options={"dorafx.codegen": "eager"})
    for _ in range(3):
        torch.testing.assert_close(compiled(x_of(20, 10)), stock(x_of(20, 10)), rtol=1e-12, atol=1e-12)


def test_new_inputs_follow_the_users() -> None:
    model = peft_perceptron()
    gm = captured_graph(model, torch.randn(3, 5, 24))
    before = [n.name for n in gm.graph.nodes]
    program = rewrite_graph(gm, Options(strict=True), prologue=True)
    assert [n.name for n in gm.graph.nodes] == before, "the caller's graph is not touched"
    inputs = [n for n in program.graph.graph.nodes if n.op == "placeholder"]
    assert len(inputs) == len([n for n in gm.graph.nodes if n.op == "placeholder"]) + 2
    assert [tuple(t.shape) for t in program.norm_values] == [(48,), (24,)]
    assert not any(t.requires_grad for t in program.norm_values)
    assert len({norm.signature for norm in program.norms}) == 1, "equal layers share their code"
    assert not program.few_tokens


def test_graphs_that_others_compile_keep_their_norms() -> None:
    model = peft_perceptron()
    x = torch.randn(3, 5, 24)
    gm = captured_graph(model, x)
    new = rewrite_graph(gm, Options(strict=True)).graph
    assert sum("row_norm" in str(n.target) for n in new.graph.nodes) == 2
    assert set(placements()) == {"graph"}
    exported = torch.export.export(model, (x,))
    assert_close(dorafx.rewrite(exported).module()(x), model(x), 1e-5)


class Both(nn.Module):
    """One module with two DoRA computations: gradients flow through the norm of one, not of the other."""

    def __init__(self, first: Callable[..., Any], second: Callable[..., Any]) -> None:
        super().__init__()
        one, other = Layer(first, 10, 10), Layer(second, 10, 10)
        self.norms = first, second
        for name, parameter in one.named_parameters():
            self.register_parameter(f"one_{name}", parameter)
        for name, parameter in other.named_parameters():
            self.register_parameter(f"other_{name}", parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name, norm in zip(("one", "other"), self.norms):
            w, a, b, m = (getattr(self, f"{name}_{part}") for part in ("weight", "a", "b", "m"))
            x = m / norm(w + 0.5 * b @ a) * (F.linear(x, w) + 0.5 * F.linear(F.linear(x, a), b))
        return x


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("order", [(detached, differentiable), (differentiable, detached)])
def test_each_record_tells_the_place_of_its_own_norm(order: tuple[Any, Any], codegen: str) -> None:
    """Two norms of one module, of which one leaves the graph."""
    check(Both(*order), x_of(20, 10), codegen)
    expected = ["prologue" if norm is detached else "graph" for norm in order]
    assert placements() == expected


@pytest.mark.parametrize("order", [(detached, differentiable), (differentiable, detached)])
def test_places_of_norms_in_a_body(order: tuple[Any, Any]) -> None:
    """The atoms of a body are numbered by themselves: another graph's norm of the same number is another norm."""
    outer, inner = Both(*order), Both(*reversed(order))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.outer, self.inner = outer, inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.utils.checkpoint.checkpoint(self.inner, self.outer(x), use_reentrant=False)

    check(Model(), x_of(20, 10), "aot_eager")
    placed = {site: [r.norm_placement for r in rewrite_log().rewrites if r.site == site] for site in ("outer", "inner")}
    expected = ["prologue" if norm is detached else "graph" for norm in order]
    assert placed == {"outer": expected, "inner": expected[::-1]}


def test_regions() -> None:
    """A body that several calls share takes the norm of each as an operand."""

    @torch.compiler.nested_compile_region
    def region(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer(x)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(detached, 10, 10) for _ in range(3))
            self.shift = nn.Parameter(torch.zeros(10, dtype=torch.float64))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.shift
            for layer in self.layers:
                x = region(layer, x).tanh()
            return x

    model = Model()
    gm = captured_graph(model, x_of(20, 10))
    bodies = [child for child in gm.children() if isinstance(child, fx.GraphModule)]
    assert bodies, "Dynamo made no region of it"
    program = rewrite_graph(gm, Options(strict=True), prologue=True)
    assert len(program.norms) == 3
    check(model, x_of(20, 10), "aot_eager")
    assert set(placements()) == {"prologue"}


def test_the_body_of_a_checkpoint_reads_its_norm_from_outside() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(detached, 10, 10) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)
            return x

    check(Model(), x_of(20, 10), "aot_eager")
    assert placements() == ["prologue"] * 3
    # One forward for the outputs, and one for the gradients, which has the same contents; the recomputation takes what the forward had.
    assert (rewrite_log().norms.computed, rewrite_log().norms.reused) == (3, 3)


def test_new_inputs_are_not_mixed_up_with_variables_of_their_names() -> None:
    """Two norms, by row and by column of a square weight, in programs whose values have the names of new inputs."""

    class Unnamed(Layer):  # the tracer calls the values norm and norm_1
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            adapted = self.weight + self.b @ self.a
            r, c = adapted.norm(dim=1).detach(), adapted.norm(dim=0).detach()
            return F.linear(x, adapted / r[:, None]) * self.m + F.linear(x, adapted) / c

    class Named(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            adapted = self.weight + self.b @ self.a
            outer_norm, outer_norm_1 = adapted.norm(dim=1).detach(), adapted.norm(dim=0).detach()
            outer_norm_2 = outer_norm * 2
            return F.linear(x, adapted / outer_norm_2[:, None]) * self.m + F.linear(x, adapted) / outer_norm_1

    for kind in (Unnamed, Named):
        rewrite_log().clear()
        check(kind(detached, 8, 8), x_of(4, 8))
        assert len({(r.norm_placement, r.norm_algorithm) for r in rewrite_log().rewrites}) == 1
        assert {r.norm_placement for r in rewrite_log().rewrites} == {"prologue"}


def test_a_number_that_is_read_behind_a_write_stays() -> None:
    """With dynamic shapes numbers are read from tensors; one that the graph changes first is not what its input held."""

    class Read(Layer):
        def __init__(self, writes: bool) -> None:
            super().__init__(detached)
            self.s = nn.Parameter(torch.tensor(0.5, dtype=torch.float64), requires_grad=False)
            self.writes = writes

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.writes:
                self.s.mul_(2)
            s = self.s.item()
            n = (self.weight + s * (self.b @ self.a)).norm(dim=1).detach()
            return self.m / n * (F.linear(x, self.weight) + s * F.linear(F.linear(x, self.a), self.b))

    for writes in (False, True):
        rewrite_log().clear()
        torch._dynamo.reset()
        ours, stock = Read(writes), Read(writes)
        stock.load_state_dict(ours.state_dict())
        with torch._dynamo.config.patch(capture_scalar_outputs=True):
            compiled = torch.compile(ours, backend="dorafx", fullgraph=True, options={"dorafx.codegen": "eager"})
            for _ in range(3):
                torch.testing.assert_close(compiled(x_of(1, 10)), stock(x_of(1, 10)), rtol=1e-12, atol=1e-12)
        assert placements() == ["graph" if writes else "prologue"]
