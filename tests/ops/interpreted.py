"""The kernels in Triton's interpreter, against fp64. Run by test_triton_interpreter.py in a process of its own, since
the interpreter is switched on for a whole process, before Triton is imported."""

from __future__ import annotations

import dataclasses
import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dorafx.bench import tune
from dorafx.bench.clock import Clock
from dorafx.ops import dispatch, reference
from dorafx.ops.quantized import Packed, dequantize_rows
from dorafx.ops.triton import configs, quantized, row_norm
from dorafx.ops.triton.row_norm import GROUP, launch, launch_group

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def operands(d_out: int, d_in: int, rank: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight, left, right = (torch.randn(s, generator=generator) for s in ((d_out, d_in), (d_out, rank), (rank, d_in)))
    return weight, left, right


def check(
    weight: torch.Tensor,
    left: torch.Tensor,
    right: torch.Tensor,
    scale: float,
    parts: int | None = None,
    config: configs.RowNormConfig | None = None,
) -> None:
    got = launch(weight, left, right, scale, parts, config)
    assert got.dtype == torch.float32
    close(got, weight, left, right, scale)


def close(got: torch.Tensor, weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, scale: float) -> None:
    """To 1e-6 of the norm, or where W and the product cancel each other, of what cancels."""
    weight, left, right = weight.double(), left.double(), right.double()
    exact = reference.row_norm(weight, left, right, scale)
    terms = reference.row_norm(weight.abs(), left.abs(), right.abs(), abs(scale))
    assert got.shape == exact.shape
    assert ((got.double() - exact).abs() <= 1e-6 * torch.maximum(exact, terms / 8)).all()


SHIPPED = list(dict.fromkeys(config for table in configs.TABLES.values() for config in table))


def of_rows(config: configs.RowNormConfig) -> str:
    return f"{8 * config.factor_bytes}bit-rank{config.max_rank}-{config.rows}x{config.columns}-{config.num_stages}"


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("config", SHIPPED, ids=of_rows)
def test_every_configuration(config: configs.RowNormConfig, parts: int) -> None:
    """A rank that fills no chunk, blocks of rows that are not full, a last tile that is not, and a part with one tile."""
    dtype = torch.bfloat16 if config.factor_bytes == 2 else torch.float32
    rank = min(config.max_rank or 100, 3 * config.depth) - 5
    weight, left, right = operands(config.rows + 5, 2 * config.columns + 7, rank)
    check(weight, left.to(dtype), right.to(dtype), 0.3, parts, config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 16, 33, 65, 150, 520])
def test_every_rank_and_dtype(rank: int, dtype: torch.dtype) -> None:
    weight, left, right = (t.to(dtype) for t in operands(70, 150, rank))
    check(weight, left, right, 0.3)


@pytest.mark.parametrize("rank", [5, 200])
def test_operands_in_a_narrower_dtype(rank: int) -> None:
    """What is multiplied are the factors in bf16. Up to some rank the kernel rounds them, which the interpreter does not do."""
    weight, left, right = operands(70, 150, rank)
    got = launch(weight, left, right, 0.3, operand=torch.bfloat16)
    if rank > configs.WIDEST_CONVERTED_RANK:
        left, right = left.bfloat16(), right.bfloat16()
    close(got, weight, left, right, 0.3)


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_divided_along_d_in(parts: int) -> None:
    check(*operands(65, 700, 5), 0.5, parts)


def test_division_does_not_change_between_runs() -> None:
    weight, left, right = operands(65, 700, 5)
    first = launch(weight, left, right, 0.5, 5)
    assert all(torch.equal(first, launch(weight, left, right, 0.5, 5)) for _ in range(3))


EXAMPLES = int(os.environ.get("DORAFX_TEST_EXAMPLES", "25"))


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    config=st.sampled_from([None, *SHIPPED]),
    d_out=st.integers(1, 150),
    d_in=st.integers(1, 300),
    rank=st.integers(1, 600),
    scale=st.floats(-3, 3, allow_nan=False, width=32),
    weight_dtype=st.sampled_from(DTYPES),
    factor_dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    strided=st.sampled_from(["", "weight", "left", "right", "factors"]),
    parts=st.sampled_from([None, 1, 2, 5]),
    seed=st.integers(0, 3),
)
def test_any_shape_stride_and_dtype_mix(
    config: configs.RowNormConfig | None,
    d_out: int,
    d_in: int,
    rank: int,
    scale: float,
    weight_dtype: torch.dtype,
    factor_dtype: torch.dtype,
    transposed: bool,
    strided: str,
    parts: int | None,
    seed: int,
) -> None:
    if config is not None and config.max_rank is not None:
        rank = min(rank, config.max_rank)
    weight, left, right = operands(d_out, d_in, rank, seed)
    weight, left, right = weight.to(weight_dtype), left.to(factor_dtype), right.to(factor_dtype)
    if transposed:
        weight, right = weight.t().contiguous().t(), right.t().contiguous().t()
    if strided == "weight":
        weight = torch.stack([weight, weight], 2)[:, :, 0]
    if strided in ("left", "factors"):
        left = torch.stack([left, left], 2)[:, :, 0]
    if strided in ("right", "factors"):
        right = torch.cat([right, right], 1)[:, ::2] if d_in > 1 else right.expand(rank, 1)
    check(weight, left, right, scale, parts, config)


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
def test_a_group_is_bit_for_bit_what_each_is(rank: int, parts: int, dtype: torch.dtype) -> None:
    """More norms than a launch has place for."""
    group = [tuple(t.to(dtype) for t in operands(33, 150, rank, seed)) for seed in range(GROUP)]
    # Several norms may share a weight.
    group.append((group[0][0], *group[1][1:]))
    found = launch_group(group, 0.5, parts)  # type: ignore[arg-type]
    assert len(found) == GROUP + 1
    for norm, tensors in zip(found, group):
        assert torch.equal(norm, launch(*tensors, 0.5, parts))
        close(norm, *tensors, 0.5)


def test_a_group_of_operands_that_are_not_aligned() -> None:
    group = []
    for seed in range(2):
        weight, left, right = operands(33, 70, 4, seed)
        storage = torch.empty(weight.numel() + 1)
        shifted = storage[1:].view_as(weight).copy_(weight)
        assert shifted.data_ptr() % 16
        group.append((shifted, left, right))
    for norm, tensors in zip(launch_group(group, 1.0), group):
        close(norm, *tensors, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_batch_of_weights(transposed: bool, dtype: torch.dtype) -> None:
    """More experts than a launch has place for; as the matrices lie in memory, and transposed."""
    seeds = range(GROUP + 2)
    weight, left, right = (torch.stack(ts).to(dtype) for ts in zip(*(operands(33, 70, 4, seed) for seed in seeds)))
    if transposed:
        weight, left, right = weight.mT, right.mT, left.mT
    found = dispatch.row_norm_batched(weight, left, right, 0.5)
    assert found.shape == weight.shape[:2] and found.is_contiguous()
    for norm, *tensors in zip(found, weight, left, right):
        close(norm, *tensors, 0.5)


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
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0.0)


def test_what_quantized_weights_the_kernel_leaves_to_blocks() -> None:
    weight = packed("nf4", 6, 128, torch.float32, False)
    assert quantized.serves(weight)
    assert not quantized.serves(dataclasses.replace(weight, group=96))
    assert not quantized.serves(dataclasses.replace(weight, format="hqq4"))
    assert not quantized.serves(dataclasses.replace(weight, scales=weight.scales.t().contiguous().t()))


def test_tuning_times_what_is_right_and_refuses_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer of ``dorafx bench --tune``, on interpreted kernels."""
    problem = tune.Problem(70, 150, 16, 4)
    clock = Clock("cpu", seconds=0.0, least=1, most=1)
    other = configs.RowNormConfig(4, 16, 32, 64, 16, 4, 2)
    assert tune.time_on(clock, other, problem) > 0
    monkeypatch.setattr(row_norm, "launch", lambda *args, **options: 1.01 * launch(*args, **options))
    with pytest.raises(ArithmeticError, match="relative error"):
        tune.time_on(clock, other, problem)
