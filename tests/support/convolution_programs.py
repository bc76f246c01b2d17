"""Convolutional DoRA as people write it: each function is one spelling, with the options that the layer has."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

S = 0.7
_CALLS: dict[int, Any] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass
class ConvLayer:
    """Parameters of one DoRA layer in fp64, by spatial axes and kernel: W ``[d_out, d_in, *k]``, A ``[r, d_in, *k]``, B ``[d_out, r, 1...]``,
    a Tucker core T ``[r, q, *k]`` with D ``[q, d_in]``, m ``[d_out, 1, 1...]``, m_in ``[1, d_in, 1...]``."""

    dim: int = 2
    kernel: int = 3
    d_out: int = 6
    d_in: int = 4
    rank: int = 2
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    trained_weight: bool = False

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> torch.Tensor:
            return nn.Parameter((torch.randn(*shape, dtype=torch.float64, generator=generator) * 0.4).to(self.dtype))

        k, ones = (self.kernel,) * self.dim, (1,) * self.dim
        self.W = parameter(self.d_out, self.d_in, *k).requires_grad_(self.trained_weight)
        self.A, self.B = parameter(self.rank, self.d_in, *k), parameter(self.d_out, self.rank, *ones)
        self.A_flat, self.B_flat = (
            parameter(self.rank, self.d_in * self.kernel**self.dim),
            parameter(self.d_out, self.rank),
        )
        self.T, self.D = parameter(self.rank, 3, *k), parameter(3, self.d_in)
        self.m = nn.Parameter(parameter(self.d_out, 1, *ones).detach().abs() + 0.5)
        self.m_in = nn.Parameter(parameter(1, self.d_in, *ones).detach().abs() + 0.5)
        self.bias = parameter(self.d_out)
        self.multiplier = torch.tensor(0.8, dtype=self.dtype)

    def conv(
        self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, plain: bool = False
    ) -> torch.Tensor:
        """The convolution with the layer's options; ``plain``: without."""
        made: torch.Tensor = _CALLS[self.dim](x, w, bias, **({} if plain else self.options))
        return made

    def x(self, size: int = 7, channels_last: bool = False) -> torch.Tensor:
        x = torch.randn(2, self.d_in, *(size,) * self.dim, dtype=self.dtype, generator=torch.Generator().manual_seed(1))
        return (x.to(memory_format=torch.channels_last) if channels_last else x).requires_grad_()

    def trainable(self) -> list[torch.Tensor]:
        return [p for p in vars(self).values() if isinstance(p, torch.Tensor) and p.requires_grad]

    def ones(self) -> tuple[int, ...]:
        return (1,) * self.dim


Program = Callable[[ConvLayer, torch.Tensor], torch.Tensor]
MERGED: dict[str, Program] = {}
"""With a norm by output channel, in which the weight is merged."""


def merged(fn: Program) -> Program:
    MERGED[fn.__name__] = fn
    return fn


def delta(p: ConvLayer) -> torch.Tensor:
    return (p.B.flatten(1) @ p.A.flatten(1)).view(p.W.shape)


@merged
def viewed_as(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + S * (p.B.flatten(1) @ p.A.flatten(1)).view_as(p.W)
    return p.conv(x, v * (p.m / v.flatten(1).norm(dim=1).view(-1, 1, *p.ones())), p.bias)


@merged
def norm_over_all_axes(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + delta(p) * p.multiplier
    return p.conv(x, p.m * v / v.norm(p=2, dim=tuple(range(1, v.dim())), keepdim=True))


@merged
def detached_norm(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + delta(p) * S
    n = v.detach().reshape(v.shape[0], -1).norm(dim=1).reshape(v.shape[0], 1, *p.ones()) + 1e-7
    return p.conv(x, p.m * (v / n), p.bias)


@merged
def root_of_squares(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + delta(p) * S
    n = v.flatten(1).pow(2).sum(1, keepdim=True).add(1e-6).sqrt()
    return p.conv(x, v * (p.m.flatten(1) / n).view(-1, 1, *p.ones()))


@merged
def flat_factors(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + ((p.B_flat @ p.A_flat) * S).reshape(p.W.shape)
    return p.conv(x, v * (p.m / torch.linalg.vector_norm(v.reshape(p.d_out, -1), dim=1).reshape(-1, 1, *p.ones())))


@merged
def factors_from_the_right(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + (p.A_flat.t() @ p.B_flat.t()).t().reshape(p.W.shape)
    return p.conv(x, v * (p.m / v.flatten(1).norm(dim=1).view(-1, 1, *p.ones())))


@merged
def normalised_flat(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W.flatten(1) + p.B.flatten(1) @ p.A.flatten(1)
    v = p.m.flatten(1) * v / v.norm(dim=1, keepdim=True)
    return p.conv(x, v.view(p.W.shape), p.bias)


@merged
def weight_delta(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + S * delta(p)
    g = p.m / v.flatten(1).norm(dim=1).view(-1, 1, *p.ones()).detach()
    return p.conv(x, p.W, p.bias) + p.conv(x, v * g - p.W)


@merged
def two_adapters(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + S * delta(p) + (p.B_flat @ p.A_flat).view_as(p.W)
    return p.conv(x, v * (p.m / v.flatten(1).norm(dim=1).view(-1, 1, *p.ones())))


@merged
def scaled_between_the_factors(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    scale = p.D.flatten()[: p.rank]
    v = p.W + (p.B_flat @ (scale[:, None] * p.A_flat)).view_as(p.W)
    return p.conv(x, v * (p.m / v.flatten(1).norm(dim=1).view(-1, 1, *p.ones())))


@merged
def an_input_that_is_scaled_and_cast(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + S * delta(p)
    return p.conv((x * 2).to(p.W.dtype).relu(), v * (p.m / v.flatten(1).norm(dim=1).view(-1, 1, *p.ones()))).relu()


# -- deltas that are made as filters -----------------------------------------------------------------------------------


def normalised(p: ConvLayer, x: torch.Tensor, of: torch.Tensor) -> torch.Tensor:
    v = p.W + S * of
    return p.conv(x, v * (p.m / v.flatten(1).norm(dim=1).view(-1, 1, *p.ones())), p.bias)


def positions(p: ConvLayer) -> str:
    """A letter for each axis of a kernel."""
    return "klm"[: p.dim]


@merged
def einsum_of_filters(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    k = positions(p)
    return normalised(p, x, torch.einsum(f"or,ri{k}->oi{k}", p.B_flat, p.A))


@merged
def einsum_with_spaces(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    k = " ".join(positions(p))
    return normalised(p, x, torch.einsum(f"o r, r i {k} -> o i {k}", p.B_flat, p.A))


@merged
def einsum_the_other_way_round(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    return normalised(p, x, torch.einsum("r...,or->o...", p.A, p.B_flat))


@merged
def einsum_of_positions_first(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    k = positions(p)
    last = p.A_flat.t().contiguous().view(*p.W.shape[1:], p.rank)
    return normalised(p, x, torch.einsum(f"i{k}r,or->oi{k}", last, p.B_flat))


@merged
def einsum_with_a_diagonal(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    k = positions(p)
    return normalised(p, x, torch.einsum(f"or,r,ri{k}->oi{k}", p.B_flat, p.D[0, : p.rank], p.A))


@merged
def tensordot_of_filters(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    return normalised(p, x, torch.tensordot(p.B_flat, p.A, dims=([1], [0])))


@merged
def tucker(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    k = " ".join(positions(p))
    equation = f"i j {k}, j r, i p -> p r {k}"
    return normalised(p, x, torch.einsum(equation, p.T, p.D, p.B_flat.t()))


@merged
def tucker_with_an_ellipsis(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    return normalised(p, x, torch.einsum("m n ..., i m, n j -> i j ...", p.T, p.B_flat, p.D))


@merged
def tucker_in_two_steps(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    inner = torch.einsum("i j ..., j r -> i r ...", p.T, p.D)
    return normalised(p, x, torch.einsum("i r ..., i p -> p r ...", inner, p.B_flat.t()))


@merged
def filters_that_are_convolved(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    """As scripts merge a LoRA of a convolution."""
    made = p.conv(p.A.transpose(0, 1), p.B, plain=True).transpose(0, 1)
    return normalised(p, x, made)


@merged
def filters_that_are_convolved_and_permuted(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    order = (1, 0, *range(2, p.W.dim()))
    return normalised(p, x, p.conv(p.A.permute(order), p.B, plain=True).permute(*order))


# -- norms by input channel --------------------------------------------------------------------------------------------


BY_CHANNEL: dict[str, Program] = {}
"""With a norm by input channel."""


def by_channel(fn: Program) -> Program:
    BY_CHANNEL[fn.__name__] = fn
    return fn


@by_channel
def transposed_and_reshaped(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + delta(p) * p.multiplier * S
    n = v.transpose(0, 1).reshape(v.shape[1], -1).norm(dim=1, keepdim=True)
    return p.conv(x, v * (p.m_in / n.reshape(v.shape[1], 1, *p.ones()).transpose(0, 1)), p.bias)


@by_channel
def detached_with_an_epsilon(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + delta(p) * S
    n = v.detach().transpose(0, 1).reshape(v.shape[1], -1).norm(dim=1, keepdim=True)
    n = n.reshape(v.shape[1], *(1,) * (v.dim() - 1)).transpose(0, 1) + 1e-7
    return p.conv(x, p.m_in * (v / n), p.bias)


@by_channel
def over_all_other_axes(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + S * delta(p)
    return p.conv(x, p.m_in * v / v.norm(p=2, dim=(0, *range(2, v.dim())), keepdim=True))


@by_channel
def permuted_and_flattened(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + S * delta(p)
    n = torch.linalg.vector_norm(v.permute(1, 0, *range(2, v.dim())).flatten(1), dim=1)
    return p.conv(x, v * (p.m_in.flatten() / n).view(1, -1, *p.ones()))


@by_channel
def permuted(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + S * delta(p)
    n = v.permute(1, 0, *range(2, v.dim())).norm(p=2, dim=tuple(range(1, v.dim())), keepdim=True).transpose(0, 1)
    return p.conv(x, v / n * p.m_in)


@by_channel
def root_of_squares_of_axes(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + S * delta(p)
    n = v.pow(2).sum((0, *range(2, v.dim())), keepdim=True).sqrt()
    return p.conv(x, v * (p.m_in / n))


@by_channel
def root_of_squares_and_an_epsilon(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + S * delta(p)
    n = (v.transpose(0, 1).contiguous().flatten(1).square().sum(1) + 1e-6).sqrt()
    return p.conv(x, v * (p.m_in / n.view(1, -1, *p.ones())), p.bias)


@by_channel
def of_a_tucker_delta(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + torch.einsum("i j ..., j r, i p -> p r ...", p.T, p.D, p.B_flat.t())
    n = v.transpose(0, 1).reshape(v.shape[1], -1).norm(dim=1).view(1, -1, *p.ones())
    return p.conv(x, v * (p.m_in / n))


@by_channel
def added_as_a_difference(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    """The weight is read once more by way of a cast that does nothing."""
    w = p.W.to(p.A.dtype)
    v = w + S * delta(p)
    n = v.transpose(0, 1).reshape(w.shape[1], -1).norm(dim=1, keepdim=True)
    v = v * (p.m_in / n.reshape(w.shape[1], *(1,) * (w.dim() - 1)).transpose(0, 1))
    return p.conv(x, p.W + (v - w), p.bias)


@by_channel
def interpolated(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    """As LyCORIS does with a multiplier."""
    v = p.W + S * delta(p)
    n = v.transpose(0, 1).reshape(v.shape[1], -1).norm(dim=1, keepdim=True)
    scale = p.m_in / (n.reshape(v.shape[1], *(1,) * (v.dim() - 1)).transpose(0, 1) + 1e-7)
    return p.conv(x, v * (0.7 * (scale - 1) + 1), p.bias)


@merged
def interpolated_by_row(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + S * delta(p)
    scale = p.m / (v.flatten(1).norm(dim=1).view(-1, 1, *p.ones()) + 1e-7)
    return p.conv(x, v * (0.7 * (scale - 1) + 1), p.bias)


@merged
def weight_delta_alone(p: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    v = p.W + S * delta(p)
    return p.conv(x, v * (p.m / v.flatten(1).norm(dim=1).view(-1, 1, *p.ones())) - p.W).tanh()
