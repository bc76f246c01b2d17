"""More ways to write the delta, the norm and the composition: each function is one spelling of the same small layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from programs import Layer, Program, S, lora

WIDE: dict[str, Program] = {}


def wide(fn: Program) -> Program:
    WIDE[fn.__name__] = fn
    return fn


# -- vectors ----------------------------------------------------------------------------------------------------------


@wide
def vectors_indexed_with_none(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).norm(dim=1)
    return (p.m / n)[None, None, :] * (F.linear(x, p.W) + S * lora(p, x)) + p.bias[None]


@wide
def merged_with_columns_indexed(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    return F.linear(x, p.m[:, None] * adapted / adapted.norm(dim=1)[:, None])


@wide
def everything_indexed_with_ellipsis(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W[...] + S * (p.B @ p.A)[:]
    return F.linear(x, p.m[..., None] * adapted / adapted.norm(dim=1)[:, None])


@wide
def scaled_by_a_diagonal_matrix(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).norm(dim=1)
    return (F.linear(x, p.W) + S * lora(p, x)) @ torch.diag(p.m / n)


@wide
def expanded_scaling(p: Layer, x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, p.W) + S * lora(p, x)
    return (p.m / (p.W + S * (p.B @ p.A)).norm(dim=1)).expand_as(y) * y


# -- norms ------------------------------------------------------------------------------------------------------------


@wide
def normalize_merged(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.m_column * F.normalize(p.W + S * (p.B @ p.A), dim=1), p.bias)


@wide
def norm_detached_in_place(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).norm(dim=1)
    n.detach_()
    return (p.m / n) * (F.linear(x, p.W) + S * lora(p, x))


@wide
def norm_bounded_in_place(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).norm(dim=1).detach()
    n.clamp_(min=1e-6)
    return (p.m / n) * (F.linear(x, p.W) + S * lora(p, x))


@wide
def norm_of_numpys_keywords(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.sum((p.W + S * (p.B @ p.A)) ** 2, axis=1, keepdims=True).sqrt()
    return (p.m_column / n).T * (F.linear(x, p.W) + S * lora(p, x))


@wide
def sum_accumulated_in_a_copy(p: Layer, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        adapted = p.W.clone()
        adapted.addmm_(p.B, p.A, alpha=S)
    return (p.m / adapted.norm(dim=1)) * (F.linear(x, p.W) + S * lora(p, x))


@wide
def normalize_by_column(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.m_in * F.normalize(p.W + S * (p.B @ p.A), p=2.0, dim=0, eps=1e-8), p.bias)


@wide
def weight_norm_of_the_sum(p: Layer, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, torch._weight_norm(p.W + S * (p.B @ p.A), p.m_column, 0), p.bias)


@wide
def norm_by_einsum(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    n = torch.einsum("oi,oi->o", adapted, adapted).sqrt()
    return (p.m / n) * (F.linear(x, p.W) + S * lora(p, x))


@wide
def norm_by_mean(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).square().mean(-1).mul(p.d_in).sqrt()
    return (p.m / n) * (F.linear(x, p.W) + S * lora(p, x))


@wide
def norm_by_rsqrt(p: Layer, x: torch.Tensor) -> torch.Tensor:
    scale = torch.rsqrt((p.W + S * (p.B @ p.A)).pow(2).sum(-1) + 1e-6)
    return p.m * scale * (F.linear(x, p.W) + S * lora(p, x))


@wide
def norm_bounded_by_a_tensor(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).norm(dim=1)
    return (p.m / torch.maximum(n, torch.full_like(n, 1e-6))) * (F.linear(x, p.W) + S * lora(p, x))


@wide
def squared_norm_divides(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).norm(dim=1)
    return (p.m * n / n.pow(2)) * (F.linear(x, p.W) + S * lora(p, x))


@wide
def squares_of_absolute_values(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).abs().pow(2).sum(1).sqrt()
    return (p.m / n) * (F.linear(x, p.W) + S * lora(p, x))


# -- deltas -----------------------------------------------------------------------------------------------------------


@wide
def einsum_everywhere(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * torch.einsum("or,ri->oi", p.B, p.A)).norm(dim=1)
    low = torch.einsum("bti,ri,or->bto", x, p.A, p.B)
    return (p.m / n) * (torch.einsum("bti,oi->bto", x, p.W) + S * low)


@wide
def einsum_transposed(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * torch.einsum("ri,or->oi", [p.A, p.B])).norm(dim=1)
    return (p.m / n) * (torch.einsum("...i,oi->...o", x, p.W) + S * lora(p, x))


@wide
def middle_matrix(p: Layer, x: torch.Tensor) -> torch.Tensor:
    middle = torch.outer(p.d, p.d)
    n = (p.W + S * (p.B @ middle @ p.A)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + S * F.linear(F.linear(F.linear(x, p.A), middle), p.B))


@wide
def concatenated_factors(p: Layer, x: torch.Tensor) -> torch.Tensor:
    up, down = torch.cat([p.B, p.B2], 1), torch.cat([p.A, p.A2], 0)
    n = (p.W + S * (up @ down)).norm(dim=1).detach()
    return (p.m / n) * (F.linear(x, p.W) + S * (x @ down.T @ up.T))


@wide
def block_diagonal_factors(p: Layer, x: torch.Tensor) -> torch.Tensor:
    up = torch.block_diag(p.B[:5], p.B2[5:])
    down = torch.cat([p.A, p.A2], 0)
    n = (p.W + S * (up @ down)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + S * F.linear(F.linear(x, down), up))


@wide
def gathered_factors(p: Layer, x: torch.Tensor) -> torch.Tensor:
    index = torch.tensor([2, 0])
    up, down = p.B[:, index], p.A.index_select(0, index)
    n = (p.W + S * (up @ down)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + S * F.linear(F.linear(x, down), up))


@wide
def rank_masked_factors(p: Layer, x: torch.Tensor) -> torch.Tensor:
    mask = (torch.arange(p.rank) < 2).to(x.dtype)
    n = (p.W + S * ((p.B * mask) @ p.A)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + S * F.linear(F.linear(x, p.A) * mask, p.B))


@wide
def rank_one_by_outer(p: Layer, x: torch.Tensor) -> torch.Tensor:
    down = p.A[0]
    n = (p.W + S * torch.outer(p.b, down)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + S * (x @ down.unsqueeze(-1)) * p.b)


@wide
def rank_one_by_broadcasting(p: Layer, x: torch.Tensor) -> torch.Tensor:
    down = p.A[0]
    n = (p.W + S * p.b[:, None] * down[None, :]).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + S * (x @ down[:, None]) * p.b)


@wide
def factor_normalised_first(p: Layer, x: torch.Tensor) -> torch.Tensor:
    down = p.A / p.A.norm(dim=1, keepdim=True)
    n = (p.W + S * (p.B @ down)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + S * F.linear(F.linear(x, down), p.B))


@wide
def delta_through_flat_views(p: Layer, x: torch.Tensor) -> torch.Tensor:
    delta = torch.mm(p.B.view(p.d_out, -1), p.A.reshape(p.rank, -1)).view(p.W.shape)
    n = (p.W + S * delta).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + S * lora(p, x))


@wide
def difference_of_two_chains(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + p.B @ p.A - (p.B2 @ p.A2)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + lora(p, x) - F.linear(F.linear(x, p.A2), p.B2))


@wide
def baddbmm_free_sum(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = torch.addmm(p.W, p.B, p.A, beta=1.0, alpha=S)
    return F.linear(x, adapted * (p.m / torch.linalg.norm(adapted, ord=2, dim=-1)).view(-1, 1))


@wide
def batched_product_of_one(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * torch.bmm(p.B[None], p.A.unsqueeze(0)).squeeze(0)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + S * lora(p, x))


@wide
def scaled_within_one_einsum(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + torch.einsum("o,or,r,ri->oi", p.b, p.B, p.d, p.A)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + torch.einsum("bti,ri,r,or,o->bto", x, p.A, p.d, p.B, p.b))


@wide
def inner_and_tensordot(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * torch.tensordot(p.B, p.A, dims=1)).norm(dim=1)
    low = torch.tensordot(torch.inner(x, p.A), p.B, dims=([2], [1]))
    return (p.m / n) * (torch.inner(x, p.W) + S * low)


@wide
def middle_matrix_as_in_tucker(p: Layer, x: torch.Tensor) -> torch.Tensor:
    middle = p.A2[:, :3].T @ p.B2[:3].T
    n = (p.W + torch.linalg.multi_dot([p.B, middle, p.A])).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + x @ p.A.T @ middle.T @ p.B.T)


@wide
def sum_over_a_stack(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + torch.stack([p.B @ p.A, p.B2 @ p.A2]).sum(0)
    return F.linear(x, p.m_column * adapted / adapted.norm(dim=1, keepdim=True))


@wide
def mean_over_a_stack(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + torch.stack((p.B @ p.A, p.B2 @ p.A2)).mean(dim=0)).norm(dim=1)
    return (p.m / n) * (F.linear(x, p.W) + 0.5 * (lora(p, x) + F.linear(F.linear(x, p.A2), p.B2)))


# -- compositions -----------------------------------------------------------------------------------------------------


@wide
def addcmul_delta_form(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = p.m / (p.W + S * (p.B @ p.A)).norm(dim=1).detach()
    base = F.linear(x, p.W)
    return torch.addcmul(torch.addcmul(base, g - 1, base), g, lora(p, x), value=S)


@wide
def lerp_of_the_scaling(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = p.m / (p.W + S * (p.B @ p.A)).norm(dim=1).detach()
    return torch.lerp(torch.ones_like(g), g, 0.5) * (F.linear(x, p.W) + S * lora(p, x))


@wide
def addcdiv_onto_the_bias(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = (p.W + S * (p.B @ p.A)).norm(dim=1).detach()
    return torch.addcdiv(p.bias, (F.linear(x, p.W) + S * lora(p, x)) * p.m, n)


@wide
def rows_and_columns(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    rows, columns = adapted.norm(dim=1, keepdim=True).detach(), adapted.norm(dim=0, keepdim=True).detach()
    return F.linear(x, p.m_column * adapted / rows * (p.m_in / columns))


@wide
def squares_by_float_power(p: Layer, x: torch.Tensor) -> torch.Tensor:
    n = torch.float_power(p.W + S * (p.B @ p.A), 2).sum(dim=1).sqrt()
    return p.m / n * (F.linear(x, p.W) + S * lora(p, x))


@wide
def squares_on_the_diagonal_of_a_product(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    return F.linear(x, adapted * (p.m / torch.diagonal(adapted @ adapted.T).sqrt())[:, None])


@wide
def dropout_correction(p: Layer, x: torch.Tensor) -> torch.Tensor:
    dropped = x * (x.detach() > 0)
    g = p.m / (p.W + S * (p.B @ p.A)).norm(dim=1).detach()
    return F.linear(x, p.W) + (g - 1) * F.linear(dropped, p.W) + g * S * lora(p, dropped)


@wide
def biased_base_of_the_dropped_input(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """The bias enters twice, and somebody else reads the product with it."""
    dropped = x * (x.detach() > 0)
    g = p.m / (p.W + S * (p.B @ p.A)).norm(dim=1).detach()
    base = F.linear(dropped, p.W, p.bias)
    y = F.linear(x, p.W, p.bias) + (g - 1) * base + g * S * lora(p, dropped)
    return torch.relu(y) + base.sin()


@wide
def adapter_dropped_afterwards(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = p.m / (p.W + S * (p.B @ p.A)).norm(dim=1).detach()
    low = lora(p, x)
    return g * (F.linear(x, p.W) + S * low * (low.detach() > 0))


@wide
def another_input_for_each_branch(p: Layer, x: torch.Tensor) -> torch.Tensor:
    first, second = x * (x.detach() > 0), x * (x.detach() < 0.5)
    g = p.m / (p.W + S * (p.B @ p.A)).norm(dim=1).detach()
    return F.linear(x, p.W) + (g - 1) * F.linear(first, p.W) + g * S * lora(p, second)


@wide
def bias_added_in_place(p: Layer, x: torch.Tensor) -> torch.Tensor:
    y = (F.linear(x, p.W) + S * lora(p, x)) * (p.m / (p.W + S * (p.B @ p.A)).norm(dim=1))
    y += p.bias
    return y


@wide
def magnitude_relative_to_the_weights_own_norm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    """One scaling with two norms in it, of which only one is DoRA's."""
    own = (p.W.pow(2).sum(1) + 1e-6).sqrt() * (1 + p.m)
    return own / (p.W + S * (p.B @ p.A)).norm(dim=1) * (F.linear(x, p.W) + S * lora(p, x))


@wide
def two_layers_share_the_weight(p: Layer, x: torch.Tensor) -> torch.Tensor:
    first = (p.m / (p.W + S * (p.B @ p.A)).norm(dim=1)) * (F.linear(x, p.W) + S * lora(p, x))
    second = F.linear(F.linear(x, p.A2), p.B2)
    return first + (p.b / (p.W + p.B2 @ p.A2).norm(dim=1)) * (F.linear(x, p.W) + second)


@wide
def two_layers_share_a_factor_and_their_input(p: Layer, x: torch.Tensor) -> torch.Tensor:
    other = p.W.flip(0)
    low = F.linear(x, p.A)
    first = (p.m / (p.W + S * (p.B @ p.A)).norm(dim=1)) * (F.linear(x, p.W) + S * F.linear(low, p.B))
    up = p.B.roll(1, 0)
    return first + (p.b / (other + up @ p.A).norm(dim=1)) * (F.linear(x, other) + F.linear(low, up))


@wide
def one_projection_in_two_chunks(p: Layer, x: torch.Tensor) -> torch.Tensor:
    upper, lower = p.W.chunk(2)
    first = (p.m[:5] / (upper + S * (p.B[:5] @ p.A)).norm(dim=1)) * (F.linear(x, upper) + S * lora(p, x)[..., :5])
    return torch.cat([first, F.linear(x, lower)], -1)


@wide
def scaling_broadcast_to_the_output(p: Layer, x: torch.Tensor) -> torch.Tensor:
    y = F.linear(x, p.W) + S * lora(p, x)
    return (p.m / (p.W + S * (p.B @ p.A)).norm(dim=1)).broadcast_to(y.shape) * y


@wide
def scaled_by_einsum(p: Layer, x: torch.Tensor) -> torch.Tensor:
    g = p.m / (p.W + S * (p.B @ p.A)).norm(dim=1)
    return torch.einsum("bto,o->bto", F.linear(x, p.W) + S * lora(p, x), g)


@wide
def weights_repeated_for_a_batch(p: Layer, x: torch.Tensor) -> torch.Tensor:
    count = x.shape[0]
    low = torch.bmm(torch.bmm(x, p.A.T.expand(count, -1, -1)), p.B.T[None].expand(count, -1, -1))
    return (p.m / (p.W + p.B @ p.A).norm(dim=1)) * (torch.bmm(x, p.W.T.expand(count, -1, -1)) + low)


@wide
def added_by_baddbmm(p: Layer, x: torch.Tensor) -> torch.Tensor:
    up = p.B.T.unsqueeze(0).expand(x.shape[0], -1, -1)
    y = torch.baddbmm(F.linear(x, p.W), F.linear(x, p.A), up, alpha=S)
    return (p.m / (p.W + S * (p.B @ p.A)).norm(dim=1)) * y


@wide
def a_single_token(p: Layer, x: torch.Tensor) -> torch.Tensor:
    token = x[0, 0]
    y = F.linear(token, p.W, p.bias) + S * lora(p, token)
    return torch.tanh(y * p.m / (p.W + S * (p.B @ p.A)).norm(dim=1) + p.b)


@wide
def a_single_token_from_the_right(p: Layer, x: torch.Tensor) -> torch.Tensor:
    token = x[0, 0]
    y = torch.mv(p.W, token) + S * (p.B @ (p.A @ token))
    return (p.m / (p.W + S * (p.B @ p.A)).norm(dim=1)) * y


@wide
def tokens_in_columns(p: Layer, x: torch.Tensor) -> torch.Tensor:
    tokens = x.flatten(0, 1).tanh().T
    y = p.W @ tokens + S * (p.B @ (p.A @ tokens))
    return (p.m / (p.W + S * (p.B @ p.A)).norm(dim=1)).unsqueeze(-1) * y + p.bias[:, None]


@wide
def merged_weight_from_the_left(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A)
    return (p.b[:, None] * adapted / adapted.norm(dim=1, keepdim=True)) @ x.flatten(0, 1).tanh().T


@wide
def merged_with_one_row_repeated(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B @ p.A[:1].expand(p.B.shape[1], -1))
    return F.linear(x, p.m_column * adapted * adapted.pow(2).sum(1, keepdim=True).rsqrt())


@wide
def one_row_repeated(p: Layer, x: torch.Tensor) -> torch.Tensor:
    down = p.A[:1].expand(p.B.shape[1], -1)
    g = p.m / (p.W + S * (p.B @ down)).norm(dim=1)
    return g * F.linear(x, p.W) + F.linear(F.linear(x, down), p.B) * S * g


@wide
def one_row_repeated_and_transposed(p: Layer, x: torch.Tensor) -> torch.Tensor:
    down = p.A[:1].expand(p.B.shape[1], -1)
    g = p.m / (p.W + S * F.linear(p.B, down.t())).norm(dim=1)
    return g * F.linear(x, p.W) + F.linear(F.linear(x, down), p.B) * S * g


@wide
def merged_with_one_row_and_one_column_repeated(p: Layer, x: torch.Tensor) -> torch.Tensor:
    adapted = p.W + S * (p.B[:, :1].expand(-1, 3) @ p.A[:1].expand(3, -1))
    return F.linear(x, p.m_column * adapted / adapted.norm(dim=1, keepdim=True))
