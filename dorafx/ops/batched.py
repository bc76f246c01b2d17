"""The row norm of a batch of weights, one for each expert: of all of them in one call, without a dense product.

The algorithms are those of :mod:`dorafx.ops.norm`. Small experts are taken several at a time, in a buffer that stays below one eighth of
the batch's size; large ones block by block.
"""

from __future__ import annotations

import torch

from dorafx._compat.autograd import below_autocast

from . import norm
from .norm import compute_dtype, gradient_buffer, with_less_memory


def _at_once(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, dtype: torch.dtype, shrink: int) -> int:
    """How many experts fit into a buffer, together with the factors that are cast for them; 0 if not even one does."""
    batch, d_out, d_in = weight.shape
    if not batch:
        return 0
    one = d_out * d_in + sum(t.numel() // batch for t in (left, right) if t.dtype != dtype)
    return min(batch, norm.buffer_limit(weight, dtype, shrink) // max(one, 1))


def row_norm_batched(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    algorithm: str = "auto",
    factor_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``n[e, i] = ‖weight[e, i] + scale·(left[e]·right[e])[i]‖₂``.

    Args:
        weight: ``[batch, d_out, d_in]``, any strides, fp16 to fp64.
        left: ``[batch, d_out, r]``; may have another floating dtype than the weight.
        right: ``[batch, r, d_in]``.
        scale, algorithm, factor_dtype: see :func:`dorafx.ops.norm.row_norm`.

    Returns:
        ``[batch, d_out]`` in fp32, in fp64 where an operand is fp64. A zero row gives 0; NaN and inf propagate.

    Raises:
        ValueError, TypeError: see :func:`dorafx.ops.norm.check_operands`, :func:`dorafx.ops.norm.check_algorithm`.
        RuntimeError: out of memory, with the smallest blocks too (see :func:`dorafx.ops.norm.with_less_memory`).
    """
    norm.check_operands(weight, left, right, batched=True)
    norm.check_algorithm(algorithm, factor_dtype)
    with below_autocast():
        alone = norm.norm_without_delta(weight, left, right, scale)
        if alone is not None:
            return alone
        return with_less_memory(lambda shrink: _norms(weight, left, right, scale, algorithm == "factored", shrink))


def _norms(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, factored: bool, shrink: int
) -> torch.Tensor:
    dtype = compute_dtype(weight, left, right)
    batch, d_out, d_in = weight.shape
    norms = torch.empty(batch, d_out, dtype=dtype, device=weight.device)
    if not weight.numel():
        return norms.zero_()
    count = _at_once(weight, left, right, dtype, shrink)
    if not count:
        one = norm.factored if factored else norm.tiled
        for e in range(batch):
            norms[e] = one(weight[e], left[e], right[e], scale, shrink=shrink)
        return norms
    buffer = torch.empty(0 if factored else count, d_out, d_in, dtype=dtype, device=weight.device)
    for start in range(0, batch, count):
        some = slice(start, start + count)
        lefts, rights = left[some].to(dtype), right[some].to(dtype)
        if factored:
            norms[some] = _factored(weight[some].to(dtype), lefts, rights, scale)
            continue
        block = buffer[: min(count, batch - start)]
        block.copy_(weight[some]).baddbmm_(lefts, rights, alpha=scale)
        torch.linalg.vector_norm(block, dim=2, out=norms[some])
    return norms


def _factored(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    totals = torch.linalg.vector_norm(weight, dim=2).square_()
    totals += 2 * scale * torch.bmm(weight, right.mT).mul_(left).sum(dim=2)
    totals += scale * scale * torch.bmm(left, torch.bmm(right, right.mT)).mul_(left).sum(dim=2)
    # Rounding may leave a tiny negative number where W and the delta cancel; NaN must pass.
    return torch.where(totals < 0, 0.0, totals).sqrt_()


def row_norm_batched_unrolled(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, *how: object
) -> torch.Tensor:
    """:func:`row_norm_batched` as a fixed sequence of aten calls, for graphs that may hold nothing else: at most ten blocks of rows of all
    experts, or twenty if the weight is cast.

    Raises:
        ValueError: the number of rows is symbolic.
    """
    dtype = compute_dtype(weight, left, right)
    d_out = weight.shape[1]
    if not isinstance(d_out, int):
        raise ValueError(f"row_norm_batched: a weight of symbolic size {tuple(weight.shape)} has no number of blocks")
    rows = max(1, -(-d_out // (10 if weight.dtype == dtype else 20)))
    wide_left, wide_right = left.to(dtype) * scale, right.to(dtype)
    norms = []
    for first in range(0, d_out, rows):
        block, side = (t.narrow(1, first, min(rows, d_out - first)) for t in (weight, wide_left))
        norms.append(torch.linalg.vector_norm(torch.baddbmm(block.to(dtype), side, wide_right), dim=2))
    return torch.cat(norms, 1) if norms else weight.new_zeros((weight.shape[0], 0), dtype=dtype)


def row_norm_batched_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    n: torch.Tensor,
    scale: float,
    needs_weight: bool,
    needs_left: bool,
    needs_right: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the norms, by the formulas of :func:`dorafx.ops.norm.row_norm_backward`.

    Returns:
        Gradients in the dtypes and layouts of weight, left and right; an empty tensor for each that is not needed.

    Raises:
        ValueError, TypeError: see :func:`dorafx.ops.norm.check_backward`.
    """
    norm.check_backward(grad, weight, left, right, n, batched=True)
    needs = needs_weight, needs_left, needs_right

    def compute(shrink: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = compute_dtype(weight, left, right)
        grads = [gradient_buffer(need, t) for need, t in zip(needs, (weight, left, right))]
        batch = weight.shape[0]
        # No dense intermediate is made of a weight that needs no gradient and that a product reads as it is.
        whole = weight.dtype == dtype and not needs_weight and 1 in weight.stride()[1:]
        count = batch if whole else _at_once(weight, left, right, dtype, shrink)
        if not count:
            for e in range(batch):
                one = norm.row_norm_backward(grad[e], weight[e], left[e], right[e], n[e], scale, *needs)
                for to, value, need in zip(grads, one, needs):
                    if need:
                        to[e] = value
        for start in range(0, batch if count else 0, max(count, 1)):
            some = slice(start, start + count)
            # As in ATen, the gradient of a zero row is 0, or NaN if the incoming gradient is infinite.
            c = torch.where(n[some] == 0, grad[some].to(dtype) * 0.0, grad[some].to(dtype) / n[some])[:, :, None]
            operands = (t[some].to(dtype) for t in (weight, left, right))
            for to, gradient in zip(grads, _gradients(c, *operands, scale=scale, needs=needs)):
                if gradient is not None:
                    to[some] = gradient
        return grads[0], grads[1], grads[2]

    with below_autocast():
        return with_less_memory(compute)


def _gradients(
    c: torch.Tensor,
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    *,
    scale: float,
    needs: tuple[bool, bool, bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    needs_weight, needs_left, needs_right = needs
    d_weight = d_left = d_right = None
    if needs_weight:
        d_weight = torch.baddbmm(weight, left, right, alpha=scale).mul_(c)
    if needs_left:
        product = torch.bmm(weight, right.mT)
        d_left = product.baddbmm_(left, torch.bmm(right, right.mT), alpha=scale).mul_(c).mul_(scale)
    if needs_right:
        scaled = (c * left).mT
        d_right = torch.bmm(scaled, weight).mul_(scale)
        d_right.baddbmm_(torch.bmm(scaled, left), right, alpha=scale * scale)
    return d_weight, d_left, d_right
