"""The composition ``y = g ⊙ (base + s·lora) + bias`` and its delta form, with gradients that save one activation.

The arithmetic is fp32 (fp64 for fp64) with one rounding at the end. Near ``g = 1`` in half precision that is at least as accurate
as adding ``(g - 1)·base`` separately, since nothing is rounded before the sum. Each forward and backward is a handful of pointwise
ATen calls, which Inductor fuses with their neighbours. In eager programs on a CUDA device, and where the plan says so, it is one
operator call that runs one Triton kernel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dorafx._compat.partitioner import compute_again
from dorafx._compat.tensors import is_known

from . import layout

KERNELS = ("auto", "triton")
"""How a composition is computed. ``"auto"``: ATen calls while a compiler traces, the fused kernel for CUDA tensors otherwise.
``"triton"``: the fused kernel in compiled programs too. What the kernel does not support (a CPU, fp64, shapes that broadcast) is
computed by ATen calls."""


def check_compose(
    result: torch.Tensor | None,
    base: torch.Tensor,
    lora: torch.Tensor | None,
    g: torch.Tensor,
    bias: torch.Tensor | None,
) -> tuple[int, ...]:
    """The shape of a composition, to which its operands broadcast.

    Raises:
        ValueError: operands that do not broadcast together, or are on several devices.
    """
    activations = [t for t in (result, base, lora) if t is not None]
    vectors = [t for t in (g, bias) if t is not None]
    if result is not None and lora is None:
        raise ValueError("compose: the delta form has a low-rank term; got none")
    # A scalar may be on the CPU, as in ATen.
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


def check_biased(base: torch.Tensor, g: torch.Tensor, bias: torch.Tensor | None) -> None:
    """Check the operands of a composition whose ``base`` has the bias in it.

    Raises:
        ValueError: no bias, or g or the bias are no vectors ``[d_out]``.
    """
    if bias is None or bias.shape != base.shape[-1:] or g.shape != base.shape[-1:]:
        found = "none" if bias is None else str(tuple(bias.shape))
        raise ValueError(
            f"compose: where the base has the bias in it, the bias and g are [d_out], here {tuple(base.shape[-1:])}; got bias {found}, "
            f"g {tuple(g.shape)}"
        )


def check_overwritten(tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """Check that a composition of this shape can be written into a tensor.

    Raises:
        ValueError: the tensor has another shape.
        RuntimeError: several of its elements share memory.
    """
    if tensor.shape != shape:
        raise ValueError(f"compose_ writes a result {tuple(shape)} over a tensor {tuple(tensor.shape)}")
    if any(is_known(s == 0) and is_known(n > 1) for n, s in zip(tensor.shape, tensor.stride())):
        raise RuntimeError("compose_ overwrites a tensor of which several elements share memory; clone it first")


def check_compose_backward(
    grad: torch.Tensor, g: torch.Tensor, total: torch.Tensor | None, needs_g: bool, bias_shape: Sequence[int] | None
) -> tuple[int, ...]:
    """The shape of the bias; ``[d_out]`` if ``bias_shape`` is None.

    Raises:
        ValueError: shapes that do not belong to one composition, or no ``total`` although g needs a gradient.
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


def gradient_buffers(
    grad: torch.Tensor,
    g: torch.Tensor | None,
    bias_shape: Sequence[int],
    base_dtype: torch.dtype | None,
    lora_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor | None, ...]:
    """New tensors for the gradients of base, lora, g and bias; None for each that is not needed (no dtype, no ``g``)."""
    d_base, d_lora = (
        None if d is None else layout.empty(grad.shape, grad, dtype=d, device=grad.device)
        for d in (base_dtype, lora_dtype)
    )
    d_bias = None if bias_dtype is None else grad.new_empty(bias_shape, dtype=bias_dtype)
    return d_base, d_lora, None if g is None else g.new_empty(g.shape), d_bias


def _wide(out_dtype: torch.dtype, *tensors: torch.Tensor | None) -> torch.dtype:
    dtypes = {t.dtype for t in tensors if t is not None} | {out_dtype}
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _sum(base: torch.Tensor, lora: torch.Tensor | None, scale: float, wide: torch.dtype) -> torch.Tensor:
    total = base.to(wide)
    # Not torch.add(…, alpha=scale): Inductor 2.13 fuses that with the product before it into an addmm and loses alpha.
    return total if lora is None else total + lora.to(wide) * scale


def kept_dtype(base: torch.Tensor, lora: torch.Tensor, out_dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the sum is kept for the gradient of g: the widest of the operands' and the result's. With a magnitude in
    fp32 and products in half precision (fp32 adapters, or autocast, where the dtypes do not show it), a sum that was rounded to half
    precision made the error of that gradient 1.07 times the original's."""
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
    """The composition's value. ``total``: ``base + s·lora`` in the widest dtype, if it is computed already."""
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
    """The delta form's value, computed as ``result + (g - 1)·(base + s·lora) + s·lora``. This uses the sum that its backward keeps,
    and is as accurate near ``g = 1``. ``total``: as for :func:`compose_math`."""
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
    biased: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """See :func:`dorafx.ops.dispatch.compose_forward`; the sum is None if it is not kept. ``biased``: ``base`` has the bias in it, and the value
    is ``base + (g ⊙ z - (base - bias))`` with ``z = (base - bias) + s·lora``: where g is 1 and lora 0, ``base`` to the bit. The bias is
    taken out before lora is added, as a sum that was rounded with it made the error of g's gradient up to 1.18 times the original's;
    and of the products only ``base`` is read besides what is kept, so that a backward needs no other for the output."""
    dtypes = {t.dtype for t in (base, lora, g, bias) if t is not None}
    wide = _wide(out_dtype, base, lora)
    # All of one wide dtype: nothing is rounded in between, so no temporary is needed.
    at_once = into is not None and result is None and dtypes in ({torch.float32}, {torch.float64})
    inside = bias if biased else None
    product = base if inside is None or (at_once and kept is None) else base.to(wide) - inside.to(wide)
    whole = _sum(product, lora, scale, wide) if kept is not None or (inside is not None and not at_once) else None
    total = None if whole is None or kept is None else whole.to(kept)
    if at_once:
        into = base if lora is None else base.add_(lora, alpha=scale)
        if inside is not None:
            # As far from the bias towards the sum as g says: the sum to the bit where g is 1.
            return torch.lerp(inside, into, g, out=into), total
        into.mul_(g)
        return into if bias is None else into.add_(bias), total
    if inside is not None:
        assert whole is not None
        y = (base.to(wide) + (whole * g.to(wide) - product)).to(out_dtype)
    elif result is None:
        y = compose_math(base, lora, g, bias, scale, out_dtype, whole)
    else:
        assert lora is not None
        y = delta_math(result, base, lora, g, scale, out_dtype, whole)
    return y if into is None else into.copy_(y), total


_EXACT_SCALES = 2.0**-10, 2.0**10
"""Between these a product with g neither leaves bf16's range nor loses digits in it, for sums from ``2**-116`` to ``2**117``."""


def keeps_scaled(
    result: torch.Tensor | None, bias: torch.Tensor | None, out_dtype: torch.dtype, kept: torch.dtype | None
) -> bool:
    """Whether :func:`scaled_forward_math` serves a composition: the sum would be kept in bf16, and be rounded before the output could be
    computed from it again. In fp16 the output may overflow where the sum does not; a bias would cancel."""
    return result is None and bias is None and kept == out_dtype == torch.bfloat16


def scaled_forward_math(
    base: torch.Tensor, lora: torch.Tensor, g: torch.Tensor, scale: float, out_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A composition that keeps ``y = g ⊙ z`` in place of the sum ``z = base + s·lora``, from which a backward can have both: ``y`` to the
    bit, and ``z = y / g`` as exactly as ``z`` rounded to bf16, as rounding is relative. Where ``g`` is not well between zero and
    infinity it keeps ``z`` itself, and ``y`` is that, scaled: 0 where ``g`` is 0, and NaN where it is.

    Returns:
        The value; what to keep (in ``out_dtype``), ``f ⊙ z``; and by what to multiply the sum of the products with it for the gradient
        of g, ``1 / f``, like g in fp32.
    """
    wide = _wide(out_dtype, base, lora)
    size = g.to(wide).abs()
    exact = (size >= _EXACT_SCALES[0]) & (size <= _EXACT_SCALES[1])  # of each row of the weight; False for NaN
    scaled = torch.where(exact, g.to(wide), 1.0)
    kept = (_sum(base, lora, scale, wide) * scaled).to(out_dtype)
    # Promoted by the factor, not cast: see :func:`backward_math`.
    rest, unscale = torch.where(exact, 1.0, g.to(wide)), 1.0 / scaled
    compute_again(g, rest, unscale)
    return (kept * rest).to(out_dtype), kept, unscale


def _sum_to(values: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The gradient of an operand of this shape: summed over the dimensions along which it was broadcast."""
    # Without ``flatten``: vmap (``is_grads_batched``) has no rule for it.
    lead = values.dim() - len(shape)
    spread = [lead + i for i, n in enumerate(shape) if is_known(n == 1) and not is_known(values.shape[lead + i] == 1)]
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
    unscale: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, ...]:
    """Gradients of base, lora, g and bias; None where the dtype is None. Those of base and lora have the shape of ``grad`` even if
    the operand was broadcast. ``unscale``: the last result of :func:`scaled_forward_math`, if ``total`` is what that keeps."""
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
        # The product promotes ``total``, without rounding. A cast here instead would undo, for Inductor of torch 2.11, the forward's
        # cast of the sum, which is marked as saved; it would then save both products.
        d_g = _sum_to(dy * total, g.shape)
        d_g = (d_g if unscale is None else d_g * unscale).to(g.dtype)
    if bias_dtype is not None:
        d_bias = layout.owned(_sum_to(dy, bias_shape).to(bias_dtype), grad)
    return d_base, d_lora, d_g, d_bias
