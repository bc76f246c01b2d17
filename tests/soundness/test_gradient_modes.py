"""Layers of which a part runs under ``no_grad``: what is computed there is another term than the same computed outside of it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from programs import Layer, lora
from same_results import check_everything, check_same

from dorafx import rewrite_log

PARTLY: dict[str, Callable[[Layer, torch.Tensor], torch.Tensor]] = {}


def partly(fn: Callable[[Layer, torch.Tensor], torch.Tensor]) -> Callable[[Layer, torch.Tensor], torch.Tensor]:
    PARTLY[fn.__name__] = fn
    return fn


def adapted(p: Layer) -> torch.Tensor:
    return p.W + p.B @ p.A


@partly
def scaling_expanded(p: Layer, x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, p.W) + lora(p, x)
    g = p.m / adapted(p).norm(dim=1)
    with torch.no_grad():
        g = g.expand_as(y)
    return g * y


@partly
def base_product_made_twice(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        base = F.linear(x, p.W)
    return p.m / adapted(p).norm(dim=1) * (F.linear(x, p.W) + lora(p, x)) + base.sin()


@partly
def base_product_with_its_bias(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        base = F.linear(x, p.W, p.bias)
    return p.m / adapted(p).norm(dim=1) * (base + lora(p, x))


@partly
def base_product_with_its_bias_read_elsewhere(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        base = F.linear(x, p.W, p.bias)
    return p.m / adapted(p).norm(dim=1) * (base - p.bias + lora(p, x)) + base.sin()


@partly
def norm_made_twice(p: Layer, x: torch.Tensor) -> torch.Tensor:
    both = adapted(p)
    with torch.no_grad():
        n = both.norm(dim=1)
    return p.m / both.norm(dim=1) * (F.linear(x, p.W) + lora(p, x)) + n.sin()


@partly
def root_taken_twice(p: Layer, x: torch.Tensor) -> torch.Tensor:
    squares = adapted(p).square().sum(1)
    with torch.no_grad():
        n = squares.sqrt()
    return p.m / squares.sqrt() * (F.linear(x, p.W) + lora(p, x)) + n


@partly
def one_factor_moved(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        up = p.B[None].permute(1, 0, 2)
    delta = torch.bmm(up.permute(1, 0, 2), p.A[None])[0]
    return p.m / (p.W + delta).norm(dim=1) * (F.linear(x, p.W) + lora(p, x))


@pytest.mark.parametrize("name", sorted(PARTLY))
def test_gradients_flow_as_they_did(name: str) -> None:
    check_same(PARTLY[name], Layer(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True), tolerance=1e-11)
    records = rewrite_log().records
    assert [(r.pattern, r.reason) for r in records] == [("linear", "")] or (
        name == "one_factor_moved" and not records[0].rewritten and "operator bmm at" in records[0].reason
    )


UNDER_NO_GRAD: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "to": lambda t: t.to(torch.float64),
    "double": lambda t: t.double(),
    "type_as": lambda t: t.type_as(torch.ones((), dtype=torch.float64)),
    "cpu": lambda t: t.cpu(),
    "dropout that is off": lambda t: F.dropout(t, 0.5, training=False),
    "atleast_2d": lambda t: torch.atleast_2d(t),
    "real": lambda t: torch.real(t),
    "itself": lambda t: t,
    # What is computed has none, a view included.
    "view": lambda t: t.view(t.shape),
    "reshape": lambda t: t.reshape(t.shape),
    "expand": lambda t: t.expand(t.shape),
    "transposed twice": lambda t: t.T.T,
    "clone": lambda t: t.clone(),
    "contiguous of a view": lambda t: t.T.contiguous().T,
    "float and double": lambda t: t.float().double(),
}
"""Some return their argument itself, with its gradients, where there is nothing to do."""


# Of what an inference mode computes nothing can be saved for a backward.
@pytest.mark.parametrize(
    ("region", "name"),
    [(torch.no_grad, name) for name in UNDER_NO_GRAD]
    + [(torch.inference_mode, name) for name in ("contiguous", "to", "itself")],
)
def test_what_is_handed_back_keeps_its_gradients(region: Callable[[], torch.no_grad], name: str) -> None:
    p = Layer()

    def program(p: Layer, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with region():
            up, magnitude = UNDER_NO_GRAD[name](p.B), p.m.contiguous()
        norm = (p.W + up @ p.A).norm(dim=1)
        y = F.linear(x, p.W) + F.linear(F.linear(x, p.A), up)
        return magnitude / norm * y, norm.rsqrt(), magnitude / norm.detach() * y

    codegens = ("eager", "inductor") if name in ("contiguous", "view") and region is torch.no_grad else ("eager",)
    for codegen in codegens:
        rewrite_log().clear()
        check_everything(program, p, torch.randn(5, p.d_in, dtype=torch.float64), codegen=codegen)
        assert rewrite_log().rewrites
