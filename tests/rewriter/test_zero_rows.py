"""The option ``zero_rows``: a row of the adapted weight whose norm is zero. By default it gives what the program computes; with ``"finite"``
it gives 0 and the bias, all gradients are finite, and every other row is what it would be in a layer without that row."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import dorafx
from dorafx.options import Options
from dorafx.pipeline import rewrite_graph
from dorafx.rewriter import guard_zero_norms

ROW = 3


class Layer(nn.Module):
    """DoRA, in one of the spellings below, of a weight with a row of zeros."""

    def __init__(self, spelling: Callable[..., Any], dtype: torch.dtype = torch.float32, zeros: bool = True) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)

        def some(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=g).to(dtype)

        self.weight = nn.Parameter(some(10, 12), requires_grad=False)
        self.a, self.b = nn.Parameter(some(4, 12)), nn.Parameter(some(10, 4))
        self.m, self.bias = nn.Parameter(some(10).abs() + 0.5), nn.Parameter(some(10))
        self.spelling = spelling
        if zeros:
            with torch.no_grad():
                self.weight[ROW], self.b[ROW] = 0, 0

    def forward(self, x: torch.Tensor) -> Any:
        return self.spelling(self, x)

    def without_the_row(self) -> Layer:
        reduced = copy.deepcopy(self)
        rows = [i for i in range(10) if i != ROW]
        for name in ("weight", "b", "m", "bias"):
            old = getattr(self, name)
            setattr(reduced, name, nn.Parameter(old.detach()[rows].clone(), requires_grad=old.requires_grad))
        return reduced

    @property
    def adapted(self) -> torch.Tensor:
        return self.weight + 0.5 * (self.b @ self.a)

    def lora(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * F.linear(F.linear(x, self.a), self.b)


GUARDED = 'zero_rows="finite": what is divided by this norm is 0 where the norm is 0'
NOT_GUARDED = 'zero_rows="finite": no division by this norm was found that could be guarded'

SPELLINGS: dict[str, Callable[[Layer, torch.Tensor], torch.Tensor]] = {}


def spelling(f: Callable[[Layer, torch.Tensor], torch.Tensor]) -> Callable[[Layer, torch.Tensor], torch.Tensor]:
    SPELLINGS[f.__name__] = f
    return f


@spelling
def direct(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = p.adapted.norm(dim=1).detach()
    return p.m / n * (F.linear(x, p.weight) + p.lora(x)) + p.bias


@spelling
def delta_form(p: Layer, x: torch.Tensor) -> torch.Tensor:
    base = F.linear(x, p.weight, p.bias)
    g = (p.m / torch.linalg.norm(p.adapted, dim=1).detach()).view(1, -1)
    return base + (g - 1) * (base - p.bias) + g * p.lora(x)


@spelling
def other_input_for_the_adapter(p: Layer, x: torch.Tensor) -> torch.Tensor:
    dropped = x * 0.75
    g = (p.m / torch.linalg.norm(p.adapted, dim=1).detach()).view(1, -1)
    return F.linear(x, p.weight, p.bias) + (g - 1) * F.linear(dropped, p.weight) + g * p.lora(dropped)


@spelling
def differentiable(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m / p.adapted.norm(dim=1) * (F.linear(x, p.weight) + p.lora(x)) + p.bias


@spelling
def merged_weight(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.m[:, None] * p.adapted / p.adapted.norm(dim=1, keepdim=True), p.bias)


@spelling
def root_of_squares(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = p.m * p.adapted.square().sum(1).detach().rsqrt()
    return g * (F.linear(x, p.weight) + p.lora(x)) + p.bias


@spelling
def reciprocal(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = p.m * p.adapted.norm(dim=1).detach().reciprocal()
    return g * (F.linear(x, p.weight) + p.lora(x)) + p.bias


@spelling
def only_the_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """A composition that no form has, with a quotient that stays the program's own."""
    n = p.adapted.norm(dim=1).detach()
    return torch.sin(x @ p.weight.T / n) * p.m + p.bias


@spelling
def only_the_norm_as_a_power(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.adapted.norm(dim=1) * 2.0).view(1, -1)
    return torch.sin((x @ p.weight.T) * n**-1.0) * p.m + p.bias


@spelling
def only_the_norm_in_addcdiv(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = p.adapted.norm(dim=1).detach()
    return torch.addcdiv(p.bias, torch.sin(x @ p.weight.T), n.expand(len(x), -1), value=0.5) + 0 * p.m.sum()


def _scaled(p: Layer, x: torch.Tensor, g: torch.Tensor) -> torch.Tensor:
    return g * (F.linear(x, p.weight) + p.lora(x)) + p.bias


@spelling
def differentiable_root(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m / p.adapted.square().sum(1).sqrt() * (F.linear(x, p.weight) + p.lora(x)) + p.bias


@spelling
def differentiable_reciprocal_root(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return _scaled(p, x, p.m * p.adapted.square().sum(1).rsqrt())


@spelling
def differentiable_power(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return _scaled(p, x, p.m * p.adapted.pow(2).sum(1) ** -0.5)


@spelling
def differentiable_power_of_half(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return _scaled(p, x, p.m / (p.adapted * p.adapted).sum(1).pow(0.5))


@spelling
def differentiable_root_reciprocal(p: Layer, x: torch.Tensor) -> torch.Tensor:
    v = p.adapted
    return _scaled(p, x, p.m * (v * v).sum(1).sqrt().reciprocal())


@spelling
def differentiable_einsum(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return _scaled(p, x, p.m * torch.einsum("ij,ij->i", p.adapted, p.adapted).rsqrt())


@spelling
def only_the_norm_and_roots_of_it(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = p.adapted.norm(dim=1)
    return torch.sin(x @ p.weight.T) / ((n * n).sqrt().sqrt() * n.float_power(0.25).float()) * p.m + p.bias


def _only(p: Layer, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return torch.sin(x @ p.weight.T) / n * p.m + p.bias


@spelling
def only_the_norm_in_chunks(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = p.adapted.norm(dim=1)
    first, second = n.chunk(2)
    third, fourth = n.split([4, len(n) - 4])
    g = torch.cat([1 / first, second.reciprocal()])
    return torch.sin(x @ p.weight.T) * (g + torch.cat([1 / third, 1 / fourth])) * p.m + p.bias


@spelling
def only_the_norm_joined(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = p.adapted.norm(dim=1)
    pairs = torch.stack([n, torch.cat([n[:2], n[2:]])])
    rows = torch.stack(pairs.unbind(1))
    return _only(p, x, rows.sum(1) * 0 + rows[:, 0]) if rows.dim() == 1 else _only(p, x, rows[:, 1])


@spelling
def only_the_norm_moved(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = p.adapted.norm(dim=1)
    order = torch.arange(len(p.m))
    return _only(p, x, n.flip(0).roll(2).roll(-2).flip(0).index_select(0, order)[order].repeat(2)[: len(p.m)])


@spelling
def only_the_norm_in_bounds(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = p.adapted.norm(dim=1)
    n = torch.relu(n.clamp(max=100.0).clamp_min(0).clamp(0.0, 50.0))
    return _only(p, x, torch.maximum(n, torch.zeros_like(n)))


@spelling
def only_the_norm_from_outside_of_a_checkpoint(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = p.adapted.norm(dim=1)
    return checkpoint(lambda t: _only(p, t, n), x, use_reentrant=False)  # type: ignore[no-any-return]


@spelling
def only_the_norm_out_of_a_checkpoint(p: Layer, x: torch.Tensor) -> torch.Tensor:
    def body(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.sin(t @ p.weight.T), p.adapted.norm(dim=1)

    y, n = checkpoint(body, x, use_reentrant=False)
    return y / n * p.m + p.bias


@spelling
def only_the_norm_in_branches(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = p.adapted.norm(dim=1)
    # The predicate has both values for the inputs of these tests.
    return (
        torch.cond(  # type: ignore[no-any-return]
            x.shape[0] * x.new_ones(()) > 2,
            lambda t: torch.sin(F.linear(t, p.weight)) / n,
            lambda t: torch.sin(F.linear(t, p.weight)) * n**-1,
            (x,),
        )
        * p.m
        + p.bias
    )


@spelling
def only_the_norm_out_of_branches(p: Layer, x: torch.Tensor) -> torch.Tensor:
    def branch(factor: float) -> Callable[..., torch.Tensor]:
        return lambda w, b, a: (w + 0.5 * (b @ a)).norm(dim=1) * factor

    several = x.shape[0] * x.new_ones(()) > 2
    return _only(p, x, torch.cond(several, branch(2.0), branch(2), (p.weight, p.b, p.a)))


@spelling
def checkpointed(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda t: torch.sin(direct(p, t) - p.bias), x, use_reentrant=False) + p.bias  # type: ignore[no-any-return]


def compiled(module: nn.Module, codegen: str, **options: Any) -> Any:
    torch._dynamo.reset()
    named = {f"dorafx.{name}": value for name, value in {"codegen": codegen, "zero_rows": "finite", **options}.items()}
    return torch.compile(module, backend="dorafx", options=named)


def check_finite(layer: Layer, run: Any, tolerance: float = 2e-5) -> None:
    reduced = layer.without_the_row()
    rows = [i for i in range(10) if i != ROW]
    for tokens in (1, 5):
        x = torch.randn(tokens, 12, generator=torch.Generator().manual_seed(tokens)).to(layer.weight)
        x, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        layer.zero_grad()
        reduced.zero_grad()
        y, expected = run(x), reduced(other)
        assert torch.equal(y[:, ROW], layer.bias[ROW].expand(tokens))
        torch.testing.assert_close(y[:, rows], expected, rtol=tolerance, atol=tolerance)
        y.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(x.grad, other.grad, rtol=10 * tolerance, atol=10 * tolerance)
        for name, p in reduced.named_parameters():
            if p.grad is None:
                continue
            grad = dict(layer.named_parameters())[name].grad
            assert grad is not None and grad.isfinite().all(), name
            if name in ("m", "b"):
                assert not grad[ROW].any(), name
            grad = grad if name == "a" else grad[rows]
            torch.testing.assert_close(grad, p.grad, rtol=10 * tolerance, atol=10 * tolerance)
        with torch.no_grad():
            torch.testing.assert_close(run(x), y.detach())  # a kept norm


@pytest.mark.parametrize("name", SPELLINGS)
def test_finite(name: str) -> None:
    layer = Layer(SPELLINGS[name])
    assert not layer(torch.ones(2, 12)).isfinite().all()  # the original
    dorafx.rewrite_log().clear()
    check_finite(layer, compiled(layer, "eager", strict=True))
    assert {r.pattern for r in dorafx.rewrite_log().rewrites} == {
        "norm_only" if "only" in name else "linear_weight_delta" if "other_input" in name else "linear"
    }
    for record in dorafx.rewrite_log().rewrites:
        assert GUARDED in record.decision and "except" not in record.decision


@pytest.mark.default_cases("differentiable_root")
@pytest.mark.parametrize("name", SPELLINGS)
def test_finite_through_inductor(name: str) -> None:
    layer = Layer(SPELLINGS[name])
    check_finite(layer, compiled(layer, "inductor", strict=True))


@pytest.mark.parametrize("algorithm", ["tiled", "factored"])
def test_every_algorithm(algorithm: str) -> None:
    layer = Layer(direct)
    check_finite(layer, compiled(layer, "eager", norm=algorithm, strict=True))


@pytest.mark.parametrize("reuse", ["auto", "never"])
def test_kept_norms_are_norms(reuse: str) -> None:
    """The store keeps zeros, so that one kept norm serves programs with and without the option."""
    layer = Layer(direct)
    x = torch.randn(1, 12)
    with torch.no_grad():
        for option in ("finite", "peft", "finite"):
            run = compiled(layer, "eager", norm_reuse=reuse, zero_rows=option)
            assert bool(run(x).isfinite().all()) == (option == "finite")
        layer.weight[ROW] = 1.0
        torch.testing.assert_close(run(x), layer(x))
        layer.weight[ROW] = 0.0
        assert torch.equal(run(x)[:, ROW], layer.bias[ROW].expand(1))


def test_verification_accepts_it() -> None:
    layer = Layer(direct)
    dorafx.rewrite_log().clear()
    check_finite(layer, compiled(layer, "eager", verify=True, strict=True))
    assert len(dorafx.rewrite_log().rewrites) >= 1 and not dorafx.rewrite_log().misses


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_rows_keep_every_bit(name: str) -> None:
    layer = Layer(SPELLINGS[name], zeros=False)
    x = torch.randn(4, 12)
    results = []
    for option in ("peft", "finite"):
        y = compiled(layer, "eager", zero_rows=option)(x)
        layer.zero_grad()
        y.sum().backward()
        results.append([y.detach(), *(p.grad.clone() for p in layer.parameters() if p.grad is not None)])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_that_is_zero_in_the_programs_dtype(dtype: torch.dtype) -> None:
    """The norm is computed in fp32, where it is not zero; the program rounds it before it divides."""
    layer = Layer(
        lambda p, x: p.m / p.adapted.norm(dim=1).detach().to(dtype) * (F.linear(x, p.weight) + p.lora(x)) + p.bias,
        dtype,
    )
    tiny = 2.0**-140 if dtype == torch.bfloat16 else 2.0**-30
    stored = Layer(
        lambda p, x: (
            p.m / p.adapted.float().norm(dim=1).detach().to(dtype) * (F.linear(x, p.weight) + p.lora(x)).to(dtype)
            + p.bias
        )
    )
    with torch.no_grad():
        stored.weight[ROW, 0] = tiny / 4 if dtype == torch.bfloat16 else tiny
        stored.m[ROW] = 0
    for some in (layer, stored):
        y = compiled(some, "eager")(torch.randn(3, 12).to(some.weight))
        assert y.isfinite().all()


def test_a_norm_that_the_program_guards_or_returns_stays() -> None:
    def guarded(p: Layer, x: torch.Tensor) -> Any:
        n = p.adapted.norm(dim=1)
        safe = torch.where(n == 0, 7.0, n)
        return p.m / safe, p.m / (n + 1e-3), p.m / n.clamp_min(0.25), n

    layer = Layer(guarded)
    for actual, expected in zip(compiled(layer, "eager")(torch.ones(1, 12)), layer(torch.ones(1, 12))):
        torch.testing.assert_close(actual, expected)


def test_a_norm_that_is_written_before_it_divides() -> None:
    def with_epsilon(p: Layer, x: torch.Tensor) -> Any:
        n = p.adapted.norm(dim=1).detach()
        scaled = n * 2
        n.add_(0.5)
        y = x @ p.weight.T
        y.div_(scaled)
        return p.m / n, y, scaled.to(torch.int32) / 2, p.m / (n * 0.0)

    layer, x = Layer(with_epsilon), torch.ones(2, 12)
    results, expected = compiled(layer, "eager")(x), layer(x)
    for k in (0, 2, 3):
        torch.testing.assert_close(results[k], expected[k])
    others = [i for i in range(10) if i != ROW]
    torch.testing.assert_close(results[1][:, others], expected[1][:, others])
    assert not results[1][:, ROW].any()


def test_a_norm_by_column() -> None:
    def by_column(p: Layer, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, p.m / p.adapted.norm(dim=0).detach() * p.adapted, p.bias)

    layer = Layer(by_column, zeros=False)
    layer.m = nn.Parameter(torch.rand(12) + 0.5)
    with torch.no_grad():
        layer.weight[:, ROW], layer.a[:, ROW] = 0, 0
    x = torch.randn(5, 12)
    reduced = copy.deepcopy(layer)
    columns = [i for i in range(12) if i != ROW]
    with torch.no_grad():
        reduced.weight, reduced.a, reduced.m = (
            nn.Parameter(t[..., columns].clone()) for t in (layer.weight, layer.a, layer.m)
        )
    y = compiled(layer, "eager")(x)
    torch.testing.assert_close(y, reduced(x[:, columns]))
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_divisors() -> None:
    """Only what is divided by a norm that dorafx computes is guarded."""

    def program(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> Any:
        n = torch.linalg.norm(w + b @ a, dim=1)
        return m / n, v / n, m / v, n / m, n / 2.0, m / (n * v), m / (n * n)

    layer = Layer(direct)
    zeros = torch.zeros(10)
    caught: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        program = rewrite_graph(gm, Options(codegen="eager", zero_rows="finite"))
        caught.append(sum(node.target == "masked_fill" for node in program.graph.graph.nodes))
        return program.graph.forward

    torch._dynamo.reset()
    run = torch.compile(program, backend=backend)
    results = run(layer.weight, layer.a.detach(), layer.b.detach(), layer.m.detach(), zeros)
    assert caught == [3]  # by n twice, and by n·n
    assert results[0][ROW] == 0 and results[1][ROW] == 0 and results[6][ROW] == 0
    assert math.isinf(results[2][0]) and math.isinf(results[5][0])  # not dorafx's
    assert results[3][ROW] == 0 and results[4][ROW] == 0
    assert guard_zero_norms(torch.fx.symbolic_trace(lambda x: 1 / x.norm(dim=1))).divisions == 0


class Quotient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, n: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        ctx.save_for_backward(n)
        return y / n

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        (n,) = ctx.saved_tensors
        return gradient / n, None


def in_an_autograd_function(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return Quotient.apply(torch.sin(p.lora(x)), p.adapted.norm(dim=1).detach()) * p.m  # type: ignore[no-any-return,no-untyped-call]


def by_logarithms(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return torch.exp(p.m.log() - p.adapted.norm(dim=1).log()) * torch.sin(x @ p.weight.T)


def times_another_tensor(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return p.m / (p.adapted.norm(dim=1) * p.bias) * torch.sin(x @ p.weight.T)


def after_a_graph_break(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = p.adapted.norm(dim=1)
    torch._dynamo.graph_break()
    return torch.sin(x @ p.weight.T) / n * p.m


def joined_with_another_tensor(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.cat([p.adapted.norm(dim=1), p.bias])
    return torch.sin(x @ p.weight.T) / n[: len(p.m)] * p.m


def minus_zero_times(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """What ``clamp_min`` makes zero is no norm of zero."""
    return torch.sin(x @ p.weight.T) / (-p.adapted.norm(dim=1)).clamp_min(0) * p.m


def only_in_one_branch(p: Layer, x: torch.Tensor) -> torch.Tensor:
    def norm(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return (w + 0.5 * (b @ a)).norm(dim=1)

    n = torch.cond(x.sum() > x.sum() - 1, norm, lambda w, b, a: w.sum(1), (p.weight, p.b, p.a))
    return torch.sin(x @ p.weight.T) / n * p.m


UNGUARDED = {
    in_an_autograd_function: "operator autograd_function_apply",
    by_logarithms: "operator log",
    times_another_tensor: "operator mul",
    after_a_graph_break: "the outputs of the graph",
    joined_with_another_tensor: "operator cat",
    minus_zero_times: "operator clamp_min",
    only_in_one_branch: "a result of torch.cond",
}


@pytest.mark.parametrize("program", UNGUARDED, ids=lambda f: f.__name__)
def test_what_is_not_guarded_is_said(program: Callable[..., Any]) -> None:
    layer, x = Layer(program), torch.randn(3, 12)
    expected = layer(x)
    assert not expected[:, ROW].isfinite().any()
    dorafx.rewrite_log().clear()
    y = compiled(layer, "eager")(x)
    torch.testing.assert_close(y, expected, equal_nan=True)
    (record,) = dorafx.rewrite_log().rewrites
    assert NOT_GUARDED in record.decision and f"the norm goes to {UNGUARDED[program]}" in record.decision


def test_what_is_guarded_in_part_is_said() -> None:
    def both(p: Layer, x: torch.Tensor) -> Any:
        n = p.adapted.norm(dim=1)
        return torch.sin(x @ p.weight.T) / n, n.log()

    layer, x = Layer(both), torch.randn(3, 12)
    dorafx.rewrite_log().clear()
    y, log = compiled(layer, "eager")(x)
    assert not y[:, ROW].any() and log[ROW].isinf()
    (record,) = dorafx.rewrite_log().rewrites
    assert f"{GUARDED}, except by way of operator log at " in record.decision


def test_looks_at_a_norm_are_no_exception() -> None:
    def looks(p: Layer, x: torch.Tensor) -> Any:
        n = p.adapted.norm(dim=1)
        y = torch.sin(x @ p.weight.T) / n.view(1, n.shape[0])
        return torch.where((n == 0).expand(len(x), n.size(0)), y.to(n.dtype), y * torch.ones_like(n))

    layer, x = Layer(looks), torch.randn(3, 12)
    dorafx.rewrite_log().clear()
    assert compiled(layer, "eager")(x).isfinite().all()
    (record,) = dorafx.rewrite_log().rewrites
    assert GUARDED in record.decision and "except" not in record.decision


def test_the_programs_own_guard_of_a_quotient_sees_zero() -> None:
    def guarded(p: Layer, x: torch.Tensor) -> torch.Tensor:
        g = p.m / p.adapted.norm(dim=1)
        return torch.where(g.isfinite(), g, 1.0)

    layer, x = Layer(guarded), torch.randn(3, 12)
    assert layer(x)[ROW] == 1 and compiled(layer, "eager")(x)[ROW] == 0


def test_the_default_is_the_programs_own() -> None:
    layer = Layer(direct)
    x = torch.randn(3, 12)
    run = compiled(layer, "eager", zero_rows="peft")
    assert run(x)[:, ROW].isnan().all() and layer(x)[:, ROW].isnan().all()


def test_explain_says_it() -> None:
    torch._dynamo.reset()
    explanation = dorafx.explain(Layer(direct), torch.randn(3, 12))
    assert explanation.zero_rows == {"": 1}
    assert "(function): 1 row with a norm of zero" in str(explanation) and explanation.to_dict()["zero_rows"] == {"": 1}
    torch._dynamo.reset()
    clean = dorafx.explain(Layer(direct, zeros=False), torch.randn(3, 12))
    assert clean.zero_rows == {} and "zero" not in str(clean)


@pytest.mark.parametrize("differentiable", [False, True])
def test_batches_of_weights(differentiable: bool) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            g = torch.Generator().manual_seed(0)
            self.weight = nn.Parameter(torch.randn(3, 10, 12, generator=g), requires_grad=False)
            self.a, self.b = (nn.Parameter(torch.randn(3, *s, generator=g)) for s in ((4, 12), (10, 4)))
            self.m = nn.Parameter(torch.rand(3, 10, generator=g) + 0.5)
            with torch.no_grad():
                self.weight[1, ROW], self.b[1, ROW] = 0, 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = (self.weight + self.b @ self.a).norm(dim=2)
            n = n if differentiable else n.detach()
            y = torch.bmm(x, self.weight.mT) + torch.bmm(torch.bmm(x, self.a.mT), self.b.mT)
            return (self.m / n).unsqueeze(1) * y

    layer, x = Experts(), torch.randn(3, 5, 12)
    dorafx.rewrite_log().clear()
    y, stock = compiled(layer, "eager", strict=True)(x), layer(x)
    known = stock.isfinite()
    assert not known.all() and y.isfinite().all() and not y[1, :, ROW].any()
    torch.testing.assert_close(y[known], stock[known])
    y.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())
    assert [r.pattern for r in dorafx.rewrite_log().rewrites] == ["linear"]


@pytest.mark.parametrize("portable", [False, True])
def test_programs_that_were_captured_elsewhere(portable: bool) -> None:
    layer, x = Layer(direct), torch.randn(5, 12)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        plain, finite = (dorafx.rewrite(program, portable=portable, zero_rows=option) for option in ("peft", "finite"))
        assert plain.module()(x)[:, ROW].isnan().all()
        y = finite.module()(x)
    assert torch.equal(y[:, ROW], layer.bias[ROW].expand(5))
    assert y.isfinite().all()
    with pytest.raises(ValueError, match="'peft', 'finite'"):
        dorafx.rewrite(program, zero_rows="zero")


@pytest.mark.slow
def test_warm_caches_hold_one_option_each() -> None:
    """The graphs differ, so what Inductor keeps of the one is not taken for the other."""
    layer, x = Layer(direct), torch.randn(2, 12)
    for _ in range(2):
        for option in ("peft", "finite"):
            y = compiled(layer, "inductor", zero_rows=option)(x)
            assert bool(y.isfinite().all()) == (option == "finite")
