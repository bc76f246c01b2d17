"""Registration of the operators with PyTorch's dispatcher, so that graphs hold ``OpOverload`` s and caches stay warm.

``row_norm`` is opaque to compilers: its point is the order in which memory is touched.

``compose`` and ``compose_delta`` are not opaque. Their autograd kernels decide what is saved and how gradients are computed, and
run ATen calls: a tracer sees these instead of the operator, and Inductor fuses them with their neighbours. For a fused kernel they
call ``compose_forward`` and ``compose_backward``, which are opaque. ``dora_linear`` works in the same way.

:data:`DECOMPOSITIONS` serve tracing under inference mode, which has no autograd kernels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

from . import autograd, batched, composition, dispatch, layout, linear, norm, quantized

# A quantised weight, as :class:`dorafx.ops.quantized.Packed` has it.
_WEIGHT = "Tensor packed, Tensor scales, Tensor? zeros"
_LAYOUT = "str format, int[] shape, int group, ScalarType dtype"

_LIBRARY = torch.library.Library("dorafx", "DEF")
_LIBRARY.define(
    'row_norm(Tensor weight, Tensor left, Tensor right, float scale, str algorithm="auto", '
    "ScalarType? factor_dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "row_norms(Tensor[] weights, Tensor[] lefts, Tensor[] rights, float[] scales, str algorithm, "
    "Tensor?[] squares, ScalarType? factor_dtype=None) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    f"row_norm_quantized({_WEIGHT}, Tensor left, Tensor right, float scale, {_LAYOUT}, "
    "ScalarType? factor_dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(f"dequantize({_WEIGHT}, {_LAYOUT}) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(
    "row_norm_backward(Tensor grad, Tensor weight, Tensor left, Tensor right, Tensor norm, float scale, "
    "bool needs_weight, bool needs_left, bool needs_right) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    'row_norm_batched(Tensor weight, Tensor left, Tensor right, float scale, str algorithm="auto", '
    "ScalarType? factor_dtype=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "row_norm_batched_backward(Tensor grad, Tensor weight, Tensor left, Tensor right, Tensor norm, float scale, "
    "bool needs_weight, bool needs_left, bool needs_right) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
for _schema in (
    "compose(Tensor base, Tensor? lora, Tensor g, Tensor? bias, float scale, ScalarType out_dtype, "
    'str kernel="auto", bool biased=False) -> Tensor',
    "compose_delta(Tensor result, Tensor base, Tensor lora, Tensor g, float scale, ScalarType out_dtype, "
    'str kernel="auto") -> Tensor',
    "compose_(Tensor(a!) base, Tensor? lora, Tensor g, Tensor? bias, float scale, bool biased=False) -> ()",
    "compose_delta_(Tensor(a!) result, Tensor base, Tensor lora, Tensor g, float scale) -> ()",
    "compose_forward(Tensor? result, Tensor base, Tensor? lora, Tensor g, Tensor? bias, float scale, "
    "ScalarType out_dtype, ScalarType? kept) -> (Tensor, Tensor)",
    "compose_backward(Tensor grad, Tensor g, Tensor? total, float scale, bool delta, ScalarType? base_dtype, "
    "ScalarType? lora_dtype, bool needs_g, ScalarType? bias_dtype, SymInt[]? bias_shape=None) -> (Tensor, Tensor, Tensor, Tensor)",
    "dora_linear(Tensor x, Tensor weight, Tensor h, Tensor left, Tensor g, Tensor? bias, float scale, "
    "ScalarType out_dtype) -> Tensor",
    "dora_linear_forward(Tensor x, Tensor weight, Tensor h, Tensor left, Tensor g, Tensor? bias, float scale, "
    "ScalarType out_dtype, ScalarType? kept) -> (Tensor, Tensor)",
    "cast_linear(Tensor x, Tensor weight) -> Tensor",
    "cast_linear_backward(Tensor grad, Tensor weight) -> Tensor",
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag,))


_LIBRARY.impl("row_norm", norm.row_norm, "CompositeExplicitAutograd")
_LIBRARY.impl("row_norm", dispatch.row_norm, "CUDA")
_LIBRARY.impl("row_norm", autograd.row_norm, "Autograd")
_LIBRARY.impl("row_norms", norm.row_norms, "CompositeExplicitAutograd")
_LIBRARY.impl("row_norms", dispatch.row_norms, "CUDA")
_LIBRARY.impl(
    "row_norm_quantized", quantized.flat_norm_arguments(quantized.row_norm_quantized), "CompositeExplicitAutograd"
)
_LIBRARY.impl("row_norm_quantized", quantized.flat_norm_arguments(dispatch.row_norm_quantized), "CUDA")
_LIBRARY.impl("dequantize", quantized.flat_arguments(quantized.dequantize), "CompositeExplicitAutograd")
_LIBRARY.impl("row_norm_backward", norm.row_norm_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("row_norm_batched", batched.row_norm_batched, "CompositeExplicitAutograd")
_LIBRARY.impl("row_norm_batched", dispatch.row_norm_batched, "CUDA")
_LIBRARY.impl("row_norm_batched", autograd.row_norm_batched, "Autograd")
_LIBRARY.impl("row_norm_batched_backward", batched.row_norm_batched_backward, "CompositeExplicitAutograd")
for _name, _function in (
    ("compose", autograd.compose),
    ("compose_delta", autograd.compose_delta),
    ("compose_", autograd.compose_into),
    ("compose_delta_", autograd.compose_delta_into),
    ("dora_linear", autograd.dora_linear),
    ("cast_linear", autograd.cast_linear),
):
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _function, "Autograd")


def _compose_into_functional(base: Any, *operands: Any) -> None:
    operands, biased = operands[:4], operands[4:] == (True,)
    base.copy_(torch.ops.dorafx.compose.default(base, *operands, base.dtype, biased=biased))


def _compose_delta_into_functional(result: Any, *operands: Any) -> None:
    result.copy_(torch.ops.dorafx.compose_delta.default(result, *operands, result.dtype))


# ``torch.func.functionalize`` only knows how to functionalise ATen's own in-place operators.
_LIBRARY.impl("compose_", _compose_into_functional, "Functionalize")
_LIBRARY.impl("compose_delta_", _compose_delta_into_functional, "Functionalize")
# These are opaque to compilers, and one kernel each on a CUDA device.
_LIBRARY.impl("compose_forward", dispatch.compose_forward, "CompositeExplicitAutograd")
_LIBRARY.impl("compose_backward", dispatch.compose_backward, "CompositeExplicitAutograd")
_LIBRARY.impl("dora_linear_forward", dispatch.dora_linear_forward, "CompositeExplicitAutograd")
_LIBRARY.impl("cast_linear_backward", linear.cast_linear_backward, "CompositeExplicitAutograd")


DECOMPOSITIONS: dict[Any, Any] = {
    torch.ops.dorafx.compose.default: autograd.compose,
    torch.ops.dorafx.compose_delta.default: autograd.compose_delta,
    torch.ops.dorafx.dora_linear.default: autograd.dora_linear,
    torch.ops.dorafx.cast_linear.default: autograd.cast_linear,
}


# Fake kernels, for compilers. A fake kernel runs the same checks as the real one, so it raises the same errors, and allocates its
# results by the same layout rule.


@torch.library.register_fake("dorafx::row_norm", lib=_LIBRARY)
def _row_norm_fake(
    weight: Any, left: Any, right: Any, scale: float, algorithm: str = "auto", factor_dtype: torch.dtype | None = None
) -> torch.Tensor:
    norm.check_operands(weight, left, right)
    norm.check_algorithm(algorithm, factor_dtype)
    return _norms_of(weight, left, right)


def _norms_of(weight: Any, left: Any, right: Any) -> torch.Tensor:
    return torch.empty(weight.shape[0], dtype=norm.compute_dtype(weight, left, right), device=weight.device)


@torch.library.register_fake("dorafx::row_norms", lib=_LIBRARY)
def _row_norms_fake(weights: Any, lefts: Any, rights: Any, *rest: Any) -> list[torch.Tensor]:
    norm.check_lists(weights, lefts, rights, *rest)
    return [_norms_of(*operands) for operands in zip(weights, lefts, rights)]


@torch.library.register_fake("dorafx::row_norm_quantized", lib=_LIBRARY)
@quantized.flat_norm_arguments
def _row_norm_quantized_fake(
    weight: quantized.Packed, left: Any, right: Any, scale: float, factor_dtype: torch.dtype | None = None
) -> torch.Tensor:
    quantized.check_operands(weight, left, right)
    norm.check_factor_dtype(factor_dtype)
    return torch.empty(weight.shape[0], dtype=norm.compute_dtype(left, right), device=weight.packed.device)


@torch.library.register_fake("dorafx::dequantize", lib=_LIBRARY)
@quantized.flat_arguments
def _dequantize_fake(weight: quantized.Packed) -> torch.Tensor:
    weight.check()
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.packed.device)


@torch.library.register_fake("dorafx::row_norm_backward", lib=_LIBRARY)
def _row_norm_backward_fake(
    grad: Any, weight: Any, left: Any, right: Any, n: Any, scale: float, *needs: bool
) -> tuple[torch.Tensor, ...]:
    norm.check_backward(grad, weight, left, right, n)
    return tuple(norm.gradient_buffer(need, t) for need, t in zip(needs, (weight, left, right)))


@torch.library.register_fake("dorafx::row_norm_batched", lib=_LIBRARY)
def _row_norm_batched_fake(
    weight: Any, left: Any, right: Any, scale: float, algorithm: str = "auto", factor_dtype: torch.dtype | None = None
) -> torch.Tensor:
    norm.check_operands(weight, left, right, batched=True)
    norm.check_algorithm(algorithm, factor_dtype)
    return torch.empty(weight.shape[:2], dtype=norm.compute_dtype(weight, left, right), device=weight.device)


@torch.library.register_fake("dorafx::row_norm_batched_backward", lib=_LIBRARY)
def _row_norm_batched_backward_fake(
    grad: Any, weight: Any, left: Any, right: Any, n: Any, scale: float, *needs: bool
) -> tuple[torch.Tensor, ...]:
    norm.check_backward(grad, weight, left, right, n, batched=True)
    return tuple(norm.gradient_buffer(need, t) for need, t in zip(needs, (weight, left, right)))


@torch.library.register_fake("dorafx::compose_forward", lib=_LIBRARY)
def _compose_forward_fake(
    result: Any, base: Any, lora: Any, g: Any, bias: Any, scale: float, out_dtype: Any, kept: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = composition.check_compose(result, base, lora, g, bias)
    y = layout.empty(shape, result, base, lora, g, bias, dtype=out_dtype, device=base.device)
    if kept is None:
        return y, base.new_empty(0)
    summed = base.shape if lora is None else torch.broadcast_shapes(base.shape, lora.shape)
    return y, layout.empty(summed, base, lora, dtype=kept, device=base.device)


@torch.library.register_fake("dorafx::compose_backward", lib=_LIBRARY)
def _compose_backward_fake(
    grad: Any,
    g: Any,
    total: Any,
    scale: float,
    delta: bool,
    base_dtype: Any,
    lora_dtype: Any,
    needs_g: bool,
    bias_dtype: Any,
    bias_shape: Any = None,
) -> tuple[torch.Tensor, ...]:
    bias = composition.check_compose_backward(grad, g, total, needs_g, bias_shape)
    buffers = composition.gradient_buffers(grad, g if needs_g else None, bias, base_dtype, lora_dtype, bias_dtype)
    return tuple(layout.present(t, grad) for t in buffers)


@torch.library.register_fake("dorafx::dora_linear_forward", lib=_LIBRARY)
def _dora_linear_forward_fake(
    x: Any, weight: Any, h: Any, left: Any, g: Any, bias: Any, scale: float, out_dtype: Any, kept: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    linear.check_linear(x, weight, h, left, g, bias)
    shape = (*x.shape[:-1], left.shape[0])
    return x.new_empty(shape, dtype=out_dtype), x.new_empty(0 if kept is None else shape, dtype=kept or x.dtype)


@torch.library.register_fake("dorafx::cast_linear_backward", lib=_LIBRARY)
def _cast_linear_backward_fake(grad: Any, weight: Any) -> torch.Tensor:
    linear.check_cast_linear(grad, weight, backward=True)
    return torch.empty((*grad.shape[:-1], weight.shape[1]), dtype=grad.dtype, device=grad.device)


@register_flop_formula(torch.ops.dorafx.row_norm)
def _row_norm_flops(weight: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(weight[0]) * int(weight[1]) * int(right[0])


@register_flop_formula(torch.ops.dorafx.row_norms)
def _row_norms_flops(weights: Any, lefts: Any, rights: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return sum(_row_norm_flops(*shapes) for shapes in zip(weights, lefts, rights))


@register_flop_formula(torch.ops.dorafx.row_norm_quantized)
def _row_norm_quantized_flops(
    packed: Any, scales: Any, zeros: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return 2 * int(left[0]) * int(right[1]) * int(right[0])


@register_flop_formula(torch.ops.dorafx.row_norm_backward)
def _row_norm_backward_flops(
    grad: Any, weight: Any, left: Any, right: Any, n: Any, scale: Any, *needs: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    (d_out, d_in), r = weight, int(right[0])
    needs_weight, needs_left, needs_right = (*needs, False, False, False)[:3]
    products = int(needs_weight) + int(needs_left) + int(needs_right)
    grams = int(needs_left) * r * r * (d_in + d_out) + int(needs_right) * r * r * (d_in + d_out)
    return int(2 * (products * int(d_out) * int(d_in) * r + grams))


@register_flop_formula(torch.ops.dorafx.row_norm_batched)
def _row_norm_batched_flops(
    weight: Any, left: Any, right: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(weight[0]) * _row_norm_flops(weight[1:], left[1:], right[1:])


@register_flop_formula(torch.ops.dorafx.row_norm_batched_backward)
def _row_norm_batched_backward_flops(
    grad: Any, weight: Any, left: Any, right: Any, n: Any, scale: Any, *needs: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    shapes = (shape[1:] for shape in (grad, weight, left, right, n))
    return int(weight[0]) * _row_norm_backward_flops(*shapes, scale, *needs)


@register_flop_formula(torch.ops.dorafx.dora_linear_forward)
def _dora_linear_flops(x: Any, weight: Any, h: Any, left: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(math.prod(x[:-1])) * int(weight[0]) * (int(weight[1]) + int(left[1]))


@register_flop_formula(torch.ops.dorafx.cast_linear_backward)
def _cast_linear_backward_flops(grad: Any, weight: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return 2 * int(math.prod(grad[:-1])) * int(weight[0]) * int(weight[1])
