"""DoRA as people write it: each function is one spelling, all of the same small layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

S = 1.7


@dataclass
class Layer:
    """Parameters of one DoRA layer in fp64: W ``[d_out, d_in]``, A ``[r, d_in]``, B ``[d_out, r]``, m and bias ``[d_out]``."""

    d_out: int = 10
    d_in: int = 12
    rank: int = 3
    W: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape: int) -> torch.Tensor:
            return torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator) * 0.3)

        self.W = parameter(self.d_out, self.d_in).requires_grad_(False)
        self.A, self.B = parameter(self.rank, self.d_in), parameter(self.d_out, self.rank)
        self.A2, self.B2 = parameter(2, self.d_in), parameter(self.d_out, 2)
        self.m = (parameter(self.d_out).detach().abs() + 0.5).requires_grad_()
        self.m_column = self.m.detach()[:, None].clone().requires_grad_()
        self.m_in = (parameter(1, self.d_in).detach().abs() + 0.5).requires_grad_()
        self.bias = parameter(self.d_out)
        self.d = parameter(self.rank)
        self.b = parameter(self.d_out)

    def trainable(self) -> list[torch.Tensor]:
        return [p for p in vars(self).values() if isinstance(p, torch.Tensor) and p.requires_grad]


Program = Callable[[Layer, torch.Tensor], torch.Tensor]
LINEAR: dict[str, Program] = {}


def linear(fn: Program) -> Program:
    LINEAR[fn.__name__] = fn
    return fn


def lora(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, p.A), p.B)


@linear
def direct(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.linalg.vector_norm(p.W + S * (p.B @ p.A).detach(), dim=1).detach()
    return (p.m / n) * (F.linear(x, p.W) + S * lora(p, x)) + p.bias


@linear
def bias_scaled_by_g(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.linalg.norm(p.W + S * (p.B @ p.A).detach(), dim=1).detach()
    return (p.m / n) * (F.linear(x, p.W, p.bias) + S * lora(p, x))


@linear
def identity_forward_delta_form(p: Layer, x: torch.Tensor) -> torch.Tensor:
    base = F.linear(x, p.W, p.bias)
    eye = torch.eye(p.d_in, dtype=x.dtype)
    delta = F.linear(F.linear(eye, p.A), p.B).T
    g = (p.m / torch.linalg.norm(p.W + S * delta.detach(), dim=1).detach()).view(1, -1)
    return base + (g - 1) * base + g * lora(p, x) * S


@linear
def bias_taken_off_first(p: Layer, x: torch.Tensor) -> torch.Tensor:
    base = F.linear(x, p.W, p.bias)
    g = p.m / (p.W + S * (p.B @ p.A).detach()).norm(dim=1).detach()
    return base + ((g - 1) * (base - p.bias) + g * lora(p, x) * S)


@linear
def merged_weight_differentiable(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    return F.linear(x, p.m_column * adapted / adapted.norm(p=2, dim=1, keepdim=True), p.bias)


@linear
def merged_weight_detached_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * torch.matmul(p.B, p.A)
    return F.linear(x, p.m_column * (adapted / adapted.norm(p=2, dim=1, keepdim=True).detach()), p.bias)


@linear
def column_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    return F.linear(x, p.m_in * (adapted / adapted.norm(p=2, dim=0, keepdim=True)))


@linear
def weight_on_the_left(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W.t() + S * (p.A.t() @ p.B.t())
    return (x @ (adapted / torch.norm(adapted, dim=0))) * p.m


@linear
def sequential_ops(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A).norm(p=2, dim=1)
    return (F.linear(x, p.W) + lora(p, x)) / n * p.m + p.bias


@linear
def sequential_in_place(p: Layer, x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, p.W).clone()
    y += lora(p, x)
    y /= (p.W + p.B @ p.A).norm(p=2, dim=1).detach()
    y *= p.m
    return y


@linear
def root_of_sum_of_squares(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    n = torch.sqrt((adapted * adapted).sum(dim=1) + 1e-6)
    return (F.linear(x, p.W) + S * lora(p, x)) * (p.m / n)


@linear
def epsilon_on_the_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).pow(2).sum(1).sqrt() + 1e-3
    return (F.linear(x, p.W) + S * lora(p, x)) * (p.m / n)


@linear
def clamped_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).norm(dim=1).clamp(min=1e-6)
    return (F.linear(x, p.W) + S * lora(p, x)) * (p.m / n)


@linear
def weight_delta(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    scaled = (p.m / adapted.norm(dim=1).detach()).unsqueeze(1) * adapted
    return F.linear(x, p.W, p.bias) + F.linear(x, scaled - p.W)


@linear
def g_minus_one_on_the_sum(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    y = F.linear(x, adapted)
    return y + (p.m / adapted.norm(dim=1).detach() - 1) * y


@linear
def interpolated_scaling(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = 0.5 * (p.m / (p.W + S * (p.B @ p.A)).norm(dim=1).detach() - 1) + 1
    return g * (F.linear(x, p.W) + S * lora(p, x))


@linear
def diagonal_scalings_as_in_vera(p: Layer, x: torch.Tensor) -> torch.Tensor:
    delta = torch.diag(p.b) @ p.B @ torch.diag(p.d) @ p.A
    return (p.m / (p.W + delta).norm(dim=1)) * (F.linear(x, p.W) + F.linear(F.linear(x, p.A) * p.d, p.B) * p.b)


@linear
def elementwise_scalings_as_in_vera(p: Layer, x: torch.Tensor) -> torch.Tensor:
    delta = (p.b.unsqueeze(-1) * p.B) @ (p.d.unsqueeze(-1) * p.A)
    return (p.m / (p.W + delta).norm(dim=1)) * (F.linear(x, p.W) + p.b * F.linear(p.d * F.linear(x, p.A), p.B))


@linear
def sum_of_two_chains(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A) + 0.3 * (p.B2 @ p.A2)).norm(dim=1).detach()
    return (p.m / n) * (F.linear(x, p.W) + S * lora(p, x) + 0.3 * F.linear(F.linear(x, p.A2), p.B2))


@linear
def flattened_tokens(p: Layer, x: torch.Tensor) -> torch.Tensor:
    flat = x.reshape(-1, p.d_in)
    y = (p.m / (p.W + S * (p.B @ p.A)).norm(dim=1)) * (flat @ p.W.T + S * (flat @ p.A.T @ p.B.T))
    return y.view(*x.shape[:-1], p.d_out)


@linear
def double_transposes(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.linalg.norm(p.W + S * (p.A.T @ p.B.T).T, dim=1)
    return (p.m / n) * (
        x.matmul(p.W.transpose(0, 1))
        + S * torch.matmul(torch.mm(x.flatten(0, -2), p.A.t()), p.B.t()).view(*x.shape[:-1], -1)
    )


@linear
def other_input_for_the_adapter(p: Layer, x: torch.Tensor) -> torch.Tensor:
    masked = x * (x > 0).to(x.dtype)
    n = torch.linalg.norm(p.W + S * (p.B @ p.A).detach(), dim=1).detach()
    return (p.m / n) * (F.linear(x, p.W) + S * lora(p, masked))


@linear
def scaling_as_a_tensor(p: Layer, x: torch.Tensor) -> torch.Tensor:
    scale = p.d.detach().abs().sum()
    n = torch.linalg.norm(p.W + scale * (p.B @ p.A), dim=1).detach()
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x) * scale)


@linear
def norm_under_no_grad(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        n = (p.W + S * p.B @ p.A).norm(p=2, dim=1)
    return (F.linear(x, p.W) + S * lora(p, x)) * (p.m / n)
