"""The kernels of the composition and of the DoRA linear in Triton's interpreter, against fp64. Run by
test_triton_interpreter.py, as interpreted.py is."""

from __future__ import annotations

import math
import mmap
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from near_unity import check_near_unity
from triton.runtime import interpreter

import dorafx
from dorafx.ops import dispatch, reference
from dorafx.ops.triton import configs
from dorafx.ops.triton import linear as linear_kernel
from dorafx.ops.triton.compose import launch_backward, launch_forward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ops = torch.ops.dorafx


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send CPU tensors where CUDA's go."""
    monkeypatch.setattr(dispatch, "_DEVICES", ("cpu",))


@pytest.fixture(autouse=True)
def _bf16_rounds_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.9's interpreter cuts fp32 off to bf16, and its rounding mode of that name rounds half up. A device rounds to
    nearest even (test_triton_compile.py looks for the instruction), which is what PyTorch does."""
    convert = interpreter._convert_float

    def rounded(data: np.ndarray, source: tl.dtype, target: tl.dtype, mode: Any) -> np.ndarray:
        if (source, target) == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
            return values.view(torch.uint16).numpy()
        if (source, target) == (tl.bfloat16, tl.float32):  # which is right, and slow
            return torch.from_numpy(np.ascontiguousarray(data)).view(torch.bfloat16).float().numpy()
        return convert(data, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def close(actual: torch.Tensor, exact: torch.Tensor, terms: int = 1) -> None:
    """One rounding to the result's dtype, and fp32's own error of a sum of ``terms`` terms."""
    eps = torch.finfo(actual.dtype).eps
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs()
    slack = 4e-7 * math.sqrt(terms) * (1 + exact.abs().max().item())
    assert (error <= 0.51 * eps * exact.abs() + slack).all(), error.max().item()


def layouts(t: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same values, laid out in other ways."""
    spread = torch.empty(*t.shape[:-1], 2 * t.shape[-1] + 1, dtype=t.dtype)[..., 1::2]
    backwards = torch.empty(t.shape[::-1], dtype=t.dtype).permute(*reversed(range(t.dim())))
    channels = torch.empty(*t.shape[:-1][:1], t.shape[-1], *t.shape[1:-1], dtype=t.dtype).movedim(
        min(t.dim() - 1, 1), -1
    )
    return {
        "plain": t,
        **{k: v.copy_(t) for k, v in zip(("spread", "backwards", "channels"), (spread, backwards, channels))},
    }


@settings(max_examples=15, deadline=None)
@given(
    lead=st.lists(st.integers(1, 4), min_size=0, max_size=3),
    d=st.sampled_from([1, 2, 7, 33, 130]),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 4),
    layout=st.tuples(*[st.sampled_from(["plain", "spread", "backwards", "channels"])] * 3),
    form=st.sampled_from(["direct", "alone", "delta"]),
    bias=st.booleans(),
    scale=st.floats(-3, 3, allow_nan=False, width=32),
    parts=st.sampled_from([None, 1, 2, 3]),
)
@example([9], 1030, (torch.bfloat16,) * 4, ("plain",) * 3, "direct", True, 0.5, 2)
def test_any_shape_layout_and_dtype_mix(
    lead: list[int],
    d: int,
    dtypes: tuple[torch.dtype, ...],
    layout: tuple[str, ...],
    form: str,
    bias: bool,
    scale: float,
    parts: int | None,
) -> None:
    shape = (*lead, d)
    base, lora, result = (layouts(draw(*shape, seed=i, dtype=dtypes[i]))[layout[i]] for i in range(3))
    g, b = draw(d, seed=3) * 0.3 + 1, draw(d, seed=4, dtype=dtypes[3]) if bias and form != "delta" else None
    low_rank, first = (None if form == "alone" else lora), (result if form == "delta" else None)
    y, total = torch.empty_like(base, dtype=dtypes[3]), torch.empty_like(base, dtype=torch.float32)
    launch_forward(first, base, low_rank, g, b, scale, y, total)
    wide = [None if t is None else t.double() for t in (first, base, low_rank, g, b)]
    exact_total = wide[1] if low_rank is None else wide[1] + scale * wide[2]
    exact = wide[0] + (wide[3] - 1) * wide[1] + wide[3] * scale * wide[2] if form == "delta" else exact_total * wide[3]
    close(y, exact if b is None else exact + wide[4])
    close(total, exact_total)
    upstream = layouts(draw(*shape, seed=5, dtype=dtypes[3]))[layout[2]]
    d_base, d_lora = torch.empty_like(upstream, dtype=dtypes[0]), torch.empty_like(upstream, dtype=dtypes[1])
    d_g, d_bias = torch.empty(d), torch.empty(d)
    launch_backward(upstream, g, total, scale, form == "delta", d_base, d_lora, d_g, d_bias, parts)
    dy = upstream.double()
    close(d_base, dy * (wide[3] - float(form == "delta")))
    close(d_lora, dy * wide[3] * scale)
    tokens = math.prod(lead)
    close(d_g, (dy * total.double()).reshape(-1, d).sum(0), 4 * tokens)
    close(d_bias, dy.reshape(-1, d).sum(0), 4 * tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["direct", "alone", "delta"])
def test_autograd_through_the_kernels(form: str, dtype: torch.dtype) -> None:
    """Every subset of operands that need gradients, through the operators that a graph calls."""
    base, lora, result = (draw(3, 5, 19, seed=i, dtype=dtype) for i in range(3))
    g, bias, upstream = draw(19, seed=3) * 0.2 + 1, draw(19, seed=4, dtype=dtype), draw(3, 5, 19, seed=5, dtype=dtype)
    operands = {"direct": (base, lora, g, bias), "alone": (base, g), "delta": (result, base, lora, g)}[form]

    def ours(*t: torch.Tensor) -> torch.Tensor:
        if form == "delta":
            return ops.compose_delta(*t, 1.7, dtype)
        return ops.compose(*(t if form == "direct" else (t[0], None, t[1], None)), 1.7, dtype)

    def exact(*t: torch.Tensor) -> torch.Tensor:
        if form == "delta":
            return reference.compose_delta(*t, 1.7)
        return reference.compose(*(t if form == "direct" else (t[0], None, t[1], None)), 1.7)

    close(ours(*operands), exact(*(t.double() for t in operands)))
    for chosen in range(1, 2 ** len(operands)):
        needed = [i for i in range(len(operands)) if chosen >> i & 1]
        leaves = [t.clone().requires_grad_(i in needed) for i, t in enumerate(operands)]
        wide = [t.detach().double().requires_grad_(i in needed) for i, t in enumerate(leaves)]
        found = torch.autograd.grad(ours(*leaves), [leaves[i] for i in needed], upstream)
        wanted = torch.autograd.grad(exact(*wide), [wide[i] for i in needed], upstream.double())
        for i, got, want in zip(needed, found, wanted):
            assert got.dtype == operands[i].dtype
            # The kept sum has the activations' own dtype, which is what the gradient of g is then made of.
            tolerance = torch.finfo(dtype).eps * (4 if got.dim() == 1 else 1) * want.abs().max()
            assert ((got.double() - want).abs() <= tolerance + 1e-6).all()


def test_in_place() -> None:
    base, lora, result = (draw(4, 9, 33, seed=i, dtype=torch.bfloat16) for i in range(3))
    g, bias = draw(33, seed=3) * 0.2 + 1, draw(33, seed=4)
    for operand, call, expected in (
        (base, lambda t: ops.compose_(t, lora, g, bias, 0.7), ops.compose(base, lora, g, bias, 0.7, torch.bfloat16)),
        (base, lambda t: ops.compose_(t, None, g, None, 1.0), ops.compose(base, None, g, None, 1.0, torch.bfloat16)),
        (
            result,
            lambda t: ops.compose_delta_(t, base, lora, g, 0.7),
            ops.compose_delta(result, base, lora, g, 0.7, torch.bfloat16),
        ),
    ):
        for written in (operand.clone(), layouts(operand.clone())["channels"]):
            address = written.data_ptr()
            assert call(written) is None
            assert written.data_ptr() == address
            assert torch.equal(written, expected)


def test_sums_over_tokens_do_not_change_between_runs() -> None:
    grad, total, g = draw(50, 70), draw(50, 70, seed=1), draw(70, seed=2)
    found = []
    for _ in range(3):
        d_g, d_bias = torch.empty(70), torch.empty(70)
        launch_backward(grad, g, total, 1.0, False, None, None, d_g, d_bias, 5)
        found.append((d_g, d_bias))
    assert all(torch.equal(a, b) for again in found[1:] for a, b in zip(again, found[0]))


def test_a_frozen_magnitude_reads_and_keeps_no_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    from dorafx.ops.triton import compose

    seen: list[Any] = []
    monkeypatch.setattr(compose, "launch_forward", lambda *a: seen.append(a[-1]) or launch_forward(*a))
    monkeypatch.setattr(compose, "launch_backward", lambda *a: seen.append((a[2], a[7])) or launch_backward(*a))
    base, lora, g = draw(3, 8).requires_grad_(), draw(3, 8, seed=1).requires_grad_(), draw(8, seed=2)
    ops.compose(base, lora, g, None, 1.5, torch.float32).sum().backward()
    assert seen == [None, (None, None)]


def test_nan_and_infinity_pass() -> None:
    base, lora, g = draw(3, 8), draw(3, 8, seed=1), draw(8, seed=2)
    base[0, 1], lora[1, 2], g[3] = math.nan, math.inf, math.nan
    torch.testing.assert_close(
        ops.compose(base, lora, g, None, 1.5, torch.float32),
        reference.compose(base, lora, g, None, 1.5),
        equal_nan=True,
    )


def far(shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
    """A tensor whose elements may lie more than 2**31 elements apart, in memory that is reserved and never had: there are
    only the pages that are touched."""
    length = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, 2 * length, flags=flags)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.bfloat16).as_strided(shape, strides)


FAR = 2**31 + 8


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        ((2, 40), (FAR, 1)),  # two tokens in one tile
        ((70, 40), (FAR // 64, 1)),  # the second tile of tokens begins beyond 2**31
        ((3, 2), (1, FAR)),
        ((2, 3, 4), (FAR, 4, 1)),
        ((1, 1040), (1, FAR // 1024)),  # the second tile of columns does
    ],
)
def test_more_than_31_bits_of_elements(shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    base, lora = (far(shape, strides).copy_(draw(*shape, seed=i)) for i in range(2))
    g, expected = draw(shape[-1], seed=2), [t.clone().contiguous() for t in (base, lora)]
    wanted = reference.compose(*(t.double() for t in (*expected, g)), None, 1.5)
    y = torch.empty(shape)
    launch_forward(None, base, lora, g, None, 1.5, y, None)
    close(y, wanted)
    launch_forward(None, base, lora, g, None, 1.5, base, None)  # and as a place to write
    close(base.contiguous(), wanted)
    d_lora, d_g = torch.empty(shape), torch.empty(shape[-1])
    launch_backward(lora, g, base, 1.5, False, None, d_lora, d_g, None)
    close(d_lora, lora.double() * g.double() * 1.5)
    close(d_g, (lora.double() * base.double()).reshape(-1, shape[-1]).sum(0), 4 * shape[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["direct", "delta"])
def test_near_unity(form: str, dtype: torch.dtype) -> None:
    check_near_unity(form, dtype)


# -- linear -----------------------------------------------------------------------------------------------------------


def linear_operands(
    tokens: tuple[int, ...], d_out: int, d_in: int, rank: int, dtype: torch.dtype
) -> list[torch.Tensor]:
    shapes = ((*tokens, d_in), (d_out, d_in), (*tokens, rank), (d_out, rank))
    return [draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def check_linear(operands: list[torch.Tensor], scale: float, bias: torch.Tensor | None, **options: Any) -> None:
    x, weight, h, left = operands
    g = draw(left.shape[0], seed=5) * 0.2 + 1
    y = torch.empty(*x.shape[:-1], left.shape[0], dtype=x.dtype)
    total = torch.empty_like(y, dtype=torch.float32)
    linear_kernel.launch(x, weight, h, left, g, bias, scale, y, total, **options)
    wide = [t.double() for t in operands]
    exact = wide[0] @ wide[1].T + scale * wide[2] @ wide[3].T
    size = x.shape[-1] + left.shape[1]
    close(total, exact, 4 * size)
    close(y, exact * g.double() + (0 if bias is None else bias.double()), 4 * size)


@pytest.mark.parametrize("config", configs.LINEAR, ids=str)
def test_every_configuration_of_the_linear(config: configs.LinearConfig) -> None:
    dtype = torch.float32 if config.operand_bytes == 4 else torch.bfloat16
    operands = linear_operands((config.rows + 3,), config.columns + 5, config.depth + 7, 9, dtype)
    check_linear(operands, 0.7, draw(config.columns + 5, seed=6), config=config)


def test_a_group_of_blocks_is_covered_whole() -> None:
    """More blocks of rows than a group has, and a last group of fewer."""
    tiny = configs.LinearConfig(4, None, 16, 16, 16, 4, 2)
    check_linear(linear_operands((150,), 40, 20, 3, torch.float32), 1.0, None, config=tiny)


@settings(max_examples=8, deadline=None)
@given(
    lead=st.lists(st.integers(1, 6), max_size=3),
    d_out=st.integers(1, 90),
    d_in=st.integers(1, 90),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    scale=st.floats(-3, 3, allow_nan=False, width=32),
    transposed=st.booleans(),
    bias=st.booleans(),
)
def test_linear_of_any_shape(
    lead: list[int],
    d_out: int,
    d_in: int,
    rank: int,
    dtype: torch.dtype,
    scale: float,
    transposed: bool,
    bias: bool,
) -> None:
    operands = linear_operands(tuple(lead), d_out, d_in, rank, dtype)
    if transposed:
        operands = [t.mT.contiguous().mT if t.dim() > 1 else t for t in operands]
    check_linear(operands, scale, draw(d_out, seed=6) if bias else None)


def test_linear_with_more_than_31_bits_of_elements() -> None:
    operands = linear_operands((3,), 4, 2, 2, torch.bfloat16)
    for i, strides in ((0, (FAR, 1)), (1, (1, FAR)), (2, (1, FAR)), (3, (FAR // 2, 1))):
        apart = [far(tuple(t.shape), strides).copy_(t) if i == j else t for j, t in enumerate(operands)]
        check_linear(apart, 1.5, None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_the_linear(dtype: torch.dtype) -> None:
    leaves = [t.requires_grad_() for t in linear_operands((2, 7), 11, 9, 3, dtype)]
    leaves += [(draw(11, seed=5) * 0.2 + 1).requires_grad_(), draw(11, seed=6, dtype=dtype).requires_grad_()]
    upstream = draw(2, 7, 11, seed=7, dtype=dtype)
    found = torch.autograd.grad(ops.dora_linear(*leaves, 0.6, dtype), leaves, upstream)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = wide[4] * (wide[0] @ wide[1].mT + 0.6 * wide[2] @ wide[3].mT) + wide[5]
    for got, want in zip(found, torch.autograd.grad(exact, wide, upstream.double())):
        assert ((got.double() - want).abs() <= 6 * torch.finfo(dtype).eps * (1 + want.abs().max())).all()


# -- a model ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compose", ["auto", "triton", "triton_linear"])
def test_a_peft_model_runs_on_the_kernels(compose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eager codegen of a stock PEFT model, forward and backward through the kernels alone."""
    from integration_support import check_model, peft_perceptron

    from dorafx.ops import composition

    def only_shapes(function: Any) -> Any:
        def checked(*args: Any) -> Any:
            assert all(type(a) is not torch.Tensor for a in args), f"{function.__name__} computed values"
            return function(*args)

        return checked

    for name in ("compose_math", "delta_math", "forward_math", "backward_math"):
        monkeypatch.setattr(composition, name, only_shapes(getattr(composition, name)))
    for dropout in (0.0, 0.3):
        model = peft_perceptron(lora_dropout=dropout).train()
        torch.compiler.reset()
        dorafx.rewrite_log().clear()
        check_model(model, **{"dorafx.compose": compose})
