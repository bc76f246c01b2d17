"""What a compiled composition keeps for its backward, what the backward computes again from that, and that gradients are as exact."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

import dorafx.ops  # noqa: F401
from dorafx._compat.partitioner import recompute_from_read
from dorafx.bench.allocations import saved_bytes
from dorafx.ops import composition

compose = torch.ops.dorafx.compose
TOKENS, D = 96, 32
INFINITY, NAN = float("inf"), float("nan")
SPECIAL = (0.0, -0.0, 1e-40, -1e-30, 2.0**-11, 2.0**11, -1e30, INFINITY, -INFINITY, NAN)
"""Values of g that leave the sum unscaled; ``m = 0`` makes g 0, a row of zeros makes it infinite or NaN."""
ORDINARY = (2.0**-10, -0.3, 1.0, 1.1, -1.7, 2.0**10)


def _partition(gm: torch.fx.GraphModule, inputs: Any, **how: Any) -> Any:
    recompute_from_read(gm.graph)
    return min_cut_rematerialization_partition(gm, inputs, **how)


torch._dynamo.register_backend(
    aot_autograd(fw_compiler=lambda gm, _: make_boxed_func(gm), partition_fn=_partition), name="dorafx_test_partition"
)


def partitioned(program: Callable[..., Any]) -> Callable[..., Any]:
    """Divided into forward and backward as for Inductor, and run operator by operator."""
    torch.compiler.reset()
    return torch.compile(program, backend="dorafx_test_partition", fullgraph=True)


def operands(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, the weights of two products of which a composition is made, g, and a matrix that multiplies what is made of it."""
    torch.manual_seed(0)
    x, first, second, last = (torch.randn(n, D).to(dtype).requires_grad_() for n in (TOKENS, D, D, D))
    return x, first, second, (torch.rand(D) + 0.5).requires_grad_(), last


def composed(x: Any, first: Any, second: Any, g: Any, bias: Any = None) -> torch.Tensor:
    return compose(x @ first, x @ second, g, bias, 1.3, x.dtype)  # type: ignore[no-any-return]


def activations(program: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> float:
    """How many tensors of the size of x are saved besides the inputs, vectors aside."""
    compiled = partitioned(program)
    compiled(*leaves)
    return saved_bytes(lambda: compiled(*leaves), leaves) // leaves[0].nbytes


def gradients(program: Callable[..., torch.Tensor], leaves: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(program(*leaves).sum(), [t for t in leaves if t.requires_grad])


def check_gradients(got: Any, wanted: Any, dtype: torch.dtype) -> None:
    """In half precision the sums for g have other roundings, and are large: of as many terms as there are tokens."""
    for a, b in zip(got, wanted, strict=True):
        close = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(a, b, rtol=close, atol=close * float(b.abs().max()))


def read_by_a_product(x: Any, first: Any, second: Any, g: Any, last: Any) -> torch.Tensor:
    y = composed(x, first, second, g)
    return y.view(-1, 4, D // 4).transpose(0, 1).sin().transpose(0, 1).reshape(-1, D) @ last


# -- what is kept -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_tensor_is_saved(dtype: torch.dtype) -> None:
    """Not the sum for the gradient of g and besides it what a product reads of the output."""
    leaves = operands(dtype)
    assert activations(read_by_a_product, leaves) == 1
    check_gradients(gradients(partitioned(read_by_a_product), leaves), gradients(read_by_a_product, leaves), dtype)


def biased(x: Any, first: Any, second: Any, g: Any, bias: Any) -> torch.Tensor:
    return compose(torch.addmm(bias.detach(), x, first), x @ second, g, bias, 1.3, x.dtype, biased=True)  # type: ignore[no-any-return]


def test_two_tensors_are_saved_of_a_biased_base() -> None:
    """The sum without the bias, for the gradient of g, does not give back the output to the bit; the output gives what is computed of it."""

    def activation(x: Any, first: Any, second: Any, g: Any, last: Any) -> torch.Tensor:
        return biased(x, first, second, g, last[0]).sin() @ last

    def heads(x: Any, first: Any, second: Any, g: Any, last: Any) -> torch.Tensor:
        y = biased(x, first, second, g, last[0]).view(-1, 4, D // 4).transpose(0, 1)
        y = y @ y.transpose(1, 2) @ y
        return y.transpose(0, 1).reshape(-1, D) @ last.detach()

    leaves = operands(torch.float32)
    check = functools.partial(check_gradients, dtype=torch.float32)
    for program, scores in ((activation, 0), (heads, 4 * TOKENS // D)):
        assert activations(program, leaves) == 2 + scores
        check(gradients(partitioned(program), leaves), gradients(program, leaves))


def test_a_residual_stream_of_biased_layers() -> None:
    """More than without a gradient of g are saved the sums alone."""

    def program(h: Any, first: Any, second: Any, g: Any, last: Any) -> torch.Tensor:
        for _ in range(3):
            normalised = F.layer_norm(h, (D,))
            inner = F.gelu(biased(normalised, first, second, g, last[0]))
            h = h + biased(inner, first, second, g, last[1])
        return h

    leaves = operands(torch.float32)
    x, first, second, g, last = leaves
    without = activations(program, (x, first, second, g.detach(), last))
    assert activations(program, leaves) <= without + 6
    check_gradients(gradients(partitioned(program), leaves), gradients(program, leaves), torch.float32)


def test_sums_are_kept_where_outputs_do_not_give_them_back() -> None:
    """In half precision: a bias cancels, and fp16 overflows. There the output is saved, too."""

    def with_a_bias(x: Any, first: Any, second: Any, g: Any, last: Any) -> torch.Tensor:
        return composed(x, first, second, g, last[0]).sin() @ last

    for program, dtype in ((with_a_bias, torch.bfloat16), (read_by_a_product, torch.float16)):
        leaves = operands(dtype)
        assert activations(program, leaves) >= 2
        check_gradients(gradients(partitioned(program), leaves), gradients(program, leaves), dtype)
    assert activations(with_a_bias, operands(torch.float32)) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_in_a_checkpointed_region(dtype: torch.dtype) -> None:
    def checkpointed(*t: Any) -> Any:
        return checkpoint(read_by_a_product, *t, use_reentrant=False)

    leaves = operands(dtype)
    assert activations(checkpointed, leaves) == 0
    check_gradients(gradients(partitioned(checkpointed), leaves), gradients(read_by_a_product, leaves), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_a_residual_stream(dtype: torch.dtype) -> None:
    """Every other one, and what is normalised of it, is computed again from the one before; none is from the first of all. So as much is
    saved as without the sums for the gradient of g."""

    def program(h: Any, first: Any, second: Any, g: Any) -> torch.Tensor:
        for _ in range(6):
            wide = h.float()
            normalised = (wide * (wide.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).to(h.dtype)
            h = h + composed(normalised, first, second, g)
        return h

    leaves = operands(dtype)[:-1]
    x, first, second, g = leaves
    assert activations(program, leaves) == activations(program, (x, first, second, g.detach()))
    check_gradients(gradients(partitioned(program), leaves), gradients(program, leaves), dtype)


# -- gradients --------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**31), st.lists(st.sampled_from(SPECIAL + ORDINARY), min_size=1, max_size=9), st.integers(-30, 30)
)
@settings(max_examples=60, deadline=None)
def test_what_is_kept_gives_back_the_output_and_the_sum(seed: int, values: list[float], exponent: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    base, lora = ((torch.randn(17, len(values), generator=generator) * 2.0**exponent).bfloat16() for _ in range(2))
    g = torch.tensor(values)
    y, kept, factor = composition.scaled_forward_math(base, lora, g, 0.7, torch.bfloat16)
    before = composition.compose_math(base, lora, g, None, 0.7, torch.bfloat16)
    rounding = torch.finfo(torch.bfloat16).eps / 2 * (1 + 1e-4)
    total = base.double() + lora.double() * 0.7
    # The sum is taken in fp32, which matters where its two parts cancel.
    wide = torch.finfo(torch.float32).eps * (base.double().abs() + lora.double().abs())
    assert ((kept.double() * factor.double() - total).abs() <= rounding * total.abs() + wide + 1e-38).all()
    ordinary = torch.tensor([v in ORDINARY for v in values])
    assert torch.equal(y[:, ordinary], before[:, ordinary])
    exact = total * g.double()
    off = (y.double() - exact).abs() <= 2 * rounding * exact.abs() + 2 * wide * g.double().abs() + 1e-39
    finite = exact.abs() < 3e38  # bf16 ends at 3.39e38
    assert off[finite].all()
    torch.testing.assert_close(y[:, g == 0], before[:, g == 0], rtol=0, atol=0)
    assert torch.equal(y.isnan(), before.isnan())
    # At the very end of the range the second rounding may be what makes an output infinite, or keeps it from that.
    largest = torch.finfo(torch.bfloat16).max
    edge = (exact.abs() - largest).abs() <= 3 * rounding * largest + 2 * wide * g.double().abs()
    assert torch.equal(y.isinf() & ~edge, before.isinf() & ~edge)


def test_rows_whose_g_is_special() -> None:
    """Gradients of g where it is zero, tiny, huge, infinite or NaN are those of the operator that keeps the sum."""
    g = torch.tensor(SPECIAL + ORDINARY, requires_grad=True)
    base, lora = (torch.randn(TOKENS, len(g)).bfloat16() for _ in range(2))
    weights = torch.randn(TOKENS, len(g)).bfloat16()

    def program(base: Any, lora: Any, g: Any) -> torch.Tensor:
        return compose(base, lora, g, None, 1.3, torch.bfloat16) * weights

    def gradient(run: Any) -> torch.Tensor:
        y = run(base, lora, g)
        (d_g,) = torch.autograd.grad(y, g, torch.ones_like(y))
        return d_g

    got, wanted = gradient(partitioned(program)), gradient(program)
    special = len(SPECIAL)
    torch.testing.assert_close(got[:special], wanted[:special], rtol=0, atol=0)
    torch.testing.assert_close(got[special:], wanted[special:], rtol=0.02, atol=0.1)
    assert got.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_g_against_fp64(dtype: torch.dtype) -> None:
    """As exact as with the sum kept, over many columns, of many sizes, whose terms cancel or do not."""
    torch.manual_seed(1)
    d = 2000
    sizes = torch.logspace(-4, 4, d) * (torch.rand(d) + 0.5)
    base, lora = ((torch.randn(TOKENS, d) * (sizes if dtype is not torch.float16 else 1)).to(dtype) for _ in range(2))
    g = (torch.randn(d) * 0.3 + 1).requires_grad_()
    for shift in (0.0, 1.0):
        dy = (torch.randn(TOKENS, d) + shift).to(dtype)

        def program(base: Any, lora: Any, g: Any) -> torch.Tensor:
            return compose(base, lora, g, None, 0.8, dtype)

        exact = (dy.double() * (base.double() + 0.8 * lora.double())).sum(0)
        of_column = exact.abs() + (dy.double() * base.double()).norm(dim=0)

        def error(run: Any, dy: Any = dy, exact: Any = exact, of_column: Any = of_column) -> float:
            (d_g,) = torch.autograd.grad(run(base, lora, g), g, dy)
            return float(((d_g.double() - exact) / of_column).norm())

        assert error(partitioned(program)) <= 1.05 * error(program)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_output_that_is_written_to(dtype: torch.dtype) -> None:
    """The caller may write to what was returned, before the backward: it reads what was kept, not the output."""
    leaves = operands(dtype)

    def program(x: Any, first: Any, second: Any, g: Any, last: Any) -> tuple[torch.Tensor, torch.Tensor]:
        y = composed(x, first, second, g)
        return y, y.view(2, -1, D).sin().reshape(-1, D) @ last

    def gradient(run: Any, write: bool) -> Any:
        y, out = run(*leaves)
        if write:
            y.data.mul_(3.0)
            with torch.no_grad():
                y.add_(1.0)
        return torch.autograd.grad(out.sum(), leaves)

    check_gradients(gradient(partitioned(program), True), gradient(program, False), dtype)


@pytest.mark.parametrize("recorded", [True, False])
def test_an_operand_that_the_program_overwrites(recorded: bool) -> None:
    """The backward would find another value there, and computes nothing from it."""
    leaves = operands(torch.float32)

    def program(x: Any, first: Any, second: Any, g: Any, last: Any, shift: Any) -> torch.Tensor:
        out = (composed(x, first, second, g) + shift) @ last
        with torch.set_grad_enabled(recorded):
            shift.add_(1.0)
        return out

    def gradient(run: Any) -> Any:
        return torch.autograd.grad(run(*leaves, torch.ones(D)).sum(), leaves)

    torch.compiler.reset()
    compiled = torch.compile(program, backend="dorafx", fullgraph=True)
    check_gradients(gradient(compiled), gradient(program), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_random_numbers_are_drawn_once(dtype: torch.dtype) -> None:
    leaves = operands(dtype)

    def program(x: Any, first: Any, second: Any, g: Any, last: Any) -> tuple[torch.Tensor, torch.Tensor]:
        y = composed(x, first, second, g)
        dropped = F.dropout(y, 0.5) + torch.rand_like(y)
        return dropped, dropped.view(2, -1, D).sin().reshape(-1, D) @ last

    dropped, out = partitioned(program)(*leaves)
    (d_last,) = torch.autograd.grad(out.sum(), leaves[-1:])
    wanted = dropped.detach().sin().sum(0, dtype=torch.float64).to(dtype)
    check_gradients([d_last], [wanted[:, None].expand(D, D)], dtype)


def test_compiled_by_inductor() -> None:
    """One tensor is saved, and gradients are those of the operator, also of the rows whose g is special, with dynamic shapes."""
    for dtype, dynamic in ((torch.float32, False), (torch.bfloat16, True)):
        torch.compiler.reset()
        x, first, second, _, last = operands(dtype)
        g = torch.tensor(((0.0, 1e-40, 1.1, -0.7) * D)[:D], requires_grad=True)
        leaves = (x, first, second, g, last)
        compiled = torch.compile(read_by_a_product, backend="dorafx", fullgraph=True, dynamic=dynamic)
        compiled(*leaves)
        assert saved_bytes(lambda c=compiled, t=leaves: c(*t), leaves) // x.nbytes == 1
        check_gradients(gradients(compiled, leaves), gradients(read_by_a_product, leaves), dtype)
