"""A frozen weight that a layer dequantises once for its product and once for its norm is one weight; two that differ are two."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from subclasses import Casting
from torch import nn

from dorafx import rewrite_log

CODEGENS = ["eager", "inductor"]


@torch.library.custom_op("dorafx_tests::unpack", mutates_args=())
def unpack(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A dequantisation of somebody's own."""
    return (codes.to(scale.dtype) - 8) * scale


@unpack.register_fake
def _(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return scale.new_empty(codes.shape)


class Layer(nn.Module):
    """Codes ``[d_out, d_in]``, scales ``[d_out, 1]``, factors and magnitude in fp64."""

    def __init__(self, dequantised: Callable[[Layer], torch.Tensor], again: Callable[[Layer], torch.Tensor]) -> None:
        super().__init__()
        self.dequantised, self.again = dequantised, again
        self.register_buffer("codes", torch.randint(0, 16, (24, 16), dtype=torch.uint8))
        self.register_buffer("scale", torch.rand(24, 1).double() / 8)
        self.register_buffer("other", torch.rand(24, 1).double() / 8)
        self.register_buffer("book", torch.linspace(-1, 1, 16).double())
        self.register_buffer("eight", torch.randn(24, 16).to(torch.float8_e4m3fn))
        self.wrapped = nn.Parameter(Casting(self.codes, self.scale), requires_grad=False)
        self.A = nn.Parameter(torch.randn(3, 16).double())
        self.B = nn.Parameter(torch.randn(24, 3).double())
        self.m = nn.Parameter(1 + torch.rand(24).double())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        base = x @ self.dequantised(self).t()
        norm = torch.linalg.norm(self.again(self) + 0.5 * self.B @ self.A, dim=1).detach()
        return self.m / norm * (base + 0.5 * (x @ self.A.t() @ self.B.t()))


def _nibbles(layer: Layer) -> torch.Tensor:
    halves = torch.stack((layer.codes[:, ::2] & 15, layer.codes[:, 1::2] & 15), dim=-1)
    return (halves.flatten(1).to(layer.scale.dtype) - 8) * layer.scale


def _without_gradients(layer: Layer) -> torch.Tensor:
    with torch.no_grad():
        return layer.book[layer.codes.long()] * layer.scale


CODES = torch.randint(0, 16, (24, 16), dtype=torch.uint8)

TWICE: dict[str, Callable[[Layer], torch.Tensor]] = {
    "affine": lambda p: (p.codes.to(p.scale.dtype) - 8) * p.scale,
    "nibbles": _nibbles,
    "codebook": lambda p: p.book[p.codes.long()] * p.scale,
    "custom operator": lambda p: torch.ops.dorafx_tests.unpack(p.codes, p.scale),
    "fp8": lambda p: p.eight.to(p.scale.dtype) * p.scale,
    "without a name": lambda p: (CODES.to(p.scale.dtype) - 8) * p.scale,
    "cast of a subclass": lambda p: p.wrapped.to(torch.float64),
}


def _run(layer: Layer, call: Callable[[torch.Tensor], torch.Tensor], grad: bool) -> list[torch.Tensor]:
    x = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1)).double().requires_grad_(grad)
    with torch.set_grad_enabled(grad):
        y = call(x)
    leaves = [x, layer.A, layer.B, layer.m]
    return [y, *torch.autograd.grad(y.sin().sum(), leaves)] if grad else [y]


def _check(layer: Layer, codegen: str, patterns: list[str]) -> None:
    for grad in (True, False):
        torch._dynamo.reset()
        rewrite_log().clear()
        compiled = torch.compile(layer, backend="dorafx", fullgraph=True, options={"dorafx.codegen": codegen})
        for _ in range(2):
            for got, wanted in zip(_run(layer, compiled, grad), _run(layer, layer, grad), strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        assert [r.pattern for r in rewrite_log().rewrites] == patterns, rewrite_log().records


@pytest.mark.parametrize("codegen", CODEGENS)
@pytest.mark.parametrize("name", TWICE)
def test_one_weight(name: str, codegen: str) -> None:
    _check(Layer(TWICE[name], TWICE[name]), codegen, ["linear"])


@pytest.mark.parametrize("codegen", CODEGENS)
def test_once_without_gradients(codegen: str) -> None:
    """A frozen weight has no gradient either way."""
    _check(Layer(TWICE["codebook"], _without_gradients), codegen, ["linear"])
    _check(Layer(_without_gradients, TWICE["codebook"]), codegen, ["linear"])


OTHERS: dict[str, Callable[[Layer], torch.Tensor]] = {
    "other scales": lambda p: (p.codes.to(p.scale.dtype) - 8) * p.other,
    "other zeros": lambda p: (p.codes.to(p.scale.dtype) - 7) * p.scale,
    "noise": lambda p: (p.codes.to(p.scale.dtype) - 8 + torch.bernoulli(torch.full_like(p.scale, 0.5))) * p.scale,
}


@pytest.mark.parametrize("codegen", CODEGENS)
@pytest.mark.parametrize("name", [name for name in OTHERS if name != "noise"])
def test_two_weights(name: str, codegen: str) -> None:
    """The product of one and the norm of the other: the norm alone is rewritten."""
    _check(Layer(TWICE["affine"], OTHERS[name]), codegen, ["norm_only"])


def test_random_weights_are_two() -> None:
    layer = Layer(OTHERS["noise"], OTHERS["noise"])
    compiled = torch.compile(layer, backend="dorafx", fullgraph=True, options={"dorafx.codegen": "eager"})
    x = torch.randn(3, 16).double()
    torch.manual_seed(3)
    wanted = layer(x)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-10, atol=1e-10)
    assert "linear" not in {r.pattern for r in rewrite_log().rewrites}


@pytest.mark.parametrize("codegen", CODEGENS)
def test_codes_written_between(codegen: str) -> None:
    """The same computation before and after a write gives two weights."""

    class Writing(Layer):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            base = x @ TWICE["affine"](self).t()
            self.codes.fill_(3)
            norm = torch.linalg.norm(TWICE["affine"](self) + 0.5 * self.B @ self.A, dim=1).detach()
            return self.m / norm * (base + 0.5 * (x @ self.A.t() @ self.B.t()))

    layer = Writing(TWICE["affine"], TWICE["affine"])
    codes = layer.codes.clone()
    compiled = torch.compile(layer, backend="dorafx", fullgraph=True, options={"dorafx.codegen": codegen})
    x = torch.randn(3, 16).double()
    wanted = layer(x)
    layer.codes.copy_(codes)
    torch.testing.assert_close(compiled(x), wanted, rtol=1e-10, atol=1e-10)
    assert bool((layer.codes == 3).all())
    assert "linear" not in {r.pattern for r in rewrite_log().rewrites}
