"""The operators as programs call them: what autograd records of each, what is saved, and how gradients are computed."""

from __future__ import annotations

from typing import Any

import torch

from dorafx._compat.autograd import below_autograd, forward_mode
from dorafx._compat.partitioner import is_traced, mark_one_for_all, mark_read, save_for_backward

from . import composition, dispatch, layout, linear


def refuse_second_derivative(operator: str) -> None:
    """To be called in a backward, where gradients are recorded only if the caller passed ``create_graph=True``.

    Raises:
        RuntimeError: ``create_graph=True``. A silent zero would be wrong, and training DoRA needs no second derivatives.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"dorafx.{operator} has no second derivative (create_graph=True); call dorafx.restore(model), or compile "
            "with another backend, where one is needed"
        )


def refuse_forward_mode(operator: str, *tensors: torch.Tensor | None) -> None:
    """To be called where forward-mode tangents would be lost, or where torch's own error would not say why.

    Raises:
        RuntimeError: a tensor carries a tangent.
    """
    if not forward_mode():
        return
    if any(t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"dorafx.{operator} has no forward-mode derivative (torch.autograd.forward_ad, jvp); call dorafx.restore(model) "
            "where one is needed"
        )


def records_gradients(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records an operator on these tensors. Never in inference mode, even under ``enable_grad()``."""
    recorded = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    return recorded and any(t is not None and t.requires_grad for t in tensors)


def _refuse_recording(operator: str, *tensors: torch.Tensor | None) -> None:
    if records_gradients(*tensors):
        raise RuntimeError(f"dorafx.{operator} overwrites what its gradient needs; call it under torch.no_grad()")


class RowNorm(torch.autograd.Function):
    """A norm by the operator of this name: of one weight, or of a batch of them."""

    @staticmethod
    def forward(ctx: Any, name: str, weight: Any, left: Any, right: Any, scale: float, *how: Any) -> torch.Tensor:
        with below_autograd():
            n: torch.Tensor = _operator(name)(weight, left, right, scale, *how)
        ctx.save_for_backward(weight, left, right, n)
        ctx.name, ctx.scale = name, scale
        return n

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative(ctx.name)
        weight, left, right, n = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:4]
        grads = _operator(f"{ctx.name}_backward")(grad, weight, left, right, n, ctx.scale, *needs)
        return (None, *(g if need else None for g, need in zip(grads, needs)), None, None, None)


def _operator(name: str) -> Any:
    return getattr(torch.ops.dorafx, name).default


def _recorded_norm(name: str, weight: Any, left: Any, right: Any, *rest: Any) -> torch.Tensor:
    refuse_forward_mode(name, weight, left, right)
    if records_gradients(weight, left, right):
        return RowNorm.apply(name, weight, left, right, *rest)  # type: ignore[no-any-return]
    with below_autograd():
        return _operator(name)(weight, left, right, *rest)  # type: ignore[no-any-return]


def row_norm(
    weight: Any, left: Any, right: Any, scale: float, algorithm: str = "auto", factor_dtype: torch.dtype | None = None
) -> torch.Tensor:
    return _recorded_norm("row_norm", weight, left, right, scale, algorithm, factor_dtype)


def row_norm_batched(
    weight: Any, left: Any, right: Any, scale: float, algorithm: str = "auto", factor_dtype: torch.dtype | None = None
) -> torch.Tensor:
    return _recorded_norm("row_norm_batched", weight, left, right, scale, algorithm, factor_dtype)


def _fused(kernel: str, *tensors: torch.Tensor | None) -> bool:
    """Whether to call the opaque operator that is one fused kernel.

    Raises:
        ValueError: an unknown kernel.
    """
    if kernel not in composition.KERNELS:
        raise ValueError(f"compose: unknown kernel {kernel!r}; allowed are {', '.join(map(repr, composition.KERNELS))}")
    if kernel == "triton":
        return True
    # Fake and functional tensors are subclasses. A compiler that traces with them should see ATen calls.
    present = [t for t in tensors if t is not None]
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in present)
    return plain and dispatch.runs_kernels(present[0].device, *(t.dtype for t in present))


class Compose(torch.autograd.Function):
    """``g ⊙ (base + s·lora) + bias``, or ``result + (g - 1) ⊙ base + g ⊙ s·lora``. Saves one ``[tokens, d_out]`` tensor if g is
    trained, and none otherwise."""

    @staticmethod
    def forward(
        ctx: Any,
        result: Any,
        base: Any,
        lora: Any,
        g: Any,
        bias: Any,
        scale: float,
        out_dtype: torch.dtype,
        fused: bool,
        biased: bool,
    ) -> torch.Tensor:
        kept = None
        if ctx.needs_input_grad[3] and (lora is not None or biased):
            kept = composition.kept_dtype(base, base if lora is None else lora, out_dtype)
        total: torch.Tensor | None
        unscale: torch.Tensor | None = None
        if not fused and is_traced() and composition.keeps_scaled(result, bias, out_dtype, kept):
            y, total, unscale = composition.scaled_forward_math(base, lora, g, scale, out_dtype)
        else:
            operands = result, base, lora, g, bias, scale, out_dtype, kept
            if fused:
                y, total = torch.ops.dorafx.compose_forward.default(*operands)
            else:
                y, total = composition.forward_math(*operands, biased=biased)
        y = layout.settled(y, result, base, lora, g, bias)
        if total is not None and kept is not None:
            # Marked as saved, since saving both products instead looks cheap to the partitioner: they exist anyway.
            save_for_backward(total)
            if biased:
                mark_one_for_all(y)  # it is not computed from the sum
        else:
            total = base if ctx.needs_input_grad[3] else None
            if total is not None:
                mark_read(total)
        ctx.save_for_backward(g, total, unscale)
        ctx.scale, ctx.fused, ctx.delta = scale, fused, result is not None
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (result, base, lora, bias))
        ctx.bias_shape = () if bias is None else tuple(bias.shape)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative("compose_delta" if ctx.delta else "compose")
        g, total, unscale = ctx.saved_tensors
        needs_result, needs_base, needs_lora, needs_g, needs_bias = ctx.needs_input_grad[:5]
        d_result = grad.to(ctx.dtypes[0]) if needs_result else None
        needs = (needs_base, needs_lora, needs_bias)
        base_dtype, lora_dtype, bias_dtype = (d if need else None for d, need in zip(ctx.dtypes[1:], needs))
        backward = torch.ops.dorafx.compose_backward.default if ctx.fused else composition.backward_math
        kept = () if unscale is None else (unscale,)
        gradients = backward(
            grad, g, total, ctx.scale, ctx.delta, base_dtype, lora_dtype, needs_g, bias_dtype, ctx.bias_shape, *kept
        )
        needed = (needs_base, needs_lora, needs_g, needs_bias)
        return (d_result, *(d if need else None for d, need in zip(gradients, needed)), None, None, None, None)


def compose(
    base: Any,
    lora: Any,
    g: Any,
    bias: Any,
    scale: float,
    out_dtype: torch.dtype,
    kernel: str = "auto",
    biased: bool = False,
) -> torch.Tensor:
    """``torch.ops.dorafx.compose``: ``g ⊙ (base + s·lora) + bias``, in the layout of :mod:`dorafx.ops.layout`.

    Args:
        biased: ``base`` has the bias in it: ``g ⊙ (base - bias + s·lora) + bias``, which is ``base + s·lora`` to the bit where ``g`` is 1.
            Not by a kernel. The bias that is taken out is a constant to gradients, as the one in ``base`` has to be: the bias has the
            gradient of one that is added last, the sum of the output's, also where ``g`` is not finite.

    Raises:
        ValueError: see :func:`dorafx.ops.composition.check_compose`, :func:`dorafx.ops.composition.check_biased`; or an unknown kernel.
        RuntimeError: forward-mode differentiation.
    """
    if biased:
        composition.check_biased(base, g, bias)
    return _composed("compose", (None, base, lora, g, bias), scale, out_dtype, kernel, biased)


def compose_delta(
    result: Any, base: Any, lora: Any, g: Any, scale: float, out_dtype: torch.dtype, kernel: str = "auto"
) -> torch.Tensor:
    """``torch.ops.dorafx.compose_delta``: ``result + (g - 1) ⊙ base + g ⊙ s·lora``, otherwise as :func:`compose`."""
    return _composed("compose_delta", (result, base, lora, g, None), scale, out_dtype, kernel)


def _composed(
    operator: str,
    inputs: tuple[Any, Any, Any, Any, Any],
    scale: float,
    out_dtype: torch.dtype,
    kernel: str,
    biased: bool = False,
) -> torch.Tensor:
    composition.check_compose(*inputs)
    fused = _fused(kernel, *inputs) and not biased
    recorded = records_gradients(*inputs)
    if fused or recorded:
        refuse_forward_mode(operator, *inputs)
    if recorded:
        return Compose.apply(*inputs, scale, out_dtype, fused, biased)  # type: ignore[no-any-return]
    if fused:
        return torch.ops.dorafx.compose_forward.default(*inputs, scale, out_dtype, None)[0]  # type: ignore[no-any-return]
    y, _ = composition.forward_math(*inputs, scale, out_dtype, None, biased=biased)
    return layout.settled(y, *inputs)


def compose_into(base: Any, lora: Any, g: Any, bias: Any, scale: float, biased: bool = False) -> None:
    """``torch.ops.dorafx.compose_``: the composition, written over ``base``. ``biased``: see :func:`compose`.

    Raises:
        RuntimeError: gradients are recorded, which need the old ``base``; or see :func:`dorafx.ops.composition.check_overwritten`.
        ValueError: see :func:`dorafx.ops.composition.check_compose`, :func:`dorafx.ops.composition.check_biased`,
            :func:`dorafx.ops.composition.check_overwritten`.
    """
    _refuse_recording("compose_", base, lora, g, bias)
    if biased:
        composition.check_biased(base, g, bias)
    dispatch.compose_forward(None, base, lora, g, bias, scale, base.dtype, None, base, biased)


def compose_delta_into(result: Any, base: Any, lora: Any, g: Any, scale: float) -> None:
    """``torch.ops.dorafx.compose_delta_``: the delta form, written over ``result``.

    Raises:
        RuntimeError, ValueError: as :func:`compose_into`.
    """
    _refuse_recording("compose_delta_", result, base, lora, g)
    dispatch.compose_forward(result, base, lora, g, None, scale, result.dtype, None, result)


class DoraLinear(torch.autograd.Function):
    """``g ⊙ (x·Wᵀ + s·h·Bᵀ) + bias``. Saves what plain LoRA saves, and ``x·Wᵀ + s·h·Bᵀ`` if g is trained."""

    @staticmethod
    def forward(
        ctx: Any, x: Any, weight: Any, h: Any, left: Any, g: Any, bias: Any, scale: float, out_dtype: torch.dtype
    ) -> torch.Tensor:
        needs_x, needs_weight, needs_h, needs_left, needs_g, needs_bias = ctx.needs_input_grad[:6]
        kept = composition.kept_dtype(x, h, out_dtype) if needs_g else None
        y, total = torch.ops.dorafx.dora_linear_forward.default(x, weight, h, left, g, bias, scale, out_dtype, kept)
        ctx.save_for_backward(
            g,
            total if needs_g else None,
            x if needs_weight else None,
            weight if needs_x else None,
            h if needs_left else None,
            left if needs_h else None,
        )
        ctx.scale, ctx.bias_dtype = scale, bias.dtype if needs_bias else None
        ctx.base_dtype = x.dtype if needs_x or needs_weight else None
        ctx.lora_dtype = h.dtype if needs_h or needs_left else None
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
            None if x is None else linear.rows(d_base).mT @ linear.rows(x),
            None if left is None else d_lora @ left,
            None if h is None else linear.rows(d_lora).mT @ linear.rows(h),
            d_g if total is not None else None,
            d_bias if ctx.bias_dtype is not None else None,
            None,
            None,
        )


def dora_linear(
    x: Any, weight: Any, h: Any, left: Any, g: Any, bias: Any, scale: float, out_dtype: torch.dtype
) -> torch.Tensor:
    """``torch.ops.dorafx.dora_linear``: ``g ⊙ (x·Wᵀ + s·h·Bᵀ) + bias``."""
    linear.check_linear(x, weight, h, left, g, bias)
    inputs = (x, weight, h, left, g, bias)
    refuse_forward_mode("dora_linear", *inputs)
    if records_gradients(*inputs):
        return DoraLinear.apply(*inputs, scale, out_dtype)  # type: ignore[no-any-return]
    return torch.ops.dorafx.dora_linear_forward.default(*inputs, scale, out_dtype, None)[0]  # type: ignore[no-any-return]


class CastLinear(torch.autograd.Function):
    """``x·Wᵀ`` with ``W`` cast to the dtype of ``x``. Saves ``W`` itself; autograd would save the cast copy."""

    @staticmethod
    def forward(ctx: Any, x: Any, weight: Any) -> torch.Tensor:
        needs_x, needs_weight = ctx.needs_input_grad
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.weight_dtype = weight.dtype
        return linear.cast_linear_math(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative("cast_linear")
        x, weight = ctx.saved_tensors
        # An opaque operator: if the partitioner saw the cast, it would reuse the forward's, and so save the cast copy.
        d_x = None if weight is None else torch.ops.dorafx.cast_linear_backward.default(grad, weight)
        d_weight = None if x is None else (linear.rows(grad).mT @ linear.rows(x)).to(ctx.weight_dtype)
        return d_x, d_weight


def cast_linear(x: Any, weight: Any) -> torch.Tensor:
    """``torch.ops.dorafx.cast_linear``: ``x·Wᵀ``, x ``[.., d_in]``, W ``[d_out, d_in]`` of any floating dtype; the result has
    the dtype of x, also under autocast.

    Raises:
        ValueError: see :func:`dorafx.ops.linear.check_cast_linear`.
        RuntimeError: forward-mode differentiation.
    """
    linear.check_cast_linear(x, weight)
    refuse_forward_mode("cast_linear", x, weight)
    if records_gradients(x, weight):
        return CastLinear.apply(x, weight)  # type: ignore[no-any-return]
    return linear.cast_linear_math(x, weight)
