"""Linears with gradients of their own: one that ends in a composition, ``y = g ⊙ (x·Wᵀ + s·h·Bᵀ) + bias``, as one operator, and
one whose weight has a lower precision than its input.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dorafx import _compat

from . import layout
from .composition import forward_math, kept_dtype, records_gradients, refuse_forward_mode, refuse_second_derivative

__all__ = [
    "CastLinear",
    "DoraLinear",
    "cast_linear",
    "cast_linear_backward",
    "check_cast_linear",
    "check_linear",
    "dora_linear",
    "linear_math",
]

_LINEAR_OPERANDS = ("x", "weight", "h", "left", "g")


def check_linear(x: Any, weight: Any, h: Any, left: Any, g: Any, bias: Any) -> None:
    """Raise what is wrong with the operands of a DoRA linear.

    Raises:
        ValueError: shapes that do not fit together, or several devices.
        TypeError: factors of a product that differ in dtype.
    """
    vectors = [v for v in (g, bias) if v is not None]
    fits = (
        x.dim() >= 1
        and weight.dim() == left.dim() == 2
        and x.shape[:-1] == h.shape[:-1]
        and (x.shape[-1], h.shape[-1], weight.shape[0]) == (weight.shape[1], left.shape[1], left.shape[0])
        and all(v.shape == weight.shape[:1] for v in vectors)
    )
    if not fits:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in zip(_LINEAR_OPERANDS, (x, weight, h, left, g)))
        raise ValueError(
            "dora_linear takes x [.., d_in], weight [d_out, d_in], h [.., r], left [d_out, r], g and bias [d_out], "
            f"whose shapes must agree; got {shapes}, bias {None if bias is None else tuple(bias.shape)}"
        )
    if x.dtype != weight.dtype or h.dtype != left.dtype:
        raise TypeError(
            f"dora_linear multiplies operands of one dtype; x is {x.dtype}, weight {weight.dtype}, h {h.dtype}, left {left.dtype}"
        )
    tensors = (x, weight, h, left, *vectors)
    if any(t.device != x.device for t in tensors):
        raise ValueError(
            f"dora_linear's operands are on {', '.join(str(t.device) for t in tensors)}; one device is needed"
        )


def linear_math(
    x: torch.Tensor,
    weight: torch.Tensor,
    h: torch.Tensor,
    left: torch.Tensor,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    out_dtype: torch.dtype,
    kept: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`dorafx.ops.triton.dispatch.dora_linear_forward`; the sum is None where it is not kept."""
    with _compat.below_autocast():
        base, lora = torch.nn.functional.linear(x, weight), torch.nn.functional.linear(h, left)
    return forward_math(None, base, lora, g, bias, scale, out_dtype, kept)


def _rows(values: torch.Tensor) -> torch.Tensor:
    """``[.., d]`` as ``[tokens, d]``. Not by ``flatten``, for which vmap has no rule (``is_grads_batched``)."""
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])


class DoraLinear(torch.autograd.Function):
    """``g ⊙ (x·Wᵀ + s·h·Bᵀ) + bias``. Saves ``x·Wᵀ + s·h·Bᵀ`` where g is trained, and what plain LoRA saves."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, h: Any, left: Any, g: Any, bias: Any, scale: float, out_dtype: torch.dtype
    ) -> torch.Tensor:
        of_x, of_weight, of_h, of_left, of_g, of_bias = ctx.needs_input_grad[:6]
        kept = kept_dtype(x, h, out_dtype) if of_g else None
        y, total = torch.ops.dorafx.dora_linear_forward.default(x, weight, h, left, g, bias, scale, out_dtype, kept)
        ctx.save_for_backward(
            g,
            total if of_g else None,
            x if of_weight else None,
            weight if of_x else None,
            h if of_left else None,
            left if of_h else None,
        )
        ctx.scale, ctx.bias_dtype = scale, bias.dtype if of_bias else None
        ctx.base_dtype = x.dtype if of_x or of_weight else None
        ctx.lora_dtype = h.dtype if of_h or of_left else None
        return y  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative("dora_linear")
        g, total, x, weight, h, left = ctx.saved_tensors
        dtypes = (ctx.base_dtype, ctx.lora_dtype, total is not None, ctx.bias_dtype)
        d_base, d_lora, d_g, d_bias = torch.ops.dorafx.compose_backward.default(
            grad, g, total, ctx.scale, False, *dtypes
        )
        return (
            None if weight is None else d_base @ weight,
            None if x is None else _rows(d_base).mT @ _rows(x),
            None if left is None else d_lora @ left,
            None if h is None else _rows(d_lora).mT @ _rows(h),
            d_g if total is not None else None,
            d_bias if ctx.bias_dtype is not None else None,
            None,
            None,
        )


def dora_linear(
    x: Any, weight: Any, h: Any, left: Any, g: Any, bias: Any, scale: float, out_dtype: torch.dtype
) -> torch.Tensor:
    """``torch.ops.dorafx.dora_linear``: ``g ⊙ (x·Wᵀ + s·h·Bᵀ) + bias``."""
    check_linear(x, weight, h, left, g, bias)
    inputs = (x, weight, h, left, g, bias)
    refuse_forward_mode("dora_linear", *inputs)
    if records_gradients(*inputs):
        return DoraLinear.apply(*inputs, scale, out_dtype)  # type: ignore[no-any-return]
    return torch.ops.dorafx.dora_linear_forward.default(*inputs, scale, out_dtype, None)[0]  # type: ignore[no-any-return]


class CastLinear(torch.autograd.Function):
    """``x·Wᵀ`` with ``W`` cast to the dtype of ``x``. Saves ``W``, where autograd would keep the cast copy."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> torch.Tensor:
        of_x, of_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)
        ctx.weight_dtype = weight.dtype
        return _cast_linear_math(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative("cast_linear")
        x, weight = ctx.saved_tensors
        # An operator of its own: a partitioner that sees a cast in it would take it for the forward's, and keep the copy.
        d_x = None if weight is None else torch.ops.dorafx.cast_linear_backward.default(grad, weight)
        d_weight = None if x is None else (_rows(grad).mT @ _rows(x)).to(ctx.weight_dtype)
        return d_x, d_weight


def _cast_linear_math(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with _compat.below_autocast():
        return torch.nn.functional.linear(x, weight.to(x.dtype))


def cast_linear(x: Any, weight: Any) -> torch.Tensor:
    """``torch.ops.dorafx.cast_linear``: ``x·Wᵀ``, x ``[.., d_in]``, W ``[d_out, d_in]`` of any floating dtype; the result has
    the dtype of x, also under autocast.

    Raises:
        ValueError: see :func:`check_cast_linear`.
        RuntimeError: forward-mode differentiation.
    """
    check_cast_linear(x, weight)
    refuse_forward_mode("cast_linear", x, weight)
    if records_gradients(x, weight):
        return CastLinear.apply(x, weight)  # type: ignore[no-any-return]
    return _cast_linear_math(x, weight)


def check_cast_linear(x: torch.Tensor, weight: torch.Tensor, backward: bool = False) -> None:
    """Raise what is wrong with the operands of a linear whose weight is cast, or of its backward, where ``x`` is the gradient.

    Raises:
        ValueError: shapes or devices that do not fit together.
    """
    fits = weight.dim() == 2 and x.dim() >= 1 and x.shape[-1] == weight.shape[0 if backward else 1]
    if not fits or x.device != weight.device:
        takes = "cast_linear_backward takes grad [.., d_out]" if backward else "cast_linear takes x [.., d_in]"
        raise ValueError(
            f"{takes} and a weight [d_out, d_in] on one device; got {tuple(x.shape)} on {x.device}, weight "
            f"{tuple(weight.shape)} on {weight.device}"
        )


def cast_linear_backward(grad: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``grad·W``, contiguous.

    Raises:
        ValueError: see :func:`check_cast_linear`.
    """
    check_cast_linear(grad, weight, backward=True)
    with _compat.below_autocast():
        return layout.settled(grad @ weight.to(grad.dtype))
