"""The compositions against fp64: values, gradients, what is saved, and what Inductor makes of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from near_unity import check_near_unity

import dorafx.ops  # noqa: F401
from dorafx.ops import reference

compose = torch.ops.dorafx.compose
compose_delta = torch.ops.dorafx.compose_delta


def tensors(*lead: int, d: int = 7, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    base, lora, result = (torch.randn(*lead, d, dtype=torch.float64).to(dtype) for _ in range(3))
    g, bias = (
        (torch.rand(d, dtype=torch.float64) + 0.5).to(torch.promote_types(dtype, torch.float32)),
        torch.randn(d).to(dtype),
    )
    return base, lora, result, g, bias


@pytest.mark.parametrize("lead", [(3,), (2, 5), (1, 2, 3), (0,), (1,)])
def test_gradients_in_fp64(lead: tuple[int, ...]) -> None:
    base, lora, result, g, bias = (t.double().requires_grad_() for t in tensors(*lead))
    assert torch.autograd.gradcheck(lambda *t: compose(*t, 1.3, torch.float64), (base, lora, g, bias))
    assert torch.autograd.gradcheck(lambda b, g: compose(b, None, g, None, 1.0, torch.float64), (base, g))
    assert torch.autograd.gradcheck(lambda *t: compose_delta(*t, 1.3, torch.float64), (result, base, lora, g))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_against_fp64(dtype: torch.dtype) -> None:
    base, lora, result, g, bias = tensors(9, 5, dtype=dtype)
    wide = [t.double() for t in (base, lora, g, bias)]
    one_rounding = 0.51 * torch.finfo(dtype).eps
    exact = reference.compose(*wide, 1.3)
    assert (
        (compose(base, lora, g, bias, 1.3, dtype).double() - exact).abs() <= one_rounding * exact.abs() + 1e-6
    ).all()
    exact = reference.compose_delta(result.double(), *wide[:3], 1.3)
    got = compose_delta(result, base, lora, g, 1.3, dtype).double()
    assert ((got - exact).abs() <= one_rounding * exact.abs() + 2e-6).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4, 0.0])
def test_near_unity(dtype: torch.dtype, distance: float) -> None:
    """Where g is nearly one, half precision loses ``(g - 1)·base`` in the original's arithmetic; one rounding does not."""
    base, lora, _, _, _ = tensors(64, d=48, dtype=dtype)
    g = 1 + distance * (2 * torch.rand(48) - 1)
    exact = reference.compose(base.double(), lora.double(), g.double(), None, 0.1)
    h = g.to(dtype)
    original = base + ((h - 1) * base + h * lora * 0.1)
    got = compose(base, lora, g, None, 0.1, dtype)
    error, original_error = (got.double() - exact).norm(), (original.double() - exact).norm()
    assert error <= 1.0 * original_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["direct", "delta"])
def test_no_worse_than_the_stable_form_near_unity(form: str, dtype: torch.dtype) -> None:
    check_near_unity(form, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_near_unity_compiled(backend: str) -> None:
    for dtype in (torch.bfloat16, torch.float16):
        for form in ("direct", "delta"):
            torch.compiler.reset()
            check_near_unity(form, dtype, backend)


# -- a base that has the bias in it -----------------------------------------------------------------------------------


@pytest.mark.parametrize("lead", [(3,), (2, 5), (0,), ()])
def test_gradients_with_a_biased_base_in_fp64(lead: tuple[int, ...]) -> None:
    base, lora, _, g, bias = (t.double().requires_grad_() for t in tensors(*lead))

    def run(base: torch.Tensor, lora: Any, g: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return compose(base + bias.detach(), lora, g, bias, 1.3, torch.float64, biased=True)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(run, (base, lora, g, bias))
    assert torch.autograd.gradcheck(lambda b, g, bias: run(b, None, g, bias), (base, g, bias))
    assert torch.autograd.gradcheck(lambda b, bias: run(b, lora.detach(), g.detach(), bias), (base, bias))
    torch.testing.assert_close(run(base, lora, g, bias), compose(base, lora, g, bias, 1.3, torch.float64))


def test_a_bias_in_the_base_has_the_gradient_of_one_that_is_added() -> None:
    """Also where the scaling is not finite."""
    base, lora, _, g, bias = (t.double().requires_grad_() for t in tensors(3))
    wrong = torch.tensor([torch.inf, torch.nan], dtype=g.dtype)
    y = compose(base + bias.detach(), lora, torch.cat((wrong, g[2:])), bias, 1.3, torch.float64, biased=True)
    (grad,) = torch.autograd.grad(y.sum(), bias)
    assert torch.equal(grad, torch.full_like(bias, len(base)))


def _layer(x: torch.Tensor, weight: torch.Tensor, lora: torch.Tensor, g: torch.Tensor, bias: torch.Tensor) -> Any:
    base = torch.nn.functional.linear(x, weight, bias.detach())
    return compose(base, lora, g, bias, 1.3, x.dtype, biased=True)


def _stock_layer(x: torch.Tensor, weight: torch.Tensor, lora: torch.Tensor, g: torch.Tensor, bias: torch.Tensor) -> Any:
    """As PEFT computes it, in the dtype of the layer."""
    base = torch.nn.functional.linear(x, weight, bias)
    without, g = base - bias, g.to(base.dtype)
    return base + ((g - 1) * without + g * lora * 1.3)


@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_biased_base_is_as_exact(compiled: bool, dtype: torch.dtype, size: float) -> None:
    """Values and gradients err no more than those of PEFT's own arithmetic, by the mean squares of several draws, also where the bias is
    much larger than the product."""
    runs = [torch.compile(f, fullgraph=True) if compiled else f for f in (_stock_layer, _layer)]
    squares = torch.zeros(2, 6, dtype=torch.float64)
    for _ in range(12):
        x, weight, lora, bias = (torch.randn(n).to(dtype) for n in ((128, 32), (96, 32), (128, 96), (96,)))
        leaves = [t.requires_grad_() for t in (x, weight, lora, torch.rand(96).to(dtype).float() + 0.5, bias * size)]
        wide = [t.detach().double().requires_grad_() for t in leaves]
        exact = _stock_layer(*wide)
        grad = torch.randn(exact.shape).to(dtype)
        wanted = [exact, *torch.autograd.grad(exact, wide, grad.double())]
        for i, run in enumerate(runs):
            y = run(*leaves)
            found = [y, *torch.autograd.grad(y, leaves, grad)]
            assert [t.dtype for t in found[1:]] == [t.dtype for t in leaves]
            squares[i] += torch.stack([((a.double() - b).norm() / b.norm()) ** 2 for a, b in zip(found, wanted)])
    ratios = (squares[1] / squares[0]).sqrt()
    assert (ratios <= 1.05).all(), ratios


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_where_g_is_one_a_biased_base_stays_as_it_is(dtype: torch.dtype) -> None:
    base, lora, _, g, bias = tensors(64, d=48, dtype=dtype)
    g = torch.where(torch.arange(48) % 2 == 0, 1.0, g)
    y = compose(base, lora * 0, g, bias * 100, 1.3, dtype, biased=True)
    assert torch.equal(y[:, ::2], base[:, ::2])
    into = base.clone()
    torch.ops.dorafx.compose_(into, lora * 0, g, bias * 100, 1.3, biased=True)
    assert torch.equal(into[:, ::2], base[:, ::2])
    torch.testing.assert_close(into, y)


def test_what_a_biased_base_saves() -> None:
    """One tensor of activations, and a bias that the program may overwrite before the backward."""
    for dtype in (torch.float32, torch.bfloat16):
        base, lora, _, g, bias = tensors(16, 8, d=32, dtype=dtype)
        leaves = [t.requires_grad_() for t in (base, lora, g)]
        activation = base.numel() * base.element_size()

        def run() -> torch.Tensor:
            return compose(base, lora, g, bias, 1.0, dtype, biased=True)  # type: ignore[no-any-return]  # noqa: B023

        assert sum(size >= activation for size in saved_bytes(run)) == 1
        wanted = torch.autograd.grad(run().sum(), leaves)
        y = run()
        bias.add_(1.0)
        for a, b in zip(torch.autograd.grad(y.sum(), leaves), wanted):
            assert torch.equal(a, b)


def test_the_operator_with_a_biased_base() -> None:
    base, lora, _, g, bias = (t.requires_grad_() for t in tensors(4, dtype=torch.float32))
    torch.library.opcheck(compose.default, (base, lora, g, bias, 1.3, torch.float32), {"biased": True})
    y = compose(base, lora, g, bias, 1.3, torch.float32, biased=True)
    grads = torch.randn(3, *y.shape)
    together = torch.autograd.grad(y, (base, lora, g, bias), grads, is_grads_batched=True, retain_graph=True)
    for i, grad in enumerate(grads):
        one = torch.autograd.grad(y, (base, lora, g, bias), grad, retain_graph=True)
        for a, b in zip(together, one):
            torch.testing.assert_close(a[i], b)


def test_what_a_biased_base_takes() -> None:
    base, lora, _, g, bias = tensors(3)
    for wrong in (None, bias[:1], bias.expand(3, 7)):
        with pytest.raises(ValueError, match=r"the bias and g are \[d_out\], here \(7,\); got bias"):
            compose(base, lora, g, wrong, 1.0, torch.float64, biased=True)
    with pytest.raises(ValueError, match=r"g \(3, 7\)"):
        torch.ops.dorafx.compose_(base, lora, g.expand(3, 7), bias, 1.0, biased=True)


def saved_bytes(run) -> list[int]:  # type: ignore[no-untyped-def]
    sizes: list[int] = []
    seen: set[int] = set()

    def pack(t: torch.Tensor) -> torch.Tensor:
        if t.untyped_storage().data_ptr() not in seen:
            seen.add(t.untyped_storage().data_ptr())
            sizes.append(t.numel() * t.element_size())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sizes


def test_saved_tensors() -> None:
    """One ``[tokens, d_out]`` tensor where g is trained, none where it is frozen."""
    base, lora, result, g, bias = tensors(16, 8, d=32, dtype=torch.bfloat16)
    activation = base.numel() * base.element_size()
    base.requires_grad_(), lora.requires_grad_()
    for trained, expected in ((True, 1), (False, 0)):
        g.requires_grad_(trained)
        for run in (
            lambda: compose(base, lora, g, bias, 1.0, torch.bfloat16),
            lambda: compose(base, None, g, None, 1.0, torch.bfloat16),
            lambda: compose_delta(result, base, lora, g, 1.0, torch.bfloat16),
        ):
            assert sum(size >= activation for size in saved_bytes(run)) == expected


def test_second_derivative_is_refused() -> None:
    base, lora, _, g, _ = (t.double().requires_grad_() for t in tensors(3))
    y = compose(base, lora, g, None, 1.0, torch.float64)
    with pytest.raises(RuntimeError, match="compose has no second derivative"):
        torch.autograd.grad(y.sum(), g, create_graph=True)


def test_inductor_sees_through_the_composition() -> None:
    """The compiled forward and backward hold pointwise ATen code and no call of a dorafx operator; gradients agree."""
    from torch._inductor.utils import run_fw_bw_and_get_code

    base, lora, _, g, bias = (t.float() for t in tensors(16, d=32))
    leaves = [t.requires_grad_() for t in (base, lora, g, bias)]

    def program(*t: torch.Tensor) -> torch.Tensor:
        return compose(*t, 1.3, torch.float32).sin()

    expected = torch.autograd.grad(program(*leaves).sum(), leaves)
    compiled = torch.compile(program, backend="inductor")
    _, code = run_fw_bw_and_get_code(lambda: compiled(*leaves))
    assert len(code) == 2
    assert all("dorafx" not in part for part in code)
    with torch.inference_mode():
        torch.testing.assert_close(torch.compile(program, backend="dorafx")(*leaves), program(*leaves))
    for got, wanted in zip(torch.autograd.grad(compiled(*leaves).sum(), leaves), expected):
        torch.testing.assert_close(got, wanted)


def test_what_the_operators_take() -> None:
    base, lora, _, g, _ = tensors(3)
    with pytest.raises(ValueError, match="unknown kernel 'cuda'; allowed are 'auto', 'triton'"):
        compose(base, lora, g, None, 1.0, torch.float64, "cuda")
    x, weight, h, left = (torch.randn(s) for s in ((3, 5), (7, 5), (3, 2), (7, 2)))
    with pytest.raises(
        ValueError, match=r"shapes must agree; got x \(3, 5\), weight \(7, 5\), h \(3, 2\), left \(7, 1\)"
    ):
        torch.ops.dorafx.dora_linear(x, weight, h, left[:, :1], g.float(), None, 1.0, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", ["auto", "triton"])
def test_the_operators_of_the_kernels_without_a_gpu(kernel: str, dtype: torch.dtype) -> None:
    """Where no kernel serves, the opaque operators compute the same, and agree with what they tell a compiler."""
    base, lora, result, g, bias = tensors(4, 3, dtype=dtype)
    base = base.transpose(0, 1)  # any strides
    lora, result = (t.transpose(0, 1).contiguous() for t in (lora, result))
    leaves = [t.detach().requires_grad_() for t in (base, lora, g, bias)]
    y = compose(*leaves, 1.3, dtype, kernel)
    expected = compose(*leaves, 1.3, dtype)
    assert torch.equal(y, expected)
    for got, wanted in zip(
        torch.autograd.grad(y.sin().sum(), leaves), torch.autograd.grad(expected.sin().sum(), leaves)
    ):
        torch.testing.assert_close(got, wanted, rtol=0, atol=0)
    assert torch.equal(
        compose_delta(result, base, lora, g, 1.3, dtype, kernel), compose_delta(result, base, lora, g, 1.3, dtype)
    )
    if kernel == "triton":
        arguments = (None, base, lora, g, bias, 1.3, dtype, torch.promote_types(dtype, torch.float32))
        torch.library.opcheck(
            torch.ops.dorafx.compose_forward, arguments, test_utils=("test_schema", "test_faketensor")
        )
        grad = torch.randn_like(base)
        arguments = (grad, g, base, 1.3, True, dtype, None, True, dtype)
        torch.library.opcheck(
            torch.ops.dorafx.compose_backward, arguments, test_utils=("test_schema", "test_faketensor")
        )
        x, weight, h, left = (torch.randn(s).to(dtype) for s in ((2, 3, 5), (7, 5), (2, 3, 2), (7, 2)))
        arguments = (x, weight, h, left, g, bias, 1.3, dtype, None)
        torch.library.opcheck(
            torch.ops.dorafx.dora_linear_forward, arguments, test_utils=("test_schema", "test_faketensor")
        )


def test_flops_of_the_linear_are_those_of_its_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    x, weight, h, left, g = (torch.randn(s) for s in ((3, 4, 5), (7, 5), (3, 4, 2), (7, 2), (7,)))
    with FlopCounterMode(display=False) as counter:
        torch.ops.dorafx.dora_linear(x, weight, h, left, g, None, 1.0, torch.float32)
    assert counter.get_total_flops() == 2 * 12 * 7 * (5 + 2)


def test_gradients_of_the_linear_in_fp64() -> None:
    leaves = [
        torch.randn(s, dtype=torch.float64, requires_grad=True)
        for s in ((2, 3, 5), (7, 5), (2, 3, 2), (7, 2), (7,), (7,))
    ]
    assert torch.autograd.gradcheck(lambda *t: torch.ops.dorafx.dora_linear(*t, 1.3, torch.float64), leaves)


@pytest.mark.parametrize("lead", [(3,), (2, 5), (0,), ()])
def test_a_linear_with_a_cast_weight(lead: tuple[int, ...]) -> None:
    """``F.linear(x, W.to(x.dtype))``, also for a W that is trained, for a view of it, and under autocast."""
    x, stored = torch.randn(*lead, 5), torch.randn(5, 7).bfloat16()
    for weight in (stored.t(), stored.reshape(7, 5)):
        upstream, found = torch.randn(*lead, 7), []
        for linear in (torch.ops.dorafx.cast_linear, lambda x, w: torch.nn.functional.linear(x, w.to(x.dtype))):
            leaves = [t.detach().requires_grad_() for t in (x, weight)]
            y = linear(*leaves)
            found.append((y.detach(), *torch.autograd.grad(y, leaves, upstream)))
        for got, wanted in zip(*found):
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted)
        torch.library.opcheck(
            torch.ops.dorafx.cast_linear_backward, (upstream, weight), test_utils=("test_schema", "test_faketensor")
        )
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.ops.dorafx.cast_linear(x, stored.t()).dtype == torch.float32
    with pytest.raises(RuntimeError, match="cast_linear has no second derivative"):
        leaf = x.clone().requires_grad_()
        torch.autograd.grad(torch.ops.dorafx.cast_linear(leaf, stored.t()).sum(), leaf, create_graph=True)


@pytest.mark.parametrize("kernel", ["auto", "triton"])
@pytest.mark.parametrize("lead", [(3,), (2, 5), ()])
def test_batched_gradients(lead: tuple[int, ...], kernel: str) -> None:
    """``is_grads_batched`` runs the backward under vmap."""
    base, lora, result, g, bias = (t.requires_grad_() for t in tensors(*lead))
    x, weight, h, left = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((*lead, 5), (7, 5), (*lead, 2), (7, 2))
    )
    for y, exact, leaves in (
        (
            compose(base, lora, g, bias, 1.3, torch.float64, kernel),
            reference.compose(base, lora, g, bias, 1.3),
            (base, lora, g, bias),
        ),
        (
            compose_delta(result, base, lora, g, 1.3, torch.float64, kernel),
            reference.compose_delta(result, base, lora, g, 1.3),
            (result, base, lora, g),
        ),
        (
            torch.ops.dorafx.dora_linear(x, weight, h, left, g, bias, 1.3, torch.float64),
            reference.compose(x @ weight.mT, h @ left.mT, g, bias, 1.3),
            (x, weight, h, left, g, bias),
        ),
    ):
        upstream = torch.randn(4, *y.shape, dtype=torch.float64)
        found, wanted = (
            torch.autograd.grad(v, leaves, upstream, is_grads_batched=True, retain_graph=True) for v in (y, exact)
        )
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b)
