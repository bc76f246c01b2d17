"""The kernels in Triton's interpreter, against fp64. Run by test_triton_interpreter.py in a process of its own, since
the interpreter is switched on for a whole process, before Triton is imported."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dorafx.bench import tune
from dorafx.bench.clock import Clock
from dorafx.ops import reference
from dorafx.ops.quantized import Packed, dequantize_rows
from dorafx.ops.triton import configs, quantized
from dorafx.ops.triton.row_norm import launch, launch_group

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(d_out: int, d_in: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, left, right = (torch.randn(s, generator=generator) for s in ((d_out, d_in), (d_out, rank), (rank, d_in)))
    return weight, left, right


def check(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float, parts: int | None = None
) -> None:
    exact = reference.row_norm(weight.double(), left.double(), right.double(), scale)
    got = launch(weight, left, right, scale, parts)
    assert got.dtype == torch.float32
    # fp32 sums of d_in squares, of products of r terms.
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 33, 64, 65, 150])
def test_every_configuration(rank: int, dtype: torch.dtype) -> None:
    weight, left, right = (t.to(dtype) for t in operands(70, 150, rank))
    check(weight, left, right, 0.3)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_divided_along_d_in(parts: int) -> None:
    check(*operands(65, 700, 5), 0.5, parts)


def test_division_does_not_change_between_runs() -> None:
    weight, left, right = operands(65, 700, 5)
    first = launch(weight, left, right, 0.5, 5)
    assert all(torch.equal(first, launch(weight, left, right, 0.5, 5)) for _ in range(3))


@settings(max_examples=25, deadline=None)
@given(
    d_out=st.integers(1, 90),
    d_in=st.integers(1, 200),
    rank=st.integers(1, 40),
    scale=st.floats(-3, 3, allow_nan=False, width=32),
    weight_dtype=st.sampled_from(DTYPES),
    factor_dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    strided=st.booleans(),
    seed=st.integers(0, 3),
)
def test_any_shape_stride_and_dtype_mix(
    d_out: int,
    d_in: int,
    rank: int,
    scale: float,
    weight_dtype: torch.dtype,
    factor_dtype: torch.dtype,
    transposed: bool,
    strided: bool,
    seed: int,
) -> None:
    weight, left, right = operands(d_out, d_in, rank, seed)
    weight, left, right = weight.to(weight_dtype), left.to(factor_dtype), right.to(factor_dtype)
    if transposed:
        weight, right = weight.t().contiguous().t(), right.t().contiguous().t()
    if strided:
        weight = torch.stack([weight, weight], 2)[:, :, 0]
        left = torch.cat([left, left], 1)[:, :rank]
    check(weight, left, right, scale)


def test_zero_rows_nan_and_infinity() -> None:
    weight, left, right = operands(6, 100, 3)
    weight[0], left[0] = 0.0, 0.0
    weight[1, 5], weight[2, 7] = math.nan, math.inf
    got = launch(weight, left, right, 1.0)
    assert got[0] == 0
    assert math.isnan(got[1])
    assert got[2] == math.inf
    assert torch.isfinite(got[3:]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "parts"), [(5, 1), (65, 3)])
def test_one_launch_for_a_group_is_bit_for_bit_that_of_each(rank: int, parts: int, dtype: torch.dtype) -> None:
    group = [tuple(t.to(dtype) for t in operands(70, 300, rank, seed)) for seed in range(3)]
    # Several norms may share a weight.
    group.append((group[0][0], *group[1][1:]))
    found = launch_group(group, 0.5, parts)  # type: ignore[arg-type]
    assert len(found) == 4
    for norm, tensors in zip(found, group):
        assert torch.equal(norm, launch(*tensors, 0.5, parts))
        exact = reference.row_norm(*(t.double() for t in tensors), 0.5)
        torch.testing.assert_close(norm.double(), exact, rtol=2e-5, atol=1e-6)


def test_a_group_of_operands_that_are_not_aligned() -> None:
    group = []
    for seed in range(2):
        weight, left, right = operands(33, 70, 4, seed)
        storage = torch.empty(weight.numel() + 1)
        shifted = storage[1:].view_as(weight).copy_(weight)
        assert shifted.data_ptr() % 16
        group.append((shifted, left, right))
    for norm, (weight, left, right) in zip(launch_group(group, 1.0), group):
        exact = reference.row_norm(weight.double(), left.double(), right.double(), 1.0)
        torch.testing.assert_close(norm.double(), exact, rtol=2e-5, atol=1e-6)


QUANTIZED = {
    "nf4": (torch.uint8, 2, 64),
    "fp4": (torch.uint8, 2, 32),
    "bnb8": (torch.int8, 1, None),
    "affine": (torch.int8, 1, 32),
}


def packed(format: str, d_out: int, d_in: int, dtype: torch.dtype, zeros: bool) -> Packed:
    kind, per, group = QUANTIZED[format]
    generator = torch.Generator().manual_seed(1)
    low, high = (0, 256) if kind == torch.uint8 else (-128, 128)
    codes = torch.randint(low, high, (d_out, d_in // per), generator=generator).to(kind)
    group = group or d_in
    scales = torch.rand(d_out, d_in // group, generator=generator) + 0.5
    if format == "affine":
        scales = (scales / 16).to(dtype)
    points = torch.randint(-8, 8, (d_out, d_in // group), generator=generator).to(torch.int8) if zeros else None
    return Packed(codes, scales, points, format, (d_out, d_in), group, torch.float32 if format == "bnb8" else dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rank", "parts"), [(5, 1), (33, 3)])
@pytest.mark.parametrize("format", QUANTIZED)
def test_quantized_weights(format: str, rank: int, parts: int, dtype: torch.dtype) -> None:
    """Codes are dequantised in registers as the libraries do it; rows, columns and ranks that fill no block."""
    d_out, d_in = 70, 192
    weight = packed(format, d_out, d_in, dtype, zeros=format == "affine" and parts == 1)
    _, left, right = (t.to(dtype) for t in operands(d_out, d_in, rank))
    assert quantized.serves(weight)
    # The interpreter has no rounding to bf16, so that there the exact values are those in fp32.
    exact_dtype = torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype
    dense = dequantize_rows(dataclasses.replace(weight, dtype=exact_dtype), 0, d_out).double()
    exact = reference.row_norm(dense, left.double(), right.double(), 0.3)
    got = quantized.launch(weight, left, right, 0.3, parts)
    torch.testing.assert_close(got.double(), exact, rtol=2e-5, atol=1e-6)


def test_what_quantized_weights_the_kernel_leaves_to_blocks() -> None:
    weight = packed("nf4", 6, 128, torch.float32, False)
    assert quantized.serves(weight)
    assert not quantized.serves(dataclasses.replace(weight, group=96))
    assert not quantized.serves(dataclasses.replace(weight, format="hqq4"))
    assert not quantized.serves(dataclasses.replace(weight, scales=weight.scales.t().contiguous().t()))


def test_configurations_are_those_that_were_run() -> None:
    """Ranks above reach every configuration of fp32 operands, which is what the interpreter multiplies."""
    assert {configs.row_norm_config(4, r).max_rank for r in (1, 16, 33, 64, 65, 150)} | {32} == {
        c.max_rank for c in configs.ROW_NORM if c.factor_bytes == 4
    }


def test_tuning_times_what_is_right_and_refuses_what_is_not() -> None:
    """The timer of ``dorafx bench --tune``, on interpreted kernels."""
    problem = tune.Problem(70, 150, 16, 4)
    clock = Clock("cpu", seconds=0.0, least=1, most=1)
    other = configs.RowNormConfig(4, 16, 32, 64, 16, 4, 2)
    assert tune.time_on(clock, other, problem) > 0
    too_shallow = configs.RowNormConfig(4, 8, 32, 64, 8, 4, 2)
    with pytest.raises(ArithmeticError, match="relative error"):
        tune.time_on(clock, too_shallow, problem)
