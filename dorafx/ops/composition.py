"""The composition ``y = g ⊙ (base + s·lora) + bias`` and its delta form, with gradients that save one activation.

The arithmetic is fp32 (fp64 for fp64) with one rounding at the end: near ``g = 1`` in half precision that is at least
as accurate as adding ``(g - 1)·base`` separately, since nothing is rounded before the sum. Each forward and backward is
a handful of pointwise ATen calls, so Inductor fuses it into what stands before and behind.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["Compose", "ComposeDelta", "compose_math", "delta_math", "refuse_second_derivative"]


def refuse_second_derivative(operator: str) -> None:
    """Called in a backward: gradients are recorded there exactly when the caller passed ``create_graph=True``.

    Raises:
        RuntimeError: always in that case. A silent zero would be wrong, and training DoRA needs no second derivatives.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"dorafx.{operator} has no second derivative (create_graph=True); call dorafx.restore(model), or compile "
            "with another backend, where one is needed"
        )


def _wide(out_dtype: torch.dtype, *tensors: torch.Tensor | None) -> torch.dtype:
    dtypes = {t.dtype for t in tensors if t is not None} | {out_dtype}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _sum(base: torch.Tensor, lora: torch.Tensor | None, scale: float, wide: torch.dtype) -> torch.Tensor:
    total = base.to(wide)
    # Not torch.add(…, alpha=scale): Inductor 2.13 fuses that with the product before it into an addmm and loses alpha.
    return total if lora is None else total + lora.to(wide) * scale


def _kept_sum(base: torch.Tensor, lora: torch.Tensor, scale: float, out_dtype: torch.dtype) -> torch.Tensor:
    """What the backward keeps for the gradient of g: the sum in the widest dtype of those it is made for. Where the
    magnitude is trained in fp32 around half-precision products (fp32 adapters, or autocast, which hides them), a sum
    rounded to half precision made that gradient's error 1.07 times the original's."""
    device = base.device.type  # "meta", which explaining an adapter uses, knows no autocast
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return _sum(base, lora, scale, _wide(out_dtype, base, lora))
    widest = torch.promote_types(torch.promote_types(base.dtype, lora.dtype), out_dtype)
    return _sum(base, lora, scale, _wide(out_dtype, base, lora)).to(widest)


def compose_math(
    base: torch.Tensor,
    lora: torch.Tensor | None,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """The composition's value."""
    wide = _wide(out_dtype, base, lora)
    y = _sum(base, lora, scale, wide) * g.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(out_dtype)


def delta_math(
    result: torch.Tensor, base: torch.Tensor, lora: torch.Tensor, g: torch.Tensor, scale: float, out_dtype: torch.dtype
) -> torch.Tensor:
    """The delta form's value."""
    wide = _wide(out_dtype, result, base, lora)
    g = g.to(wide)
    return (result.to(wide) + ((g - 1) * base.to(wide) + (g * scale) * lora.to(wide))).to(out_dtype)


def _token_sum(values: torch.Tensor) -> torch.Tensor:
    return values.flatten(0, -2).sum(0) if values.dim() > 1 else values


class Compose(torch.autograd.Function):
    """``g ⊙ (base + s·lora) + bias``. Saves one ``[tokens, d_out]`` tensor where g is trained, none where it is not."""

    @staticmethod
    def forward(
        ctx: Any, base: Any, lora: Any, g: Any, bias: Any, scale: float, out_dtype: torch.dtype
    ) -> torch.Tensor:
        total = None
        if ctx.needs_input_grad[2]:
            total = base if lora is None else _kept_sum(base, lora, scale, out_dtype)
        ctx.save_for_backward(g, total)
        ctx.scale = scale
        ctx.dtypes = (base.dtype, None if lora is None else lora.dtype, None if bias is None else bias.dtype)
        return compose_math(base, lora, g, bias, scale, out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative("compose")
        g, total = ctx.saved_tensors
        base_dtype, lora_dtype, bias_dtype = ctx.dtypes
        wide = _wide(grad.dtype, g)
        dy = grad.to(wide)
        scaled = dy * g.to(wide)
        needs = ctx.needs_input_grad
        d_base = scaled.to(base_dtype) if needs[0] else None
        d_lora = (scaled * ctx.scale).to(lora_dtype) if lora_dtype is not None and needs[1] else None
        d_g = _token_sum(dy * total.to(wide)).to(g.dtype) if needs[2] else None
        d_bias = _token_sum(dy).to(bias_dtype) if bias_dtype is not None and needs[3] else None
        return d_base, d_lora, d_g, d_bias, None, None


class ComposeDelta(torch.autograd.Function):
    """``result + (g - 1) ⊙ base + g ⊙ s·lora``. Saves as :class:`Compose` does."""

    @staticmethod
    def forward(
        ctx: Any, result: Any, base: Any, lora: Any, g: Any, scale: float, out_dtype: torch.dtype
    ) -> torch.Tensor:
        total = None
        if ctx.needs_input_grad[3]:
            total = _kept_sum(base, lora, scale, out_dtype)
        ctx.save_for_backward(g, total)
        ctx.scale = scale
        ctx.dtypes = (result.dtype, base.dtype, lora.dtype)
        return delta_math(result, base, lora, g, scale, out_dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative("compose_delta")
        g, total = ctx.saved_tensors
        result_dtype, base_dtype, lora_dtype = ctx.dtypes
        wide = _wide(grad.dtype, g)
        dy, wide_g = grad.to(wide), g.to(wide)
        needs = ctx.needs_input_grad
        d_result = grad.to(result_dtype) if needs[0] else None
        d_base = (dy * (wide_g - 1)).to(base_dtype) if needs[1] else None
        d_lora = (dy * (wide_g * ctx.scale)).to(lora_dtype) if needs[2] else None
        d_g = _token_sum(dy * total.to(wide)).to(g.dtype) if needs[3] else None
        return d_result, d_base, d_lora, d_g, None, None
