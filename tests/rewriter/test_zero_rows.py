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
    assert all('zero_rows="finite"' in r.decision for r in dorafx.rewrite_log().rewrites)


@pytest.mark.default_cases("differentiable")
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
