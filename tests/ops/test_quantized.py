"""Dequantising by rows is bit for bit what the libraries do; the norm of a quantised weight against fp64, and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

import dorafx.ops  # noqa: F401
from dorafx.bench.allocations import allocations
from dorafx.ops import reference
from dorafx.ops.quantized import (
    TABLES,
    Packed,
    dequantize,
    dequantize_rows,
    dequantize_unrolled,
    row_norm_quantized_unrolled,
)

row_norm_quantized = torch.ops.dorafx.row_norm_quantized


def four_bit(weight: torch.Tensor, kind: str, group: int, double: bool = False) -> tuple[Packed, torch.Tensor]:
    functional = pytest.importorskip("bitsandbytes").functional
    codes, state = functional.quantize_4bit(weight, blocksize=group, quant_type=kind, compress_statistics=double)
    scales = state.absmax
    if double:
        scales = functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    packed = Packed(codes, scales, None, kind, tuple(weight.shape), group, weight.dtype)
    return packed, functional.dequantize_4bit(codes, state)


def hqq(weight: torch.Tensor, bits: int, axis: int, group: int = 32) -> tuple[Packed, torch.Tensor]:
    quantizer = pytest.importorskip("hqq.core.quantize").Quantizer
    codes, meta = quantizer.quantize(
        weight, nbits=bits, axis=axis, group_size=group, device="cpu", compute_dtype=weight.dtype, optimize=False
    )
    meta["compute_dtype"] = weight.dtype
    meta = {k: v.to(weight.dtype) if k in ("scale", "zero") else v for k, v in meta.items()}
    packed = Packed(codes, meta["scale"], meta["zero"], f"hqq{bits}", tuple(weight.shape), group, weight.dtype)
    return packed, quantizer.dequantize(codes, meta)


def affine(weight: torch.Tensor, group: int | None) -> tuple[Packed, torch.Tensor]:
    torchao = pytest.importorskip("torchao.quantization")
    from torchao.quantization.granularity import PerGroup

    intx = torchao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(group)) if group else None
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data.copy_(weight)
    torchao.quantize_(linear, intx or torchao.Int8WeightOnlyConfig())
    made: Any = linear.weight
    packed = Packed(
        made.qdata, made.scale, made.zero_point, "affine", tuple(weight.shape), group or weight.shape[1], weight.dtype
    )
    return packed, made.dequantize()


def bnb8(weight: torch.Tensor) -> tuple[Packed, torch.Tensor]:
    functional = pytest.importorskip("bitsandbytes").functional
    codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
    packed = Packed(codes, scales, None, "bnb8", tuple(weight.shape), weight.shape[1], torch.float32)
    return packed, functional.int8_vectorwise_dequant(codes, scales)


CASES = {
    "nf4": lambda w: four_bit(w, "nf4", 64),
    "nf4 double": lambda w: four_bit(w, "nf4", 64, True),
    "fp4": lambda w: four_bit(w, "fp4", 128),
    "bnb8": bnb8,
    "torchao int8": lambda w: affine(w, None),
    "torchao intx": lambda w: affine(w, 32),
    **{f"hqq{bits} axis {axis}": lambda w, b=bits, a=axis: hqq(w, b, a) for bits in (8, 4, 2, 1) for axis in (0, 1)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_rows_are_bit_for_bit_the_librarys(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    packed, wanted = CASES[case](torch.randn(96, 128, dtype=dtype))
    packed.check()
    assert packed.dtype == wanted.dtype
    for first, last in ((0, 96), (0, 1), (7, 50), (95, 96), (40, 40)):
        assert torch.equal(dequantize_rows(packed, first, last), wanted[first:last])
    assert torch.equal(dequantize(packed), wanted)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("shape", [(5, 123), (33, 7), (1, 1), (64, 96), (3, 4096)])
def test_four_bit_weights_of_any_shape(shape: tuple[int, int], kind: str) -> None:
    """Rows that begin within a byte or within a group."""
    torch.manual_seed(0)
    packed, _ = four_bit(torch.randn(shape), kind, 64)
    flat = packed.packed.reshape(-1)
    codes = torch.stack([flat >> 4, flat & 15], 1).reshape(-1).int()
    scales = packed.scales.repeat_interleave(64)
    # Not the library's own: its kernel for CPUs mixes groups up where they do not divide a row.
    wanted = (torch.tensor(TABLES[kind])[codes][: shape[0] * shape[1]] * scales[: shape[0] * shape[1]]).view(shape)
    for first in range(min(shape[0], 4)):
        for last in (first + 1, shape[0]):
            assert torch.equal(dequantize_rows(packed, first, last), wanted[first:last])


@pytest.mark.parametrize("kind", TABLES)
def test_the_layout_for_inference_on_a_cpu(kind: str) -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    torch.manual_seed(0)
    codes, state = functional.quantize_4bit(torch.randn(96, 128), blocksize=32, quant_type=kind)
    before = Packed(codes, state.absmax.bfloat16().float(), None, kind, (96, 128), 32, torch.bfloat16)
    packed, state = functional._convert_weight_packed_for_cpu(codes, state)
    after = Packed(packed, state.absmax, None, f"{kind}-cpu", (96, 128), 32, state.dtype)
    after.check()
    for first, last in ((0, 96), (3, 50), (64, 65)):
        assert torch.equal(dequantize_rows(after, first, last), dequantize_rows(before, first, last))


def norm_of(w: Packed, left: torch.Tensor, right: torch.Tensor, scale: float) -> torch.Tensor:
    return row_norm_quantized(
        w.packed, w.scales, w.zeros, left, right, scale, w.format, list(w.shape), w.group, w.dtype
    )


@pytest.mark.parametrize("factors", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_norm_against_fp64(case: str, factors: torch.dtype) -> None:
    torch.manual_seed(0)
    packed, dense = CASES[case](torch.randn(96, 128, dtype=torch.bfloat16))
    left, right = torch.randn(96, 5).to(factors), torch.randn(5, 128).to(factors)
    exact = reference.row_norm(dense.double(), left.double(), right.double(), 0.3)
    got = norm_of(packed, left, right, 0.3)
    assert got.dtype == (torch.float64 if factors == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), exact, rtol=1e-12 if factors == torch.float64 else 1e-6, atol=0)
    # What stock does in the dtype of the activations: form the sum, in bf16.
    stock = torch.linalg.norm(dense.bfloat16() + 0.3 * (left @ right).bfloat16(), dim=1)
    assert (got - exact).abs().mean() <= 1.05 * (stock - exact).abs().mean()


@pytest.mark.parametrize("case", ["nf4", "fp4", "bnb8", "torchao int8", "torchao intx", "hqq4 axis 0", "hqq4 axis 1"])
@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_neither_the_weight_nor_the_delta_exists(case: str, factors: torch.dtype) -> None:
    torch.manual_seed(0)
    packed, dense = CASES[case](torch.randn(1024, 512, dtype=torch.bfloat16))
    left, right = torch.randn(1024, 64).to(factors), torch.randn(64, 512).to(factors)
    norm_of(packed, left, right, 0.3)  # tables are made once
    found = allocations(lambda: norm_of(packed, left, right, 0.3), "cpu")
    size = dense.numel() * dense.element_size()
    assert found.largest < size / 8
    assert found.peak < size / 2


@pytest.mark.parametrize("case", CASES)
def test_unrolled_for_portable_graphs(case: str) -> None:
    """A traced graph of aten calls alone, of blocks of rows that are dequantised one by one."""
    torch.manual_seed(0)
    w, dense = CASES[case](torch.randn(512, 128, dtype=torch.bfloat16))
    left, right = torch.randn(512, 5), torch.randn(5, 128)

    def program(packed: Any, scales: Any, zeros: Any, left: Any, right: Any) -> torch.Tensor:
        return row_norm_quantized_unrolled(packed, scales, zeros, left, right, 0.3, w.format, w.shape, w.group, w.dtype)

    operands = (w.packed, w.scales, w.zeros, left, right)
    traced = make_fx(program, tracing_mode="fake")(*operands)
    assert all(str(n.target).startswith("aten.") for n in traced.graph.nodes if n.op not in ("placeholder", "output"))
    exact = reference.row_norm(dense.double(), left.double(), right.double(), 0.3)
    torch.testing.assert_close(traced(*operands).double(), exact, rtol=1e-6, atol=0)
    found = allocations(lambda: row_norm_quantized_unrolled(*operands, 0.3, w.format, w.shape, w.group, w.dtype), "cpu")
    assert found.largest < dense.nbytes / 8
    whole = make_fx(lambda *t: dequantize_unrolled(*t, w.format, w.shape, w.group, w.dtype), tracing_mode="fake")
    assert torch.equal(whole(*operands[:3])(*operands[:3]), dense)


def test_bad_operands() -> None:
    packed, _ = four_bit(torch.randn(64, 64), "nf4", 64)
    left, right = torch.randn(64, 3), torch.randn(3, 64)

    def call(**changed: Any) -> torch.Tensor:
        w = Packed(**{**vars(packed), **changed})
        return norm_of(w, left, right, 1.0)

    with pytest.raises(ValueError, match=r"unknown format 'nf5'.*allowed are nf4, fp4"):
        call(format="nf5")
    with pytest.raises(ValueError, match="has 64 scales; got 32"):
        call(scales=packed.scales[:32])
    with pytest.raises(ValueError, match="bytes of codes"):
        call(shape=(64, 66))
    with pytest.raises(TypeError, match=r"not to torch\.float64"):
        call(dtype=torch.float64)
    with pytest.raises(ValueError, match="do not divide"):
        call(format="hqq4", group=63)
    with pytest.raises(ValueError, match="shapes must agree"):
        norm_of(packed, left[:5], right, 1.0)
