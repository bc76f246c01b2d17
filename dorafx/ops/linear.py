"""Linears with custom gradients: ``y = g ⊙ (x·Wᵀ + s·h·Bᵀ) + bias``, a linear and its composition as one operator; and a linear
whose weight has a lower precision than its input.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from dorafx._compat.autograd import below_autocast

from . import layout

_LINEAR_OPERANDS = ("x", "weight", "h", "left", "g")


def check_linear(x: Any, weight: Any, h: Any, left: Any, g: Any, bias: Any) -> None:
    """Check the operands of a DoRA linear.

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


def rows(values: torch.Tensor) -> torch.Tensor:
    """``[.., d]`` as ``[tokens, d]``. Without ``flatten``: vmap (``is_grads_batched``) has no rule for it."""
    return values.reshape(math.prod(values.shape[:-1]), values.shape[-1])


def cast_linear_math(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    with below_autocast():
        return torch.nn.functional.linear(x, weight.to(x.dtype))


def check_cast_linear(x: torch.Tensor, weight: torch.Tensor, backward: bool = False) -> None:
    """Check the operands of a linear whose weight is cast, or of its backward, where ``x`` is the gradient.

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
    with below_autocast():
        return layout.settled(grad @ weight.to(grad.dtype))
