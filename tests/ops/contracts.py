"""What every operator is called with: a row an operator, over layouts, sizes and dtypes."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import torch

Layout = Callable[[torch.Tensor], torch.Tensor]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# Leading dimensions of activations, d_out, d_in, rank.
Size = tuple[tuple[int, ...], int, int, int]
SIZES: tuple[Size, ...] = (
    ((2, 3), 5, 4, 3),
    ((1,), 5, 4, 1),
    ((), 5, 4, 2),
    ((0,), 5, 4, 2),
    ((3,), 1, 4, 2),
    ((3, 1), 5, 1, 2),
    ((3,), 0, 4, 2),
    ((2,), 5, 0, 3),
    ((2, 1, 3), 5, 4, 0),
    ((1,), 1, 1, 1),
)


def _reversed(t: torch.Tensor) -> torch.Tensor:
    order = tuple(reversed(range(t.dim())))
    return t.permute(order).contiguous().permute(order)


def _first_expanded(t: torch.Tensor) -> torch.Tensor:
    return t[:1].expand(t.shape) if t.dim() and t.shape[0] else t


def _with_offset(t: torch.Tensor) -> torch.Tensor:
    return torch.cat([t.new_zeros(3), t.reshape(-1)])[3:].view(t.shape)


def _odd(t: torch.Tensor) -> torch.Tensor:
    """Strides of dimensions of size 1 are anything."""
    strides = [77 if n == 1 else s for n, s in zip(t.shape, t.contiguous().stride())]
    return t.contiguous().as_strided(t.shape, strides)


LAYOUTS: dict[str, Layout] = {
    "contiguous": lambda t: t,
    "transposed": _reversed,
    "channels last": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1) if t.dim() > 2 else _reversed(t),
    "with gaps": lambda t: torch.stack([t, t], -1)[..., 0],
    "columns of more": lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]] if t.dim() else t,
    "transposed rows of more": lambda t: (
        torch.cat([t, t]).transpose(0, -1).contiguous().transpose(0, -1)[: t.shape[0]] if t.dim() else t
    ),
    "expanded": _first_expanded,
    "one element": lambda t: t.reshape(-1)[:1].reshape([1] * t.dim()).expand(t.shape) if t.numel() else t,
    "with an offset": _with_offset,
    "odd": _odd,
}


def mixed(seed: int) -> Layout:
    """A layout for each tensor that it is given, by chance."""
    chance = random.Random(seed)
    return lambda t: LAYOUTS[chance.choice(list(LAYOUTS))](t)


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def _norm(lay: Layout, dtype: torch.dtype, size: Size) -> tuple[torch.Tensor, ...]:
    _, d_out, d_in, rank = size
    shapes = ((d_out, d_in), (d_out, rank), (rank, d_in))
    return tuple(lay(draw(*s, dtype=dtype)) for s in shapes)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def row_norm(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    weight, left, right = _norm(lay, dtype, size)
    for algorithm in ("auto", "tiled", "factored"):
        yield weight, left, right, 0.7, algorithm
    yield weight.to(torch.bfloat16), left, right.float(), 0.7, "auto"


def row_norms(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    lists = [
        list(tensors) for tensors in zip(_norm(lay, dtype, size), _norm(lay, dtype, size), _norm(lay, dtype, size))
    ]
    yield *lists, [0.7, 0.7, 1.0], "auto", []
    squares = [torch.ones(size[1], dtype=_wide(dtype)), None, None]
    yield *lists, [0.7, 0.7, 1.0], "factored", squares
    yield [], [], [], [], "auto", []


def row_norm_backward(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    operands = _norm(lay, dtype, size)
    norm = torch.linalg.vector_norm(operands[0].to(_wide(dtype)), dim=1)
    grad = lay(draw(size[1], dtype=_wide(dtype)))
    for needs in range(8):
        yield grad, *operands, lay(norm), 0.7, bool(needs & 1), bool(needs & 2), bool(needs & 4)
    yield grad, operands[0].to(torch.float16), operands[1], operands[2].float(), norm, 0.7, True, True, True


def _batch(lay: Layout, dtype: torch.dtype, size: Size) -> tuple[torch.Tensor, ...]:
    lead, d_out, d_in, rank = size
    shapes = ((d_out, d_in), (d_out, rank), (rank, d_in))
    return tuple(lay(draw(len(lead), *s, dtype=dtype)) for s in shapes)


def row_norm_batched(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    weight, left, right = _batch(lay, dtype, size)
    for algorithm in ("auto", "tiled", "factored"):
        yield weight, left, right, 0.7, algorithm
    yield weight.to(torch.bfloat16), left, right.float(), 0.7, "auto"
    # Many small ones, several of which fit into a buffer.
    yield *(t[:1].expand(20, -1, -1) for t in _batch(lay, dtype, ((1,), *size[1:]))), 0.7, "auto"


def row_norm_batched_backward(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    operands = _batch(lay, dtype, size)
    norm = torch.linalg.vector_norm(operands[0].to(_wide(dtype)), dim=2)
    grad = lay(draw(len(size[0]), size[1], dtype=_wide(dtype)))
    for needs in range(8):
        yield grad, *operands, lay(norm), 0.7, bool(needs & 1), bool(needs & 2), bool(needs & 4)
    yield grad, operands[0].to(torch.float16), operands[1], operands[2].float(), norm, 0.7, True, True, True


def _weights(lay: Layout, size: Size) -> Iterator[tuple[Any, ...]]:
    """Quantised weights: the first three arguments, and the last four."""
    _, d_out, d_in, _ = size
    codes = torch.randint(0, 256, (d_out * d_in,), dtype=torch.uint8)
    signed = codes.view(torch.int8).reshape(d_out, d_in)
    vector = torch.rand(d_out)
    for dtype in (torch.float32, torch.bfloat16):
        n = d_out * d_in
        nf4 = codes[: -(-n // 2)].reshape(-1, 1)
        yield lay(nf4), lay(torch.rand(-(-n // 4))), None, "nf4", [d_out, d_in], 4, dtype
        yield lay(signed), lay(vector), None, "bnb8", [d_out, d_in], 1, dtype
        grouped = torch.rand(d_out, d_in, dtype=torch.float64).to(dtype)
        yield lay(signed), lay(grouped), lay(signed), "affine", [d_out, d_in], 1, dtype
        yield lay(signed), lay(grouped), None, "affine", [d_out, d_in], 1, dtype
        column = grouped.reshape(-1, 1)
        yield lay(codes.reshape(d_out, d_in)), lay(column), lay(column), "hqq8", [d_out, d_in], 1, dtype
        if n % 2 == 0:
            half = codes[: n // 2].reshape(2, -1) if n % 4 == 0 else codes[: n // 2]
            yield lay(half), lay(column), lay(column), "hqq4", [d_out, d_in], 1, dtype
        # By 32 rows.
        rows, width = 32 * (d_out > 0), 4 * (d_in > 0)
        bytes_ = torch.randint(0, 256, (rows, width // 2), dtype=torch.uint8)
        of_groups = torch.rand(width // 4, rows).bfloat16()
        yield lay(bytes_), lay(of_groups), None, "nf4-cpu", [rows, width], 4, dtype


def dequantize(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    yield from _weights(lay, size)


def row_norm_quantized(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    for packed, scales, zeros, *layout in _weights(lay, size):
        (d_out, d_in), rank = layout[1], size[3]
        left, right = lay(draw(d_out, rank, dtype=dtype)), lay(draw(rank, d_in, dtype=dtype))
        yield packed, scales, zeros, left, right, 0.7, *layout


def _vectors(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """``g`` and a bias: of all channels, of one that is broadcast, scalars, and of other dimensions."""
    lead, d = size[:2]
    for shape in ((d,), (1,), (), (1,) * (len(lead) + 1)):
        yield lay(draw(*shape, dtype=_wide(dtype))), lay(draw(d, dtype=dtype))
        yield lay(draw(d, dtype=dtype)), lay(draw(*shape, dtype=dtype))
    yield lay(draw(d, dtype=dtype)), None
    if lead:
        yield lay(draw(lead[-1], 1, dtype=dtype)), lay(draw(lead[-1], 1, dtype=dtype))


def _activations(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    lead, d = size[:2]
    shape = (*lead, d)
    yield lay(draw(*shape, dtype=dtype)), lay(draw(*shape, dtype=dtype))
    yield lay(draw(*shape, dtype=dtype)), lay(draw(*shape[1:], dtype=torch.float32))
    yield lay(draw(*shape[-1:], dtype=dtype)), lay(draw(*shape, dtype=dtype))


def compose(lay: Layout, dtype: torch.dtype, size: Size, kernels: bool = True) -> Iterator[tuple[Any, ...]]:
    vectors = list(_vectors(lay, dtype, size))
    for i, (base, lora) in enumerate(_activations(lay, dtype, size)):
        for g, bias in vectors if i == 0 else vectors[:1]:
            for kernel in ("auto", "triton") if kernels else (None,):
                yield base, lora, g, bias, 0.7, dtype, *([kernel] if kernel else [])
    kernel_argument = ["triton"] if kernels else []
    yield base, None, vectors[0][0], None, 0.7, dtype, *kernel_argument
    yield base, lora, *vectors[0], 0.7, torch.float32, *kernel_argument


def compose_delta(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    for base, lora, g, _, *rest in compose(lay, dtype, size):
        if lora is not None:
            yield lay(draw(*size[0], size[1], dtype=dtype)), base, lora, g, *rest


def compose_(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    for base, lora, g, bias, scale, _ in compose(lay, dtype, size, kernels=False):
        if base.shape != (*size[0], size[1]):
            continue
        # What is overwritten is dense, or has gaps.
        yield torch.empty_like(base).copy_(base), lora, g, bias, scale
        yield LAYOUTS["with gaps"](base), None, g, None, scale


def compose_delta_(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    for base, lora, g, _, scale, _ in compose(lay, dtype, size, kernels=False):
        if lora is not None:
            yield LAYOUTS["transposed"](draw(*size[0], size[1], dtype=dtype)), base, lora, g, scale


def compose_forward(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    for base, lora, g, bias, scale, out_dtype in compose(lay, dtype, size, kernels=False):
        for kept in (None, dtype, torch.float32):
            yield None, base, lora, g, bias, scale, out_dtype, kept
            if lora is not None:
                yield lay(draw(*size[0], size[1], dtype=dtype)), base, lora, g, None, scale, out_dtype, kept


def compose_backward(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    shape = (*size[0], size[1])
    grad, total = lay(draw(*shape, dtype=dtype)), lay(draw(*shape, dtype=dtype))
    for g, bias in _vectors(lay, dtype, size):
        of_bias = None if bias is None else bias.dtype
        bias_shape = [] if bias is None else [list(bias.shape)]
        for delta in (False, True):
            yield grad, g, total, 0.7, delta, dtype, dtype, True, of_bias, *bias_shape
        yield grad, g, None, 0.7, False, torch.float32, None, False, of_bias, *bias_shape
    vector = lay(draw(size[1], dtype=dtype))
    yield grad, vector, lay(draw(size[1], dtype=dtype)), 0.7, False, dtype, dtype, True, dtype
    yield grad, vector, None, 0.7, False, None, None, False, None


def dora_linear_forward(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    for *operands, out_dtype in dora_linear(lay, dtype, size):
        for kept in (None, dtype, torch.float32):
            yield *operands, out_dtype, kept


def dora_linear(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    lead, d_out, d_in, rank = size
    x, h = lay(draw(*lead, d_in, dtype=dtype)), lay(draw(*lead, rank, dtype=dtype))
    weight, left = lay(draw(d_out, d_in, dtype=dtype)), lay(draw(d_out, rank, dtype=dtype))
    g, bias = lay(draw(d_out, dtype=_wide(dtype))), lay(draw(d_out, dtype=dtype))
    yield x, weight, h, left, g, bias, 0.7, dtype
    yield x, weight, h, left, g, None, 0.7, torch.float32


def cast_linear(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    lead, d_out, d_in, _ = size
    x = lay(draw(*lead, d_in, dtype=dtype))
    for stored in {dtype, torch.bfloat16}:
        yield x, lay(draw(d_out, d_in, dtype=stored))


def cast_linear_backward(lay: Layout, dtype: torch.dtype, size: Size) -> Iterator[tuple[Any, ...]]:
    lead, d_out, d_in, _ = size
    grad = lay(draw(*lead, d_out, dtype=dtype))
    for stored in {dtype, torch.bfloat16}:
        yield grad, lay(draw(d_out, d_in, dtype=stored))


ROWS: dict[str, Callable[[Layout, torch.dtype, Size], Iterator[tuple[Any, ...]]]] = {
    "cast_linear": cast_linear,
    "cast_linear_backward": cast_linear_backward,
    "compose": compose,
    "compose_": compose_,
    "compose_backward": compose_backward,
    "compose_delta": compose_delta,
    "compose_delta_": compose_delta_,
    "compose_forward": compose_forward,
    "dequantize": dequantize,
    "dora_linear": dora_linear,
    "dora_linear_forward": dora_linear_forward,
    "row_norm": row_norm,
    "row_norm_backward": row_norm_backward,
    "row_norm_batched": row_norm_batched,
    "row_norm_batched_backward": row_norm_batched_backward,
    "row_norm_quantized": row_norm_quantized,
    "row_norms": row_norms,
}


def registered() -> set[str]:
    """Operators of the namespace, whoever registered them."""
    names = {schema.name for schema in torch._C._jit_get_all_schemas()}
    return {name.removeprefix("dorafx::") for name in names if name.startswith("dorafx::")}
