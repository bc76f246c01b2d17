"""Every spelling of a convolution with a merged weight is recognised whole, and computes what it did, with the gradients that it had."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from convolution_programs import BY_CHANNEL, MERGED, ConvLayer, delta, normalised
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


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("name", sorted(BY_CHANNEL))
def test_norm_by_input_channel(name: str, kernel: int) -> None:
    layer = ConvLayer(2, kernel, 12, 8, options={"padding": kernel // 2})
    check_same(BY_CHANNEL[name], layer, layer.x(), tolerance=1e-11)
    whole()


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["transposed_and_reshaped", "root_of_squares_of_axes"])
def test_norm_by_input_channel_as_a_caller_sees_it(name: str, codegen: str) -> None:
    layer = ConvLayer(2, 3, 6, 4, options={"padding": 1, "stride": 2}, trained_weight=True)
    check_everything(BY_CHANNEL[name], layer, layer.x(), codegen)
    # Inductor has a graph with a number in a tensor compiled twice.
    assert {(r.pattern, r.reason) for r in rewrite_log().records} == {("convolution", "")}


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("options", [{}, {"stride": 2, "padding": 1, "dilation": 2}, {"padding": "same"}])
def test_norm_by_input_channel_of_one_and_three_axes(dim: int, options: dict[str, Any]) -> None:
    layer = ConvLayer(dim, 2, 24, 16, options=options)
    check_same(BY_CHANNEL["transposed_and_reshaped"], layer, layer.x(size=4), tolerance=1e-11)
    whole()


@pytest.mark.default_cases("1-4", "6-1")
@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("outputs", [1, 6])
def test_one_channel(channels: int, outputs: int) -> None:
    for name in sorted(BY_CHANNEL):
        rewrite_log().clear()
        layer = ConvLayer(2, 3, outputs, channels)
        check_same(BY_CHANNEL[name], layer, layer.x(), tolerance=1e-11)
        assert rewrite_log().records, name
    for name in sorted(MERGED):
        layer = ConvLayer(2, 3, outputs, channels)
        check_same(MERGED[name], layer, layer.x(), tolerance=1e-11)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("zeros", ["channel", "column"])
@pytest.mark.parametrize("name", ["over_all_other_axes", "root_of_squares_of_axes", "root_of_squares_and_an_epsilon"])
def test_zeros(name: str, zeros: str, grad: bool) -> None:
    """A channel that is zero throughout has a norm of zero, with the gradient that the original's has there; one that is zero at one
    position has no such thing."""
    layer = ConvLayer(2, 3, trained_weight=True)
    where = (slice(None), 1) if zeros == "channel" else (slice(None), 1, 0, 2)
    with torch.no_grad():
        layer.W[where] = 0
        layer.A[where] = 0

    def norm(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
        v = p.W + delta(p)
        if name == "over_all_other_axes":
            return v.norm(p=2, dim=(0, 2, 3)) + x.sum()
        squares = v.square().sum((0, 2, 3))
        return (squares + 1e-6 if "epsilon" in name else squares).sqrt() + x.sum()

    check_everything(norm, layer, layer.x(), grad=grad)
    assert [(r.status, r.pattern) for r in rewrite_log().records] == [("rewritten", "norm_only")]
    if zeros == "column" or "epsilon" in name:
        rewrite_log().clear()
        check_everything(BY_CHANNEL[name], layer, layer.x(), grad=grad)
        assert all(r.rewritten for r in rewrite_log().records)


def test_positions_that_are_scaled_one_by_one() -> None:
    """That is a norm by column of the flattened filters, and no scaling of the input's channels."""
    layer = ConvLayer()

    def program(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
        v = p.W.flatten(1) + p.B_flat @ p.A_flat
        return p.conv(x, (v / v.norm(dim=0)).view(p.W.shape))

    check_same(program, layer, layer.x(), tolerance=1e-11)
    (record,) = rewrite_log().records
    assert (record.status, record.pattern) == ("rewritten", "norm_only")
    assert "each position of a kernel is scaled by itself" in record.reason


def test_activations_with_their_first_axes_swapped() -> None:
    """Only weights lie as filters do; what a norm is taken of here is no weight."""
    layer = ConvLayer(1, 1, 6, 4)

    def program(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
        y = p.conv(x, p.W) + p.conv(p.conv(x, p.A), p.B)
        return y / y.transpose(0, 1).reshape(6, -1).norm(dim=1).view(1, -1, 1)

    check_same(program, layer, layer.x(), tolerance=1e-12)
    assert rewrite_log().records == []


def test_scaled_input_of_one_layer_and_output_of_another() -> None:
    """Rows and input channels of one weight are normalised both."""
    layer = ConvLayer(2, 3, 12, 8)

    def program(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
        v = p.W + delta(p)
        rows = v.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
        channels = v.transpose(0, 1).flatten(1).norm(dim=1).view(1, -1, 1, 1)
        return p.conv(x, v * (p.m / rows) * (p.m_in / channels))

    check_same(program, layer, layer.x(), tolerance=1e-11)
    assert all(r.rewritten for r in rewrite_log().records) and len(rewrite_log().records) == 2


@pytest.mark.parametrize("kernel", [1, 3])
def test_strides_that_a_tracer_does_not_know(kernel: int) -> None:
    """The result lies in memory as the original's, whatever strides ``einsum`` gives to axes of one element."""
    layer = ConvLayer(2, kernel, 32, 24)
    check_everything(BY_CHANNEL["of_a_tucker_delta"], layer, layer.x())
    whole()


def test_the_weights_data() -> None:
    """``.data`` is the weight without its gradient."""
    layer = ConvLayer(trained_weight=True)

    def program(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
        v = p.W.data + delta(p)
        return p.conv(x, v * (p.m / v.flatten(1).norm(dim=1).view(-1, 1, 1, 1))) + p.conv(x, p.W)

    check_everything(program, layer, layer.x())
    assert all(r.rewritten for r in rewrite_log().records)
