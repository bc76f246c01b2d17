"""The composition ``y = g ⊙ (base + s·lora) + bias`` and its delta form, with gradients that save one activation.

The arithmetic is fp32 (fp64 for fp64) with one rounding at the end: near ``g = 1`` in half precision that is at least
as accurate as adding ``(g - 1)·base`` separately, since nothing is rounded before the sum. Each forward and backward is
a handful of pointwise ATen calls, so Inductor fuses it into what stands before and behind; or, where the program is run
eagerly on a CUDA device or the plan says so, one operator call that is one Triton kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dorafx import _compat
from dorafx._compat.compilers import save_for_backward

from . import layout

__all__ = [
    "KERNELS",
    "Compose",
    "backward_math",
    "check_compose",
    "check_compose_backward",
    "check_overwritten",
    "compose",
    "compose_delta",
    "compose_delta_into",
    "compose_into",
    "compose_math",
    "delta_math",
    "forward_math",
    "kept_dtype",
    "records_gradients",
    "refuse_forward_mode",
    "refuse_second_derivative",
]

KERNELS = ("auto", "triton")
"""How a composition is computed: ``"auto"`` is ATen calls wherever a compiler looks on, and the fused kernel where a CUDA
tensor is at hand; ``"triton"`` is the fused kernel in compiled programs too. What the kernel does not serve (a CPU, fp64,
shapes that broadcast) is ATen calls."""


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


def refuse_forward_mode(operator: str, *tensors: torch.Tensor | None) -> None:
    """Called where tangents would be lost, or refused by torch with an error that names none of this.

    Raises:
        RuntimeError: a tensor carries a tangent.
    """
    if not _compat.forward_mode():
        return
    if any(t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        raise RuntimeError(
            f"dorafx.{operator} has no forward-mode derivative (torch.autograd.forward_ad, jvp); call dorafx.restore(model) "
            "where one is needed"
        )


def check_compose(
    result: torch.Tensor | None,
    base: torch.Tensor,
    lora: torch.Tensor | None,
    g: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[int, ...]:
    """The shape of a composition: that to which its operands broadcast.

    Raises:
        ValueError: operands that do not broadcast, or lie on several devices.
    """
    activations = [t for t in (result, base, lora) if t is not None]
    vectors = [t for t in (g, bias) if t is not None]
    if result is not None and lora is None:
        raise ValueError("compose: the delta form has a low-rank term; got none")
    # A scalar may lie on the CPU, as ATen has it.
    if any(t.device != base.device and (t.dim() > 0 or t.device.type != "cpu") for t in (*activations, *vectors)):
        devices = ", ".join(str(t.device) for t in (*activations, *vectors))
        raise ValueError(f"compose's operands are on {devices}; one device is needed")
    agree = base.dim() > 0 and all(t.shape == base.shape for t in activations)
    if agree and all(v.shape == base.shape[-1:] for v in vectors):
        return base.shape
    try:
        shape: tuple[int, ...] = torch.broadcast_shapes(*(t.shape for t in (*activations, *vectors)))
        return shape
    except RuntimeError as error:
        shapes = ", ".join(str(tuple(t.shape)) for t in (*activations, *vectors))
        raise ValueError(
            f"compose takes activations [.., d_out], and vectors [d_out], whose shapes must agree; got {shapes}"
        ) from error


def check_overwritten(tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """Raise what stands against writing a composition of this shape into a tensor.

    Raises:
        ValueError: the tensor has another shape.
        RuntimeError: several of its elements share memory.
    """
    if tensor.shape != shape:
        raise ValueError(f"compose_ writes a result {tuple(shape)} over a tensor {tuple(tensor.shape)}")
    if any(_compat.is_known(s == 0) and _compat.is_known(n > 1) for n, s in zip(tensor.shape, tensor.stride())):
        raise RuntimeError("compose_ overwrites a tensor of which several elements share memory; clone it first")


def check_compose_backward(
    grad: torch.Tensor, g: torch.Tensor, total: torch.Tensor | None, needs_g: bool, bias_shape: Sequence[int] | None
) -> tuple[int, ...]:
    """The shape of the bias, which is ``[d_out]`` where none is given.

    Raises:
        ValueError: shapes that do not belong to one composition, or no sum where g needs a gradient.
    """
    if needs_g and total is None:
        raise ValueError("compose_backward: the gradient of g takes the sum that the forward kept; got none")
    bias = grad.shape[-1:] if bias_shape is None else tuple(bias_shape)
    shapes = [g.shape, *([] if total is None else [total.shape]), bias]
    if any(shape not in ((), grad.shape[-1:], grad.shape) for shape in shapes):
        try:
            fits = torch.broadcast_shapes(grad.shape, *shapes) == grad.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"compose_backward takes operands that broadcast to the gradient {tuple(grad.shape)}; got "
                f"{', '.join(str(tuple(s)) for s in shapes)}"
            )
    return bias


def _wide(out_dtype: torch.dtype, *tensors: torch.Tensor | None) -> torch.dtype:
    dtypes = {t.dtype for t in tensors if t is not None} | {out_dtype}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _sum(base: torch.Tensor, lora: torch.Tensor | None, scale: float, wide: torch.dtype) -> torch.Tensor:
    total = base.to(wide)
    # Not torch.add(…, alpha=scale): Inductor 2.13 fuses that with the product before it into an addmm and loses alpha.
    return total if lora is None else total + lora.to(wide) * scale


def kept_dtype(base: torch.Tensor, lora: torch.Tensor, out_dtype: torch.dtype) -> torch.dtype:
    """What the backward keeps for the gradient of g: the sum in the widest dtype of those it is made for. Where the
    magnitude is trained in fp32 around half-precision products (fp32 adapters, or autocast, which hides them), a sum
    rounded to half precision made that gradient's error 1.07 times the original's."""
    device = base.device.type  # "meta", which explaining an adapter uses, knows no autocast
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return _wide(out_dtype, base, lora)
    return torch.promote_types(torch.promote_types(base.dtype, lora.dtype), out_dtype)


def compose_math(
    base: torch.Tensor,
    lora: torch.Tensor | None,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    out_dtype: torch.dtype,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """The composition's value. ``total``: the sum in the widest dtype, where it is at hand."""
    wide = _wide(out_dtype, base, lora)
    y = (_sum(base, lora, scale, wide) if total is None else total) * g.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(out_dtype)


def delta_math(
    result: torch.Tensor,
    base: torch.Tensor,
    lora: torch.Tensor,
    g: torch.Tensor,
    scale: float,
    out_dtype: torch.dtype,
    total: torch.Tensor | None = None,
) -> torch.Tensor:
    """The delta form's value, as ``result + (g - 1)·(base + s·lora) + s·lora``: made of the sum that its backward keeps, and
    as accurate near ``g = 1``. ``total``: as for :func:`compose_math`."""
    wide = _wide(out_dtype, result, base, lora)
    total = _sum(base, lora, scale, wide) if total is None else total.to(wide)
    return (result.to(wide) + ((g.to(wide) - 1) * total + lora.to(wide) * scale)).to(out_dtype)


def forward_math(
    result: torch.Tensor | None,
    base: torch.Tensor,
    lora: torch.Tensor | None,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    out_dtype: torch.dtype,
    kept: torch.dtype | None,
    into: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`dorafx.ops.triton.dispatch.compose_forward`; the sum is None where it is not kept."""
    whole = None if kept is None else _sum(base, lora, scale, _wide(out_dtype, base, lora))
    total = None if whole is None or kept is None else whole.to(kept)
    dtypes = {t.dtype for t in (base, lora, g, bias) if t is not None}
    if into is not None and result is None and dtypes in ({torch.float32}, {torch.float64}):
        # Nothing is rounded on the way, so no temporary is needed.
        into = base if lora is None else base.add_(lora, alpha=scale)
        into.mul_(g)
        return into if bias is None else into.add_(bias), total
    if result is None:
        y = compose_math(base, lora, g, bias, scale, out_dtype, whole)
    else:
        assert lora is not None
        y = delta_math(result, base, lora, g, scale, out_dtype, whole)
    return y if into is None else into.copy_(y), total


def _sum_to(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The sum over what was broadcast, as a gradient of an operand of this shape."""
    # Not by way of ``flatten``, for which vmap has no rule (``is_grads_batched``).
    lead = values.dim() - len(shape)
    spread = [
        lead + i
        for i, n in enumerate(shape)
        if _compat.is_known(n == 1) and not _compat.is_known(values.shape[lead + i] == 1)
    ]
    if spread:
        values = values.sum(spread, keepdim=True)
    return values.sum(tuple(range(lead))) if lead else values


def backward_math(
    grad: torch.Tensor,
    g: torch.Tensor,
    total: torch.Tensor | None,
    scale: float,
    delta: bool,
    base_dtype: torch.dtype | None,
    lora_dtype: torch.dtype | None,
    needs_g: bool,
    bias_dtype: torch.dtype | None,
    bias_shape: Sequence[int],
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of base, lora, g and bias; None where there is no dtype for them. Those of base and lora have the gradient's
    shape, also where these were broadcast."""
    wide = _wide(grad.dtype, g)
    dy, wide_g = grad.to(wide), g.to(wide)
    d_base = d_lora = d_g = d_bias = None
    if delta:
        d_base = None if base_dtype is None else (dy * (wide_g - 1)).to(base_dtype)
        d_lora = None if lora_dtype is None else (dy * (wide_g * scale)).to(lora_dtype)
    elif base_dtype is not None or lora_dtype is not None:
        scaled = dy * wide_g
        d_base = None if base_dtype is None else scaled.to(base_dtype)
        d_lora = None if lora_dtype is None else (scaled * scale).to(lora_dtype)
    if needs_g:
        assert total is not None
        d_g = _sum_to(dy * total.to(wide), g.shape).to(g.dtype)
    if bias_dtype is not None:
        d_bias = layout.owned(_sum_to(dy, bias_shape).to(bias_dtype), grad)
    return d_base, d_lora, d_g, d_bias


def _fused(kernel: str, *tensors: torch.Tensor | None) -> bool:
    """Whether to call the operator that is one kernel.

    Raises:
        ValueError: an unknown kernel.
    """
    from .triton.dispatch import runs_kernels

    if kernel not in KERNELS:
        raise ValueError(f"compose: unknown kernel {kernel!r}; allowed are {', '.join(map(repr, KERNELS))}")
    if kernel == "triton":
        return True
    # A compiler traces with fake and functional tensors, which are subclasses: it is to see ATen calls.
    present = [t for t in tensors if t is not None]
    plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in present)
    return plain and runs_kernels(present[0].device, *(t.dtype for t in present))


class Compose(torch.autograd.Function):
    """``g ⊙ (base + s·lora) + bias``, or ``result + (g - 1) ⊙ base + g ⊙ s·lora``. Saves one ``[tokens, d_out]`` tensor where
    g is trained, none where it is not."""

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
    ) -> torch.Tensor:
        kept = kept_dtype(base, lora, out_dtype) if ctx.needs_input_grad[3] and lora is not None else None
        forward = torch.ops.dorafx.compose_forward.default if fused else forward_math
        y, total = forward(result, base, lora, g, bias, scale, out_dtype, kept)
        y = layout.settled(y, result, base, lora, g, bias)
        if total is not None and kept is not None:
            # The two products exist anyway, so that saving both of them looks cheap to the partitioner.
            save_for_backward(total)
        else:
            total = base if ctx.needs_input_grad[3] else None
        ctx.save_for_backward(g, total)
        ctx.scale, ctx.fused, ctx.delta = scale, fused, result is not None
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (result, base, lora, bias))
        ctx.bias_shape = () if bias is None else tuple(bias.shape)
        return y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        refuse_second_derivative("compose_delta" if ctx.delta else "compose")
        g, total = ctx.saved_tensors
        needs_result, needs_base, needs_lora, needs_g, needs_bias = ctx.needs_input_grad[:5]
        d_result = grad.to(ctx.dtypes[0]) if needs_result else None
        needs = (needs_base, needs_lora, needs_bias)
        of_base, of_lora, of_bias = (d if need else None for d, need in zip(ctx.dtypes[1:], needs))
        backward = torch.ops.dorafx.compose_backward.default if ctx.fused else backward_math
        found = backward(grad, g, total, ctx.scale, ctx.delta, of_base, of_lora, needs_g, of_bias, ctx.bias_shape)
        wanted = (needs_base, needs_lora, needs_g, needs_bias)
        return (d_result, *(d if want else None for d, want in zip(found, wanted)), None, None, None)


def records_gradients(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd records what an operator does with these. In inference mode it does not, also below ``enable_grad()``."""
    recorded = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    return recorded and any(t is not None and t.requires_grad for t in tensors)


def compose(
    base: Any, lora: Any, g: Any, bias: Any, scale: float, out_dtype: torch.dtype, kernel: str = "auto"
) -> torch.Tensor:
    """``torch.ops.dorafx.compose``: ``g ⊙ (base + s·lora) + bias``, in the layout that :mod:`dorafx.ops.layout` gives.

    Raises:
        ValueError: see :func:`check_compose`; or an unknown kernel.
        RuntimeError: forward-mode differentiation.
    """
    inputs = (base, lora, g, bias)
    check_compose(None, *inputs)
    fused = _fused(kernel, *inputs)
    recorded = records_gradients(*inputs)
    if fused or recorded:
        refuse_forward_mode("compose", *inputs)
    if recorded:
        return Compose.apply(None, *inputs, scale, out_dtype, fused)  # type: ignore[no-any-return]
    if fused:
        return torch.ops.dorafx.compose_forward.default(None, *inputs, scale, out_dtype, None)[0]  # type: ignore[no-any-return]
    return layout.settled(compose_math(*inputs, scale, out_dtype), *inputs)


def compose_delta(
    result: Any, base: Any, lora: Any, g: Any, scale: float, out_dtype: torch.dtype, kernel: str = "auto"
) -> torch.Tensor:
    """``torch.ops.dorafx.compose_delta``: ``result + (g - 1) ⊙ base + g ⊙ s·lora``, otherwise as :func:`compose`."""
    inputs = (result, base, lora, g)
    check_compose(*inputs, None)
    fused = _fused(kernel, *inputs)
    recorded = records_gradients(*inputs)
    if fused or recorded:
        refuse_forward_mode("compose_delta", *inputs)
    if recorded:
        return Compose.apply(*inputs, None, scale, out_dtype, fused)  # type: ignore[no-any-return]
    if fused:
        return torch.ops.dorafx.compose_forward.default(*inputs, None, scale, out_dtype, None)[0]  # type: ignore[no-any-return]
    return layout.settled(delta_math(*inputs, scale, out_dtype), *inputs)


def compose_into(base: Any, lora: Any, g: Any, bias: Any, scale: float) -> None:
    """``torch.ops.dorafx.compose_``: the composition, written over ``base``.

    Raises:
        RuntimeError: gradients are recorded, for which ``base`` would be needed; or see :func:`check_overwritten`.
        ValueError: see :func:`check_compose`, :func:`check_overwritten`.
    """
    _refuse_recording("compose_", base, lora, g, bias)
    from .triton.dispatch import compose_forward

    compose_forward(None, base, lora, g, bias, scale, base.dtype, None, base)


def compose_delta_into(result: Any, base: Any, lora: Any, g: Any, scale: float) -> None:
    """``torch.ops.dorafx.compose_delta_``: the delta form, written over ``result``.

    Raises:
        RuntimeError, ValueError: as :func:`compose_into`.
    """
    _refuse_recording("compose_delta_", result, base, lora, g)
    from .triton.dispatch import compose_forward

    compose_forward(result, base, lora, g, None, scale, result.dtype, None, result)


def _refuse_recording(operator: str, *tensors: torch.Tensor | None) -> None:
    if records_gradients(*tensors):
        raise RuntimeError(f"dorafx.{operator} overwrites what its gradient needs; call it under torch.no_grad()")
