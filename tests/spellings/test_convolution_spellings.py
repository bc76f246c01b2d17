"""Every spelling of a convolution with a merged weight is recognised whole, and computes what it did, with the gradients that it had."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convolution_programs import MERGED, ConvLayer, delta, normalised
from same_results import check_everything, check_same
from torch.fx.experimental.proxy_tensor import make_fx

import dorafx
from dorafx import rewrite_log


def whole(form: str = "convolution") -> None:
    assert [(r.status, r.pattern, r.reason) for r in rewrite_log().records] == [("rewritten", form, "")]


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("name", sorted(MERGED))
def test_spelling_is_rewritten_and_exact(name: str, kernel: int) -> None:
    layer = ConvLayer(kernel=kernel, options={"padding": kernel // 2})
    check_same(MERGED[name], layer, layer.x(), tolerance=1e-11)
    whole()


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["viewed_as", "detached_norm", "weight_delta"])
def test_all_that_a_caller_sees(name: str, codegen: str) -> None:
    layer = ConvLayer(kernel=3, options={"padding": 1}, trained_weight=True)
    check_everything(MERGED[name], layer, layer.x(), codegen)
    whole()


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_without_gradients(codegen: str) -> None:
    layer = ConvLayer(kernel=3)
    check_everything(MERGED["viewed_as"], layer, layer.x(size=3), codegen, grad=False)
    whole()


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 2, "padding": 1},
        {"padding": "same"},
        {"padding": "valid", "dilation": 2},
        {"stride": 2, "padding": 2, "dilation": 2},
    ],
)
@pytest.mark.parametrize("kernel", [1, 2])
def test_options_of_the_convolution(dim: int, kernel: int, options: dict[str, Any]) -> None:
    layer = ConvLayer(dim, kernel, 24, 16, options=options)
    check_same(MERGED["viewed_as"], layer, layer.x(size=5), tolerance=1e-11)
    whole()


@pytest.mark.parametrize("options", [{"stride": (2, 1), "padding": (0, 1), "dilation": (1, 2)}, {"padding": [1, 0]}])
def test_options_by_axis(options: dict[str, Any]) -> None:
    layer = ConvLayer(options=options)
    check_same(MERGED["normalised_flat"], layer, layer.x(), tolerance=1e-11)
    whole()


def test_layout_in_memory_is_kept() -> None:
    layer = ConvLayer(options={"padding": 1})
    check_everything(MERGED["viewed_as"], layer, layer.x(channels_last=True))
    whole()
    layer.A = torch.nn.Parameter(layer.A.detach().to(memory_format=torch.channels_last))
    rewrite_log().clear()
    check_everything(MERGED["norm_over_all_axes"], layer, layer.x(), tolerance=1e-9)
    whole()


def test_a_stack_of_layers() -> None:
    first, second = ConvLayer(d_out=4, options={"padding": 1}), ConvLayer(kernel=1)

    def program(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
        return MERGED["viewed_as"](p, torch.tanh(MERGED["detached_norm"](first, x)))

    check_same(program, second, second.x(), tolerance=1e-11)
    assert [(r.pattern, r.reason) for r in rewrite_log().records] == [("convolution", "")] * 2


def test_activations_in_another_dtype() -> None:
    """The weight is merged in fp32 and cast to the activations' dtype; the input has been in another dtype before."""
    layer = ConvLayer(kernel=3, dtype=torch.float32, options={"padding": 1})

    def program(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
        v = p.W + delta(p)
        w = v * (p.m / v.flatten(1).norm(dim=1).view(-1, 1, *p.ones()))
        half = x.to(torch.bfloat16)
        return p.conv(half, w.to(torch.bfloat16)).float() + p.conv(half.float(), p.W)

    x = layer.x()
    compiled = torch.compile(lambda v: program(layer, v), backend="dorafx", options={"dorafx.codegen": "eager"})
    torch.testing.assert_close(compiled(x), program(layer, x), rtol=0.05, atol=0.1)


def test_many_positions_make_the_merged_weight_cheaper() -> None:
    """Every position of the output is a token: without gradients, at many of them, nothing but the norm is worth a rewrite."""
    layer = ConvLayer()
    with torch.no_grad():
        check_everything(MERGED["viewed_as"], layer, layer.x(size=40), grad=False)
    (record,) = rewrite_log().records
    assert (record.pattern, record.reason) == ("norm_only", "only the norm is rewritten: the merged weight is cheaper")
    tokens = 2 * 38 * 38
    assert record.decision.startswith(
        f"at {tokens} tokens the factored products cost {2 * tokens * 2 * (4 * 9 + 6):.3g} FLOPs"
    )


def test_groups_leave_all_but_the_norm_alone() -> None:
    layer = ConvLayer(options={"padding": 1, "groups": 2})
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64, requires_grad=True)
    check_same(MERGED["viewed_as"], layer, x, tolerance=1e-11)
    (record,) = rewrite_log().records
    assert (record.status, record.pattern, record.kind) == ("rewritten", "norm_only", "grouped-convolution")
    assert "in 2 groups" in record.reason


def test_a_weight_of_another_shape_is_none_of_this_convolution() -> None:
    """The same numbers as other filters: a row of the norm is a row of those, but the kernel is another."""
    layer = ConvLayer(kernel=2)

    def program(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
        v = p.W + delta(p)
        w = v * (p.m / v.flatten(1).norm(dim=1).view(-1, 1, *p.ones()))
        return p.conv(x, w.view(6, 4, 1, 4))

    check_same(program, layer, layer.x(), tolerance=1e-11)
    assert all(r.rewritten for r in rewrite_log().records)


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["einsum_of_filters", "tucker", "filters_that_are_convolved"])
def test_deltas_that_are_made_as_filters(name: str, codegen: str) -> None:
    layer = ConvLayer(kernel=2, options={"stride": 2, "padding": 1}, trained_weight=True)
    check_everything(MERGED[name], layer, layer.x(), codegen)
    whole()


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize(
    "name", ["einsum_with_spaces", "einsum_of_positions_first", "tucker", "tucker_with_an_ellipsis"]
)
def test_deltas_of_one_and_three_axes(name: str, dim: int) -> None:
    layer = ConvLayer(dim, 2, 24, 16)
    check_same(MERGED[name], layer, layer.x(size=4), tolerance=1e-11)
    whole()


@pytest.mark.parametrize("name", ["einsum_of_filters", "einsum_of_positions_first", "filters_that_are_convolved"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_traced_by_make_fx(name: str, kernel: int) -> None:
    """Where ``einsum`` is taken apart, kernels of one and all."""
    layer = ConvLayer(kernel=kernel, dtype=torch.float32)
    names = [n for n, p in vars(layer).items() if isinstance(p, torch.nn.Parameter)]

    def program(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return MERGED[name](replaced(layer, dict(zip(names, parameters))), x)

    operands = [layer.x(size=3).detach(), *(getattr(layer, n) for n in names)]
    rewritten = dorafx.rewrite(make_fx(program, tracing_mode="fake")(*operands))
    torch.testing.assert_close(rewritten(*operands), program(*operands), rtol=1e-4, atol=1e-4)
    (record,) = rewrite_log().records
    assert record.rewritten and (kernel == 1 or record.pattern == "convolution")


def replaced(layer: ConvLayer, parameters: dict[str, torch.Tensor]) -> ConvLayer:
    made = copy.copy(layer)
    for name, parameter in parameters.items():
        setattr(made, name, parameter)
    return made


OTHER_DELTAS: dict[str, Callable[[ConvLayer], torch.Tensor]] = {
    "positions_swapped": lambda p: torch.einsum("or,rikl->oilk", p.B_flat, p.A),
    "another_product_for_each_position": lambda p: torch.einsum("orkl,rikl->oikl", p.B.expand(-1, -1, 3, 3).sin(), p.A),
    "rank_between_the_channels": lambda p: torch.einsum("or,irkl->oikl", p.B_flat, p.A.transpose(0, 1)),
    "kronecker": lambda p: torch.kron(p.B_flat[:3, :2].reshape(3, 2, 1, 1), p.A[:2, :2]),
    "canonical_decomposition": lambda p: torch.einsum(
        "or,ri,rk,rl->oikl", p.B_flat, p.A[:, :, 0, 0], p.A[:, 0, :, 0], p.A[:, 0, 0]
    ),
    "core_with_three_factors": lambda p: torch.einsum("ijkl,jq,qr,ip->prkl", p.T, p.D[:, :3], p.D[:3], p.B_flat.t()),
}


@pytest.mark.parametrize("name", sorted(OTHER_DELTAS))
def test_another_delta_is_a_miss_that_says_so(name: str) -> None:
    layer = ConvLayer()
    check_same(lambda p, x: normalised(p, x, OTHER_DELTAS[name](p)), layer, layer.x(), tolerance=1e-11)
    (record,) = rewrite_log().records
    assert (record.status, record.kind) == ("missed", "unknown-delta")
    assert "makes the delta, and is not known as a product of low-rank factors" in record.reason


def test_a_core_that_is_read_by_nobody_else_stays_one_operator() -> None:
    """A graph in which nothing is rewritten is the one that was given, and so is a core that makes no filters."""
    layer = ConvLayer()

    def program(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
        return p.conv(x, p.W + torch.einsum("ijkl,jr,ip->prkl", p.T, p.D, p.B_flat.t()))

    check_same(program, layer, layer.x(), tolerance=0.0)
    assert rewrite_log().records == []


def test_filters_that_are_convolved_with_a_larger_kernel() -> None:
    """That is no product of the two."""
    layer = ConvLayer(dim=1)

    def program(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([p.B, p.B.sin()], -1)
        return normalised(p, x, p.conv(p.A.transpose(0, 1), wide, plain=True).transpose(0, 1).repeat(1, 1, 2)[..., :3])

    check_same(program, layer, layer.x(), tolerance=1e-11)
    assert [r.status for r in rewrite_log().records] == ["missed"]
