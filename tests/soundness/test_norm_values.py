"""A norm that is replaced is replaced by what stood there: a power, a multiple, of any axes, in any dtype; wherever it is read."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from programs import Layer, S, lora
from same_results import check_everything
from torch.fx.experimental.proxy_tensor import make_fx

import dorafx
from dorafx import rewrite_log

POWERS: dict[str, Callable[[torch.Tensor, int, bool], torch.Tensor]] = {
    "norm": lambda v, d, k: v.norm(dim=d, keepdim=k),
    "vector_norm": lambda v, d, k: torch.linalg.vector_norm(v, dim=d, keepdim=k),
    "root of the sum": lambda v, d, k: v.square().sum(d, keepdim=k).sqrt(),
    "power of the sum": lambda v, d, k: (v * v).sum(d, keepdim=k) ** 0.5,
    "root of the mean": lambda v, d, k: (v**2).mean(d, keepdim=k).sqrt(),
    "rsqrt of the sum": lambda v, d, k: v.pow(2).sum(d, keepdim=k).rsqrt(),
    "rsqrt of the mean": lambda v, d, k: torch.rsqrt(v.square().mean(d, k)),
    "rsqrt with an eps": lambda v, d, k: (v.pow(2).sum(d, keepdim=k) + 0.3).rsqrt(),
    "negative power of the sum": lambda v, d, k: v.pow(2).sum(d, keepdim=k) ** -0.5,
    "negative power of the mean": lambda v, d, k: torch.pow(v.pow(2).mean(d, keepdim=k) + 0.2, -0.5),
    "reciprocal": lambda v, d, k: v.norm(dim=d, keepdim=k).reciprocal(),
    "power of the norm": lambda v, d, k: v.norm(dim=d, keepdim=k) ** -1,
    "square of the norm": lambda v, d, k: v.norm(dim=d, keepdim=k).square(),
    "divided": lambda v, d, k: 2.0 / torch.sqrt(v.square().sum(d, keepdim=k)),
    "negated": lambda v, d, k: -(3 * v.pow(2).sum(d, keepdim=k)).sqrt(),
    "square of the rsqrt": lambda v, d, k: v.pow(2).sum(d, keepdim=k).rsqrt() ** 2,
    "no norm": lambda v, d, k: v.pow(2).sum(d, keepdim=k),
    "variance": lambda v, d, k: v.var(d, keepdim=k),
    "deviation": lambda v, d, k: v.std(d, correction=0, keepdim=k),
}


def adapted(p: Layer) -> torch.Tensor:
    return p.W + S * (p.B @ p.A)


def uses(p: Layer, x: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A norm in a layer, after a nonlinear operator, as outputs, and read twice."""
    plain = r.reshape(-1)
    base = F.linear(x, p.W)
    return (
        p.m * plain * (base + S * lora(p, x)),
        p.m / plain * (base + S * lora(p, x)) + p.bias,
        F.relu(base) * p.m * plain,
        r,
        plain * 2,
        plain.detach() + plain,
    )


@pytest.mark.parametrize("name", POWERS)
def test_powers(name: str) -> None:
    p = Layer(6, 7, 2)
    x = torch.randn(3, 7, dtype=torch.float64)
    for dim, keepdim in ((1, False), (-1, True), (0, False), (-2, True)):

        def alone(p: Layer, x: torch.Tensor, dim: int = dim, keepdim: bool = keepdim) -> tuple[torch.Tensor, ...]:
            return POWERS[name](adapted(p), dim, keepdim), x * 1

        check_everything(alone, p, x)
        if dim in (1, -1):
            check_everything(
                lambda p, x, dim=dim, keepdim=keepdim: uses(p, x, POWERS[name](adapted(p), dim, keepdim)), p, x
            )


@pytest.mark.slow
def test_powers_through_inductor() -> None:
    def every(p: Layer, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = [power(adapted(p), 1, False) for power in POWERS.values()]
        return (*found, *(F.relu(F.linear(x, p.W)) * r for r in found))

    p = Layer(6, 7, 2)
    rewrite_log().clear()
    check_everything(every, p, torch.randn(3, 7, dtype=torch.float64), codegen="inductor")
    assert any(r.rewritten for r in rewrite_log().records)


@pytest.mark.parametrize("name", POWERS)
def test_an_infinite_weight(name: str) -> None:
    """The gradient is lost where the weight is infinite, and nowhere else, a zero row besides."""
    p = Layer(6, 7, 2)
    p.W.data[0, 1] = float("inf")
    p.W.data[1] = p.B.data[1] = 0.0
    check_everything(
        lambda p, x: (POWERS[name](adapted(p), 1, False), x * 1), p, torch.randn(3, 7, dtype=torch.float64)
    )


@pytest.mark.parametrize("name", POWERS)
def test_a_gradient_that_is_not_a_number(name: str) -> None:
    """What is NaN on its way in is NaN on its way out, of an infinite norm and of a finite one."""
    p = Layer(6, 7, 2)
    p.W.data[0, 1] = float("inf")
    factors = torch.tensor([float("nan"), float("nan"), 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    check_everything(
        lambda p, x: (POWERS[name](adapted(p), 1, False) * factors, x * 1), p, torch.randn(3, 7, dtype=torch.float64)
    )


REDUCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mean of squares": lambda v: (v**2).mean(dim=tuple(range(1, v.dim()))).sqrt(),
    "mean, axes in another order": lambda v: v.square().mean(dim=tuple(range(v.dim() - 1, 0, -1))).rsqrt(),
    "mean, negative axes, keepdim": lambda v: (v * v).mean(dim=tuple(range(1 - v.dim(), 0)), keepdim=True).sqrt(),
    "sum": lambda v: v.square().sum(tuple(range(1, v.dim())), keepdim=True).sqrt(),
    "norm": lambda v: v.norm(p=2, dim=tuple(range(1, v.dim()))),
    "vector_norm": lambda v: torch.linalg.vector_norm(v, dim=tuple(range(-1, -v.dim(), -1)), keepdim=True),
    "flattened": lambda v: v.flatten(1).pow(2).mean(1).sqrt(),
    "some axes": lambda v: (v**2).mean(dim=tuple(range(2, v.dim()))).sqrt().sum(1),
    "all axes": lambda v: (v**2).mean().sqrt() + v.shape[0] * (v**2).sum(1).flatten(1).sum(1).sqrt(),
    "variance": lambda v: v.var(dim=tuple(range(1, v.dim())), unbiased=False),
}


@pytest.mark.parametrize("name", REDUCTIONS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_reductions_over_several_axes(name: str, axes: int) -> None:
    """Filters ``[c_out, c_in, ...]`` with one to three spatial axes of different lengths."""
    generator = torch.Generator().manual_seed(axes)
    p = Layer(5, 4, 2)
    shape = (5, 4, 3, 2, 1)[: 2 + axes]
    p.W = torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator), requires_grad=False)
    p.A = torch.nn.Parameter(torch.randn(2, *shape[1:], dtype=torch.float64, generator=generator))
    conv = (F.conv1d, F.conv2d, F.conv3d)[axes - 1]

    def program(p: Layer, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        v = p.W + S * (p.B @ p.A.flatten(1)).view(p.W.shape)
        n = REDUCTIONS[name](v)
        m, n = p.m.view(1, -1, *[1] * axes), n.reshape(1, -1, *[1] * axes)
        up = p.B.view(5, 2, *[1] * axes)
        return m / n * (conv(x, p.W) + S * conv(conv(x, p.A), up)), n

    check_everything(program, p, torch.randn(2, 4, *(4,) * axes, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("low", [1.0, 2.0])
@pytest.mark.parametrize("bounded", ["maximum", "maximum, the bound first", "clamp_min", "clamp"])
def test_ties_with_a_bound(bounded: str, low: float) -> None:
    """Unit rows and ``B = 0``: half of the gradient goes through ``maximum``, all of it through ``clamp``."""
    p = Layer(6, 6, 2)
    p.W = torch.nn.Parameter(torch.eye(6, dtype=torch.float64) * 2.0, requires_grad=False)
    with torch.no_grad():
        p.B.zero_()

    def program(p: Layer, x: torch.Tensor) -> torch.Tensor:
        n, bound = adapted(p).norm(dim=1), torch.full((6,), low, dtype=torch.float64)
        n = {
            "maximum": lambda: torch.maximum(n, bound),
            "maximum, the bound first": lambda: torch.maximum(bound, n),
            "clamp_min": lambda: n.clamp_min(low),
            "clamp": lambda: torch.clamp(n, min=low),
        }[bounded]()
        return p.m / n * (F.linear(x, p.W) + S * lora(p, x))

    rewrite_log().clear()
    check_everything(program, p, torch.randn(3, 6, dtype=torch.float64))
    assert [r.pattern for r in rewrite_log().rewrites] == ["linear"]


def test_a_symbolic_scaling_keeps_its_digits() -> None:
    p = Layer()

    def program(x: torch.Tensor) -> torch.Tensor:
        s = x.shape[0] / 7
        n = (p.W + s * (p.B @ p.A)).norm(dim=1).detach()
        return p.m / n * (F.linear(x, p.W) + s * lora(p, x)) + 1 / s

    for codegen in ("eager", "inductor"):
        torch._dynamo.reset()
        compiled = torch.compile(program, backend="dorafx", dynamic=True, options={"dorafx.codegen": codegen})
        for tokens in (5, 9):
            x = torch.randn(tokens, p.d_in, dtype=torch.float64)
            torch.testing.assert_close(compiled(x), program(x), rtol=1e-13, atol=1e-13)


def test_powers_in_graphs_of_make_fx() -> None:
    p = Layer(6, 7, 2)
    for name, power in POWERS.items():

        def program(
            weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, power: Callable[..., torch.Tensor]
        ) -> torch.Tensor:
            return power(weight + S * (left @ right), 1, False)

        function = functools.partial(program, power=power)
        gm = make_fx(function)(p.W, p.B, p.A)
        torch.testing.assert_close(dorafx.rewrite(gm)(p.W, p.B, p.A), function(p.W, p.B, p.A), msg=name)


SCALED: dict[str, Callable[..., torch.Tensor]] = {
    "by a number that is a tensor": lambda t, w, b, a: w + t["s"] * (b @ a),
    "by the rank's vector": lambda t, w, b, a: w + (b * t["d"]) @ a,
    "by a row's vector": lambda t, w, b, a: w + t["u"][:, None] * (b @ a),
    "by a column's vector": lambda t, w, b, a: w + (b @ a) * t["c"],
    "by a core": lambda t, w, b, a: w + 0.3 * (b @ (t["M"] @ a)),
    "two deltas": lambda t, w, b, a: w + 0.7 * (b @ a) + 0.3 * ((b * t["d"]) @ a),
}


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
def test_parameters_in_half_precision_are_scaled_in_the_norm_s_dtype(name: str, wide: torch.dtype) -> None:
    """Half precision is where the parameters lie, not what the original computes in."""
    generator = torch.Generator().manual_seed(3)

    def made(*shape: int, dtype: torch.dtype = wide) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)

    w, b, a = (made(*shape, dtype=torch.bfloat16) for shape in ((12, 20), (12, 4), (4, 20)))
    t = {"s": made(), "d": made(4), "u": made(12), "c": made(20), "M": made(4, 4)}
    m, x = made(12), made(5, 20)

    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype, values = x.dtype, {key: value.to(x.dtype) for key, value in t.items()}
        v = SCALED[name](values, w.to(dtype), b.to(dtype), a.to(dtype))
        n = v.norm(dim=1)
        return n, F.linear(x, m.to(dtype)[:, None] * F.normalize(v, dim=1))

    exact = program(x.double())
    for codegen in ("eager", "inductor") if name == "by a number that is a tensor" else ("eager",):
        torch._dynamo.reset()
        rewrite_log().clear()
        found = torch.compile(program, backend="dorafx", options={"dorafx.codegen": codegen})(x)
        assert rewrite_log().rewrites
        for one, original, right in zip(found, program(x), exact):
            own = (original.double() - right).norm() / right.norm()
            assert one.dtype == wide
            assert (one.double() - right).norm() / right.norm() <= 2 * own + 16 * torch.finfo(wide).eps
