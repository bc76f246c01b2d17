"""The row norm without the dense product, by blocks of rows in a small buffer (tiled), or by the expansion (factored).

Both accumulate in fp32 (fp64 if an operand is fp64) and allocate no more than a fraction of the weight's size. They consist of ATen
calls, so they run on any device; on a CPU a block stays in the cache between its GEMM and its sum of squares.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch

from dorafx._compat.autograd import below_autocast
from dorafx.errors import DorafxWarning

from . import layout

T = TypeVar("T")

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# A block of this many bytes is still in the cache after its GEMM, and large enough for the GEMM to run at full rate (measured at
# 256 KiB to 4 MiB). On accelerators few launches matter more.
_CPU_BLOCK_BYTES = 4 << 20
_DEVICE_BLOCK_BYTES = 16 << 20
# Every buffer is smaller than the weight divided by this.
_SHARE = 8
# MKL takes longer for a product over fewer columns than for one over so many.
_FEWEST = 16
# Of the factored norm of fp32 operands on a CPU: the fewest columns of a weight that it serves, the elements that are added up for each row
# of a block, and the largest rank whose Gram matrix is summed in fp64.
_FEW_COLUMNS = 128
_BESIDE = 12
_EXACT_GRAM = 32
# Terms that together are more than so many times their sum lose digits that the tiled norm keeps.
_CANCELLED = 1.25
# Devices whose values the host reads without waiting for anything.
_READ_AT_ONCE: tuple[str, ...] = ("cpu",)
# What the operator of one weight and that of a batch are called, what they take, the axis in front, and how many there are.
_SINGLE = ("row_norm", "matrices", "", 2)
_BATCHED = ("row_norm_batched", "batches of matrices", "batch, ", 3)
# The factors by which blocks are shrunk, one after the other, when memory runs out.
_SHRINK = (1, 4, 16, 64, 256)


def compute_dtype(*operands: torch.Tensor) -> torch.dtype:
    """fp64 if one of the operands is fp64, as type promotion gives for ``W + s·B·A``; else fp32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in operands) else torch.float32


def check_operands(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, batched: bool = False) -> None:
    """Check the operands of a row norm, or (``batched``) of the norms of a batch of weights.

    Raises:
        ValueError: shapes or devices that do not fit together.
        TypeError: a dtype other than fp16, bf16, fp32 and fp64.
    """
    name, kind, axis, dims = _BATCHED if batched else _SINGLE
    shapes = f"weight {tuple(weight.shape)}, left {tuple(left.shape)}, right {tuple(right.shape)}"
    if weight.dim() != dims or left.dim() != dims or right.dim() != dims:
        raise ValueError(f"{name} takes {kind}; got {shapes}")
    batches = left.shape[:-1] == weight.shape[:-1] and right.shape[:-2] == weight.shape[:-2]
    if not batches or right.shape[-1] != weight.shape[-1] or left.shape[-1] != right.shape[-2]:
        raise ValueError(
            f"{name} takes weight [{axis}d_out, d_in], left [{axis}d_out, r], right [{axis}r, d_in], whose shapes must agree; "
            f"got {shapes}"
        )
    for operand, tensor in (("weight", weight), ("left", left), ("right", right)):
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{name} takes fp16, bf16, fp32 or fp64; {operand} is {tensor.dtype}")
    if not (weight.device == left.device == right.device):
        raise ValueError(
            f"{name}'s operands are on {weight.device}, {left.device} and {right.device}; one device is needed"
        )


def check_algorithm(algorithm: str, factor_dtype: torch.dtype | None = None) -> None:
    """Raises:
    ValueError: an unknown algorithm.
    TypeError: see :func:`check_factor_dtype`.
    """
    check_factor_dtype(factor_dtype)
    if algorithm not in ("auto", "tiled", "factored"):
        raise ValueError(f"row_norm: unknown algorithm {algorithm!r}; allowed are 'auto', 'tiled', 'factored'")


def check_factor_dtype(dtype: torch.dtype | None) -> None:
    """Raises:
    TypeError: neither None nor fp16, bf16, fp32 or fp64.
    """
    if dtype is not None and dtype not in FLOATS:
        raise TypeError(f"row_norm: factor_dtype is fp16, bf16, fp32, fp64 or None; got {dtype}")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; torch's CPU allocator raises a bare ``RuntimeError``."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def with_less_memory(compute: Callable[[int], T]) -> T:
    """``compute(1)``; if memory runs out, ``compute`` again with larger values of ``shrink``, and one warning.

    Raises:
        RuntimeError: out of memory with the smallest blocks too; the first error is raised.
    """
    first: RuntimeError | None = None
    for shrink in _SHRINK:
        try:
            result = compute(shrink)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            # Without the traceback, whose frames hold the buffers: the next attempt needs that memory.
            first = first or error.with_traceback(None)
            continue
        if first is not None:
            warnings.warn("out of memory during a norm: it was computed again with less", DorafxWarning, stacklevel=2)
        return result
    assert first is not None
    raise first


def buffer_limit(weight: torch.Tensor, dtype: torch.dtype, shrink: int = 1) -> int:
    """How many elements of ``dtype`` a buffer may have that stays in the cache, and below one eighth of the weight's size."""
    return min(_limits(weight, dtype, shrink))


def _limits(weight: torch.Tensor, dtype: torch.dtype, shrink: int) -> tuple[int, int]:
    """How many elements of ``dtype`` are one eighth of the weight's size, and how many stay in the cache."""
    size = 8 if dtype == torch.float64 else 4
    block = _CPU_BLOCK_BYTES if weight.device.type == "cpu" else _DEVICE_BLOCK_BYTES
    below = max(0, weight.numel() * weight.element_size() - 1)
    return below // (_SHARE * size * shrink), block // (size * shrink)


def _block(
    weight: torch.Tensor, rank: int, dtype: torch.dtype, casts_right: bool, beside: int = 0, shrink: int = 1
) -> tuple[int, int]:
    """Rows and columns of a block that fits into the cache and keeps every buffer below one eighth of the weight's size; blocks are of
    about equal height.

    ``beside``: columns of another buffer with as many rows (the product with a factor, or rows of a factor that is cast).
    ``shrink``: by how much the buffers are to be smaller than usual."""
    d_out, d_in = weight.shape
    limit, target = _limits(weight, dtype, shrink)
    # If a weight has few rows, even one row is a large share of it.
    columns = max(1, min(d_in, limit // rank if casts_right and rank else limit))
    rows = max(1, min(d_out, min(limit, max(target, columns)) // max(columns, beside)))
    return (-(-d_out // -(-d_out // rows)) if d_out else rows), columns


def tiled(weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, shrink: int = 1) -> torch.Tensor:
    """``‖W + s·L·R‖`` by row: each block of rows is formed in a reused buffer, squared and summed. Reads W once, without
    cancellation, in 2·d_out·d_in·r FLOPs. ``shrink``: by how much its buffers are to be smaller than usual."""
    dtype = compute_dtype(weight, left, right)
    d_out, d_in = weight.shape
    rank = right.shape[0]
    casts = right.dtype != dtype
    rows, columns = _block(weight, rank, dtype, casts, rank if left.dtype != dtype else 0, shrink)
    norms = torch.empty(d_out, dtype=dtype, device=weight.device)
    if d_in == 0 or d_out == 0:
        return norms.zero_()
    few = 0 < rank < _FEWEST and weight.device.type == "cpu" and dtype == torch.float32
    if few and _FEWEST * max(d_out, columns) <= buffer_limit(weight, dtype, shrink):
        left, rank = torch.nn.functional.pad(left.to(dtype), (0, _FEWEST - rank)), _FEWEST
    buffer = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    single = columns >= d_in
    for start in range(0, d_in, columns):
        part = right[:, start : start + columns].to(dtype)
        if len(part) < rank:
            part = torch.nn.functional.pad(part, (0, 0, 0, rank - len(part)))
        for first in range(0, d_out, rows):
            some = slice(first, first + rows)
            block, side, target = weight[some, start : start + columns], left[some], norms[some]
            formed = buffer[: block.shape[0], : block.shape[1]].copy_(block)
            if rank:
                formed.addmm_(side.to(dtype), part, alpha=scale)
            if single:
                torch.linalg.vector_norm(formed, dim=1, out=target)
            elif start == 0:
                target.copy_(torch.linalg.vector_norm(formed, dim=1))
            else:
                # hypot of the chunks' norms: squares of large entries do not overflow.
                torch.hypot(target, torch.linalg.vector_norm(formed, dim=1), out=target)
    return norms


def factored(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    square: torch.Tensor | None = None,
    shrink: int = 1,
) -> torch.Tensor:
    """The expansion ``‖W‖² + 2s·⟨L, W·Rᵀ⟩ + s²·⟨L·(R·Rᵀ), L⟩`` by row.

    All three terms are sums over d_in, so factors are cast in chunks of columns, and the weight in blocks of rows of each chunk. Apart
    from the ``[r, r]`` Gram matrix, no buffer reaches one eighth of the weight's size.

    On a CPU the terms of fp32 operands are added in fp64, so that the result is as exact as that of :func:`tiled`; and rows whose terms
    cancel each other are computed by that.

    Args:
        square: ``‖W‖²`` by row as :func:`row_squares` computes it, ``[d_out]`` in :func:`compute_dtype`, if it was kept.
        shrink: by how much the buffers are to be smaller than usual.
    """
    if _is_expanded(weight, left, right):
        return _expanded(weight, left, right, scale, square, shrink)
    dtype = compute_dtype(weight, left, right)
    d_out, d_in = weight.shape
    rank = right.shape[0]
    totals = torch.zeros(d_out, dtype=dtype, device=weight.device) if square is None else square.clone()
    gram = torch.zeros(rank, rank, dtype=dtype, device=weight.device)
    rows, columns = _block(weight, rank, dtype, right.dtype != dtype, rank, shrink)
    for start in range(0, d_in, columns):
        chunk = slice(start, start + columns)
        part = right[:, chunk].to(dtype)
        gram.addmm_(part, part.mT)
        for first in range(0, d_out, rows):
            block = weight[first : first + rows, chunk].to(dtype)
            side = left[first : first + rows].to(dtype)
            total = 2 * scale * (block @ part.mT).mul_(side).sum(dim=1)
            if square is None:
                total += torch.linalg.vector_norm(block, dim=1).square_()
            totals[first : first + rows] += total
    for first in range(0, d_out, rows):
        side = left[first : first + rows].to(dtype)
        totals[first : first + rows] += scale * scale * (side @ gram).mul_(side).sum(dim=1)
    # Rounding may leave a tiny negative number where W and the delta cancel; NaN must pass.
    return torch.where(totals < 0, 0.0, totals).sqrt_()


def _is_expanded(*operands: torch.Tensor) -> bool:
    if operands[0].shape[1] < _FEW_COLUMNS:
        return False  # what it adds up for each row would not be small beside the row
    return all(t.dtype == torch.float32 and t.device.type == "cpu" and t.numel() for t in operands)


def _expanded(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    square: torch.Tensor | None,
    shrink: int,
) -> torch.Tensor:
    """:func:`factored` of fp32 operands on a CPU. The weight is read as it is, so that a block of rows is as large as its ``[rows, r]``
    product allows."""
    (d_out, d_in), rank = weight.shape, right.shape[0]
    limit = buffer_limit(weight, torch.float32, shrink)
    rows = max(1, min(d_out, limit // max(rank, _BESIDE)))
    # Of few entries each counts: a Gram matrix of low rank is summed in fp64.
    exact = rank <= _EXACT_GRAM
    gram = torch.zeros(rank, rank, dtype=torch.float64 if exact else torch.float32)
    for part in torch.split(right, max(1, min(d_in, limit // (2 * rank))) if exact else d_in, dim=1):
        part = part.to(gram.dtype)
        gram += part @ part.mT
    gram = gram.float()
    norms = torch.empty(d_out)
    for first in range(0, d_out, rows):
        some = slice(first, first + rows)
        block, side = weight[some], left[some]
        product = side @ gram
        terms = _sums(product.mul_(side), limit).mul_(scale * scale)
        terms += _squares(block) if square is None else square[some]
        torch.mm(block, right.mT, out=product)
        total = _sums(product.mul_(side), limit).mul_(2 * scale).add_(terms)
        cancelled = ~(_CANCELLED * total >= terms)  # also where something is NaN
        torch.sqrt(total, out=total)
        norms[some] = total
        if bool(cancelled.any()):
            (places,) = cancelled.nonzero(as_tuple=True)
            for few in torch.split(places, max(1, limit // d_in)):
                norms[few + first] = tiled(block[few], side[few], right, scale, shrink)
    return norms


def fastest(d_out: int, d_in: int, rank: int, operands: Sequence[torch.Tensor]) -> Literal["tiled", "factored"]:
    """The algorithm that is fastest for a weight ``[d_out, d_in]`` and factors of a rank.

    Fitted on two cores of an AMD EPYC with torch 2.13, fp32, from 256x256 to 8192x8192 with ranks from 8 to 384, without kept ``‖W‖²``:
    where the rank is at most 64 (128 for weights of up to 16 MiB) and an eighth of d_in, the factored algorithm takes 0.5 to 1.17 of the
    time of the tiled one. For other dtypes, which it would cast, and on other devices it reads the weight more than once.
    """
    in_cache = d_out * d_in <= 2**22
    if not all(t.dtype == torch.float32 and t.device.type == "cpu" for t in operands) or d_out * d_in < 2**16:
        return "tiled"
    return "factored" if 0 < rank <= min(128 if in_cache else 64, d_in // 8) else "tiled"


def _sums(block: torch.Tensor, limit: int) -> torch.Tensor:
    """Sums of rows in fp64. Torch copies fp32 numbers to fp64 for that, so that many are summed in two halves: ``limit`` is how many
    elements of fp32 a buffer may have."""
    half = block.shape[1] // 2
    if 2 * block.numel() <= limit or not half:
        return block.sum(dim=1, dtype=torch.float64)
    return block[:, :half].sum(dim=1, dtype=torch.float64) + block[:, half:].sum(dim=1, dtype=torch.float64)


def _squares(block: torch.Tensor) -> torch.Tensor:
    """``‖W‖²`` by row in fp64, from norms of quarters of rows in fp32, whose errors average out."""
    width = block.shape[1] // 4
    norms: torch.Tensor = torch.linalg.vector_norm(torch.unflatten(block[:, : 4 * width], 1, (4, width)), dim=2)
    squares = norms.double().square_().sum(dim=1)
    if block.shape[1] % 4:
        squares += torch.linalg.vector_norm(block[:, 4 * width :], dim=1).double().square_()
    return squares


def norm_without_delta(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float
) -> torch.Tensor | None:
    """``‖W‖`` by row if a factor is zero, as at the start of a training, where the magnitude is that norm: by the very call that made it,
    on the same layout, so that ``m / n`` is 1 to the bit and the adapted layer gives what the frozen one does.

    On a CPU, where looking at values costs no synchronisation, and of a weight that needs no cast; else None, as where the other
    factor or the scaling is not finite. Sums over the last axis."""
    if (
        weight.device.type not in _READ_AT_ONCE
        or weight.dtype != compute_dtype(weight, left, right)
        or not weight.numel()
    ):
        return None
    if not math.isfinite(scale) or not (_is_zero(left) or _is_zero(right)):
        return None
    if not bool(left.isfinite().all()) or not bool(right.isfinite().all()):
        return None
    norms: torch.Tensor = torch.linalg.vector_norm(weight, dim=-1)
    return norms


def _is_zero(factor: torch.Tensor) -> bool:
    # A trained factor's last row is enough to tell.
    return not bool(factor[..., -1:, :].any()) and not bool(factor.any())


def row_norm(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    algorithm: str = "auto",
    factor_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``n[i] = ‖weight[i] + scale·(left·right)[i]‖₂``.

    Args:
        weight: ``[d_out, d_in]``, any strides, fp16 to fp64.
        left: ``[d_out, r]``; may have another floating dtype than the weight.
        right: ``[r, d_in]``.
        scale: the scaling ``s``.
        algorithm: ``"tiled"``, ``"factored"``, or ``"auto"``: as :func:`fastest`.
        factor_dtype: a dtype to which the factors may be rounded before they are multiplied, because the program itself does so
            (under autocast); sums are still fp32. A kernel multiplies in it, on tensor cores; ATen calls still multiply in fp32.

    Returns:
        ``[d_out]`` in fp32, in fp64 where an operand is fp64. A zero row gives 0; NaN and inf propagate.

    Raises:
        ValueError, TypeError: see :func:`check_operands`, :func:`check_algorithm`.
        RuntimeError: out of memory, with the smallest blocks too (see :func:`with_less_memory`).
    """
    check_operands(weight, left, right)
    check_algorithm(algorithm, factor_dtype)
    # The operator is opaque, so it also runs inside the user's autocast regions, where products would be in bf16.
    if algorithm == "auto":
        (d_out, d_in), rank = weight.shape, right.shape[0]
        algorithm = fastest(d_out, d_in, rank, (weight, left, right))
    with below_autocast():
        alone = norm_without_delta(weight, left, right, scale)
        if alone is not None:
            return alone
        if algorithm == "factored":
            return with_less_memory(lambda shrink: factored(weight, left, right, scale, shrink=shrink))
        return with_less_memory(lambda shrink: tiled(weight, left, right, scale, shrink))


def row_norm_unrolled(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, *how: Any
) -> torch.Tensor:
    """:func:`row_norm` as a fixed sequence of aten calls, for graphs that may hold nothing else. At most ten blocks of rows, or
    twenty if the weight is cast, so that no intermediate result reaches one eighth of the weight's size.

    Raises:
        ValueError: the number of rows is symbolic.
    """
    dtype = compute_dtype(weight, left, right)
    d_out = weight.shape[0]
    if not isinstance(d_out, int):
        raise ValueError(f"row_norm: a weight of symbolic size {tuple(weight.shape)} has no fixed number of blocks")
    rows = max(1, -(-d_out // (10 if weight.dtype == dtype else 20)))
    wide_left, wide_right = left.to(dtype) * scale, right.to(dtype)
    blocks = (slice(first, first + rows) for first in range(0, d_out, rows))
    norms = [
        torch.linalg.vector_norm(torch.addmm(weight[block].to(dtype), wide_left[block], wide_right), dim=1)
        for block in blocks
    ]
    return torch.cat(norms) if norms else weight.new_zeros(0, dtype=dtype)


def row_squares(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """``‖W‖²`` by row: ``[d_out]`` in fp32, or in fp64 if the weight or ``dtype`` is fp64."""
    left, right = weight.new_empty(weight.shape[0], 0, dtype=dtype), weight.new_empty(0, weight.shape[1])
    with below_autocast():
        if dtype == torch.float32 and _is_expanded(weight):
            return _squares(weight).float()
        return with_less_memory(lambda shrink: tiled(weight, left, right, 0.0, shrink)).square_()


def row_norms(
    weights: Sequence[torch.Tensor],
    lefts: Sequence[torch.Tensor],
    rights: Sequence[torch.Tensor],
    scales: Sequence[float],
    algorithm: str,
    squares: Sequence[torch.Tensor | None],
    factor_dtype: torch.dtype | None = None,
) -> list[torch.Tensor]:
    """Several norms, each as :func:`row_norm` computes it; any shapes and dtypes.

    Args:
        squares: for the factored algorithm: ``‖W‖²`` by row of each weight, or None; empty for none at all.

    Raises:
        ValueError, TypeError: see :func:`check_lists`.
    """
    check_lists(weights, lefts, rights, scales, algorithm, squares, factor_dtype)
    norms = []
    for i, operands in enumerate(zip(weights, lefts, rights, scales)):
        if algorithm == "factored" and squares and squares[i] is not None:
            with below_autocast():
                alone = norm_without_delta(*operands)
                norms.append(
                    with_less_memory(functools.partial(factored, *operands, squares[i])) if alone is None else alone
                )
        else:
            norms.append(row_norm(*operands, algorithm))
    return norms


def check_lists(
    weights: Sequence[torch.Tensor],
    lefts: Sequence[torch.Tensor],
    rights: Sequence[torch.Tensor],
    scales: Sequence[float],
    algorithm: str,
    squares: Sequence[torch.Tensor | None],
    factor_dtype: torch.dtype | None = None,
) -> None:
    """Check the operands of several row norms.

    Raises:
        ValueError, TypeError: see :func:`check_operands`, :func:`check_algorithm`; or lists of different lengths, or squares
            that do not fit their weight.
    """
    lengths = [len(weights), len(lefts), len(rights), len(scales)]
    if len(set(lengths)) != 1 or len(squares) not in (0, len(weights)):
        raise ValueError(
            f"row_norms takes lists of one length; got {lengths[0]} weights, {lengths[1]} lefts, {lengths[2]} rights, "
            f"{lengths[3]} scales and {len(squares)} squares"
        )
    check_algorithm(algorithm, factor_dtype)
    for operands in zip(weights, lefts, rights):
        check_operands(*operands)
    for weight, left, right, square in zip(weights, lefts, rights, squares):
        dtype = compute_dtype(weight, left, right)
        if square is not None and (
            square.shape != weight.shape[:1] or square.dtype != dtype or square.device != weight.device
        ):
            raise ValueError(
                f"row_norms: squares {tuple(square.shape)} of {square.dtype} on {square.device} do not belong to a weight "
                f"{tuple(weight.shape)} of {weight.dtype} on {weight.device} whose norm is computed in {dtype}"
            )


def check_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    norm: torch.Tensor,
    batched: bool = False,
) -> None:
    """Check the operands of the backward of a row norm, or of a batch of them.

    Raises:
        ValueError: see :func:`check_operands`; or a gradient or norm that does not fit the weight.
        TypeError: see :func:`check_operands`; or a norm of another dtype than the forward returns.
    """
    check_operands(weight, left, right, batched)
    name, _, axis, _ = _BATCHED if batched else _SINGLE
    for operand, tensor in (("grad", grad), ("norm", norm)):
        if tensor.shape != weight.shape[:-1] or tensor.device != weight.device:
            raise ValueError(
                f"{name}_backward takes grad and norm [{axis}d_out] on the weight's device; {operand} is {tuple(tensor.shape)} on "
                f"{tensor.device}, the weight {tuple(weight.shape)} on {weight.device}"
            )
    if norm.dtype != compute_dtype(weight, left, right) or grad.dtype not in FLOATS:
        raise TypeError(
            f"{name}_backward takes the norm as {name} returns it, and a floating gradient; got {norm.dtype}, {grad.dtype}"
        )


def gradient_buffer(needed: bool, operand: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """A new tensor for the gradient of an operand, in the operand's layout (see :mod:`dorafx.ops.layout`), and in ``dtype`` or the
    operand's; an empty tensor if the gradient is not needed."""
    if not needed:
        return operand.new_empty(0)
    return layout.empty(operand.shape, operand, dtype=dtype or operand.dtype, device=operand.device)


def row_norm_backward(
    grad: torch.Tensor,
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    norm: torch.Tensor,
    scale: float,
    needs_weight: bool,
    needs_left: bool,
    needs_right: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the row norm, without a dense delta. With ``c = grad / n`` (``0·grad`` where n is 0, as in ATen):

    ``dW = c ⊙ (W + s·L·R)``, ``dL = s·c ⊙ (W·Rᵀ + s·L·(R·Rᵀ))``, ``dR = s·(c ⊙ L)ᵀ·W + s²·(Lᵀ·(c ⊙ L))ᵀ·R``.

    Returns:
        Gradients in the dtypes and layouts of weight, left and right; an empty tensor for each that is not needed.

    Raises:
        ValueError, TypeError: see :func:`check_backward`.
    """
    check_backward(grad, weight, left, right, norm)

    def compute(shrink: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        dtype = compute_dtype(weight, left, right)
        # As in ATen, the gradient of a zero row is 0, or NaN if the incoming gradient is infinite (that of ``1/n``, or of a root).
        wide_grad = grad.to(dtype)
        c = torch.where(norm == 0, wide_grad * 0.0, wide_grad / norm)[:, None]
        wide_left, wide_right = left.to(dtype), right.to(dtype)
        scaled_left = c * wide_left
        d_weight = gradient_buffer(needs_weight, weight)
        d_left = gradient_buffer(needs_left, left, dtype)
        d_right = gradient_buffer(needs_right, right, dtype).zero_()
        gram = wide_right @ wide_right.mT if needs_left else None
        rows, _ = _block(weight, right.shape[0], dtype, False, shrink=shrink)
        for first in range(0, weight.shape[0], rows):
            part = slice(first, first + rows)
            block = weight[part].to(dtype)
            if gram is not None:
                product = block @ wide_right.mT
                d_left[part] = scale * c[part] * product.addmm_(wide_left[part], gram, alpha=scale)
            if needs_right:
                d_right.addmm_(scaled_left[part].mT, block, alpha=scale)
            if needs_weight:
                d_weight[part] = c[part] * torch.addmm(block, wide_left[part], wide_right, alpha=scale)
        if needs_right:
            d_right.addmm_(scaled_left.mT @ wide_left, wide_right, alpha=scale * scale)
        return d_weight, _rounded(d_left, needs_left, left), _rounded(d_right, needs_right, right)

    with below_autocast():
        return with_less_memory(compute)


def _rounded(gradient: torch.Tensor, needed: bool, operand: torch.Tensor) -> torch.Tensor:
    if not needed or gradient.dtype == operand.dtype:
        return gradient
    return gradient_buffer(True, operand).copy_(gradient)
