"""Operators on CUDA tensors: a Triton kernel where there is one for the dtypes, ATen calls elsewhere."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from dorafx._compat.autograd import below_autocast
from dorafx.ops import batched, composition, layout, linear, norm, quantized

_DEVICES: tuple[str, ...] = ("cuda",)
_HALF_TO_SINGLE = (torch.float16, torch.bfloat16, torch.float32)


def being_captured() -> bool:
    """Whether a CUDA graph is recording what this thread launches."""
    return bool(torch.cuda.is_initialized()) and torch.cuda.is_current_stream_capturing()  # type: ignore[no-untyped-call]


@functools.cache
def available() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def serves(device: torch.device) -> bool:
    """Whether there are kernels for a device."""
    return device.type in _DEVICES and available()


def takes(*tensors: torch.Tensor) -> bool:
    """Whether the norm kernels take these operands: they accumulate in fp32, so not fp64, and a launch needs at least one element."""
    return available() and all(t.dtype != torch.float64 and t.numel() > 0 for t in tensors)


def row_norm(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    algorithm: str = "auto",
    factor_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See :func:`dorafx.ops.norm.row_norm`."""
    norm.check_operands(weight, left, right)
    norm.check_algorithm(algorithm, factor_dtype)
    if algorithm not in ("auto", "tiled") or not takes(weight, left, right):
        return norm.row_norm(weight, left, right, scale, algorithm)
    return _launched([(weight, left, right)], scale, factor_dtype)[0]


def row_norms(
    weights: Sequence[torch.Tensor],
    lefts: Sequence[torch.Tensor],
    rights: Sequence[torch.Tensor],
    scales: Sequence[float],
    algorithm: str,
    squares: Sequence[torch.Tensor | None],
    factor_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """See :func:`dorafx.ops.norm.row_norms`; norms of equal shapes, dtypes and strides are launched together."""
    norm.check_lists(weights, lefts, rights, scales, algorithm, squares, factor_dtype)
    operands = list(zip(weights, lefts, rights))
    if algorithm not in ("auto", "tiled") or not available():
        return norm.row_norms(weights, lefts, rights, scales, algorithm, squares)
    groups: dict[Any, list[int]] = {}
    for i, tensors in enumerate(operands):
        groups.setdefault(group_key(tensors, scales[i]), []).append(i)
    norms: list[Any] = [None] * len(operands)
    for members in groups.values():
        if takes(*operands[members[0]]):
            results = _launched([operands[i] for i in members], scales[members[0]], factor_dtype)
        else:
            results = [norm.row_norm(*operands[i], scales[i], algorithm) for i in members]
        for i, value in zip(members, results):
            norms[i] = value
    return norms


def _launched(
    group: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]], scale: float, factor_dtype: torch.dtype | None
) -> list[torch.Tensor]:
    """The norms of one :func:`group_key` in as few launches as possible; one by one after running out of memory.

    The launches are the same while a CUDA graph is being captured, so nothing has to be compiled or loaded during a capture."""
    from dorafx.ops.triton.row_norm import launch_group

    def compute(shrink: int) -> list[torch.Tensor]:
        if shrink == 1:
            return launch_group(group, scale, operand=factor_dtype)
        # Not dividing d_in also saves the buffer of partial sums.
        return [launch_group([operands], scale, 1, operand=factor_dtype)[0] for operands in group]

    return norm.with_less_memory(compute)


def row_norms_where(
    changed: torch.Tensor,
    out: torch.Tensor,
    group: Sequence[tuple[torch.Tensor, torch.Tensor, torch.Tensor]],
    scale: float,
    factor_dtype: torch.dtype | None,
) -> list[torch.Tensor]:
    """The norms of one :func:`group_key` by the kernels, computed where a flag on the device says so.

    Args:
        changed: an int32 for each norm; those where it is zero are left as they are.
        out: the norms of before one after another, fp32, which is overwritten.
        group: weight, left and right of each, which the kernels take (:func:`takes`).

    Returns:
        Views of ``out``.
    """
    from dorafx.ops.triton.row_norm import Guard, launch_group

    guard = Guard(changed, out)
    return norm.with_less_memory(
        lambda shrink: launch_group(group, scale, None if shrink == 1 else 1, operand=factor_dtype, guard=guard)
    )


def row_norm_batched(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    algorithm: str = "auto",
    factor_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See :func:`dorafx.ops.batched.row_norm_batched`; all experts are launched together."""
    norm.check_operands(weight, left, right, batched=True)
    norm.check_algorithm(algorithm, factor_dtype)
    if algorithm not in ("auto", "tiled") or not takes(weight, left, right):
        return batched.row_norm_batched(weight, left, right, scale, algorithm)
    return torch.stack(_launched(list(zip(weight, left, right)), scale, factor_dtype))


def row_norm_quantized(
    weight: quantized.Packed,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    factor_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """See :func:`dorafx.ops.quantized.row_norm_quantized`."""
    norm.check_factor_dtype(factor_dtype)
    quantized.check_operands(weight, left, right)
    if available() and takes(left, right):
        from dorafx.ops.triton.quantized import launch, serves

        if serves(weight):
            # As above: the retry does not divide d_in, which saves the partial sums.
            return norm.with_less_memory(
                lambda shrink: launch(weight, left, right, scale, None if shrink == 1 else 1, operand=factor_dtype)
            )
    return quantized.row_norm_quantized(weight, left, right, scale)


def group_key(tensors: Sequence[torch.Tensor], scale: float) -> tuple[Any, ...]:
    """A key that is equal for norms that can be launched together."""
    return scale, tensors[0].device, *((t.dtype, t.shape, t.stride(), t.data_ptr() % 16 == 0) for t in tensors)


def runs_kernels(device: torch.device, *dtypes: torch.dtype) -> bool:
    """Whether the kernels of the composition serve a device and dtypes: a CUDA device, Triton, and no fp64."""
    return device.type in _DEVICES and all(dtype in _HALF_TO_SINGLE for dtype in dtypes) and available()


def _served(activations: Sequence[torch.Tensor | None], vectors: Sequence[torch.Tensor | None], *out: Any) -> bool:
    """Whether the kernels take these operands: activations of one shape, vectors of its last size, on one device."""
    tensors = [t for t in (*activations, *vectors) if t is not None]
    first = tensors[0]
    return (
        first.dim() > 0
        and first.numel() > 0
        and runs_kernels(first.device, *(t.dtype for t in tensors), *(d for d in out if d is not None))
        and all(t.device == first.device for t in tensors)
        and all(t.shape == first.shape for t in activations if t is not None)
        and all(v.shape == first.shape[-1:] for v in vectors if v is not None)
    )


def _served_linear(matrices: Sequence[torch.Tensor], vectors: Sequence[torch.Tensor | None], *out: Any) -> bool:
    """Whether the kernel of the whole layer takes these operands, whose shapes fit together: matrices of one dtype."""
    first = matrices[0]
    tensors = [*matrices, *(v for v in vectors if v is not None)]
    return (
        all(t.dtype == first.dtype and t.numel() > 0 for t in matrices)
        and all(t.device == first.device for t in tensors)
        and runs_kernels(first.device, *(t.dtype for t in tensors), *(d for d in out if d is not None))
    )


def compose_forward(
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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The composition, and ``base + s·lora`` in the dtype ``kept`` (an empty tensor if ``kept`` is None). Both are new tensors in
    the layouts of :mod:`dorafx.ops.layout`.

    Args:
        into: ``base`` or ``result`` itself, to overwrite it with the composition; its dtype must be ``out_dtype``.
        biased: see :func:`dorafx.ops.composition.forward_math`; no kernel computes it.

    Raises:
        ValueError, RuntimeError: see :func:`dorafx.ops.composition.check_compose` and
            :func:`dorafx.ops.composition.check_overwritten`.
    """
    shape = composition.check_compose(result, base, lora, g, bias)
    if into is not None:
        composition.check_overwritten(into, shape)
    operands = (result, base, lora, g, bias)
    if biased or not _served([base, result, lora], [g, bias], out_dtype, kept):
        y, total = composition.forward_math(*operands, scale, out_dtype, kept, into, biased)
        if into is None:
            y = layout.settled(y, *operands)
        if total is not None:
            total = layout.settled(layout.owned(total, base), base, lora)
        return y, layout.present(total, base)
    from dorafx.ops.triton.compose import launch_forward

    y = layout.empty(shape, *operands, dtype=out_dtype, device=base.device) if into is None else into
    total = None if kept is None else layout.empty(shape, base, lora, dtype=kept, device=base.device)
    launch_forward(result, base, lora, g, bias, scale, y, total)
    return y, layout.present(total, base)


def compose_backward(
    grad: torch.Tensor,
    g: torch.Tensor,
    total: torch.Tensor | None,
    scale: float,
    delta: bool,
    base_dtype: torch.dtype | None,
    lora_dtype: torch.dtype | None,
    needs_g: bool,
    bias_dtype: torch.dtype | None,
    bias_shape: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of base, lora, g and bias as new tensors; an empty tensor for each that is not needed (its dtype is None). The
    gradients of base and lora have the shape and layout of ``grad`` even if the operand was broadcast; those of g and bias are
    contiguous.

    Args:
        bias_shape: that of the bias; ``[d_out]`` where it is None.

    Raises:
        ValueError: see :func:`dorafx.ops.composition.check_compose_backward`.
    """
    bias = composition.check_compose_backward(grad, g, total, needs_g, bias_shape)
    dtypes = (base_dtype, lora_dtype, bias_dtype)
    if not _served([grad, total], [g], *dtypes) or (bias_dtype is not None and bias != grad.shape[-1:]):
        gradients = composition.backward_math(
            grad, g, total, scale, delta, base_dtype, lora_dtype, needs_g, bias_dtype, bias
        )
        d_base, d_lora = (None if t is None else layout.settled(t, grad) for t in gradients[:2])
        d_g, d_bias = (None if t is None else layout.settled(t) for t in gradients[2:])
    else:
        from dorafx.ops.triton.compose import launch_backward

        d_base, d_lora, d_g, d_bias = composition.gradient_buffers(grad, g if needs_g else None, bias, *dtypes)
        launch_backward(grad, g, total if needs_g else None, scale, delta, d_base, d_lora, d_g, d_bias)
    return tuple(layout.present(t, grad) for t in (d_base, d_lora, d_g, d_bias))  # type: ignore[return-value]


def dora_linear_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    h: torch.Tensor,
    left: torch.Tensor,
    g: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    out_dtype: torch.dtype,
    kept: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A DoRA linear, and ``x·Wᵀ + s·h·Bᵀ`` in the dtype ``kept`` (an empty tensor if ``kept`` is None); both contiguous.

    Raises:
        ValueError, TypeError: see :func:`dorafx.ops.linear.check_linear`.
    """
    linear.check_linear(x, weight, h, left, g, bias)
    if not _served_linear((x, weight, h, left), (g, bias), out_dtype, kept):
        with below_autocast():
            base, lora = torch.nn.functional.linear(x, weight), torch.nn.functional.linear(h, left)
        y, total = composition.forward_math(None, base, lora, g, bias, scale, out_dtype, kept)
        return layout.settled(y), layout.present(None if total is None else layout.settled(total), x)
    from dorafx.ops.triton.linear import launch

    shape = (*x.shape[:-1], left.shape[0])
    y = x.new_empty(shape, dtype=out_dtype)
    total = None if kept is None else x.new_empty(shape, dtype=kept)
    launch(x, weight, h, left, g, bias, scale, y, total)
    return y, layout.present(total, x)
