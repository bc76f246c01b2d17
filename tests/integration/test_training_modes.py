"""Training as people do it, against stock PEFT: scaled losses, checkpointing, clipping, and what autograd cannot do here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from integration_support import (
    Run,
    assert_all_rewritten,
    assert_close,
    compile_eagerly,
    peft_model,
    peft_perceptron,
    run,
    squared_errors,
    tokens,
)

import dorafx
from dorafx import rewrite_log
from dorafx.versions import minor

COMPILED = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
Step = Callable[[Callable[..., Any], list[torch.nn.Parameter]], Any]


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train(make: Callable[[], Any], codegen: str, program: Step) -> tuple[dict[str, torch.Tensor], Any]:
    """The trained parameters after a training program, and what it returned; stock's where there is no codegen."""
    torch.compiler.reset()
    model = make().train()
    torch.manual_seed(5)
    call = compile_eagerly(model, **{"dorafx.codegen": codegen}) if codegen else model
    result = program(call, trainable(model))
    if codegen:
        assert not rewrite_log().misses
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, result


def assert_trained_alike(
    make: Callable[[], Any], program: Step, tolerance: float, codegen: str = "eager"
) -> tuple[Any, Any]:
    expected, told = train(make, "", program)
    start = {n: p for n, p in make().named_parameters() if p.requires_grad}
    actual, tells = train(make, codegen, program)
    assert any((expected[n] - start[n]).abs().max() > 0 for n in start)
    for name, parameter in expected.items():
        assert_close(actual[name], parameter, tolerance, name)
    return tells, told


def half_base_fp32_adapters() -> Any:
    """PEFT's default on a bf16 base: adapters in fp32."""
    torch.manual_seed(0)
    model = peft_perceptron(dtype=torch.bfloat16)
    for parameter in trainable(model):
        parameter.data = parameter.data.float()
    return model


def inputs(step: int, width: int = 24) -> torch.Tensor:
    return torch.randn((6, width), generator=torch.Generator().manual_seed(step))


# -- mixed precision --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "codegen"),
    [
        (torch.bfloat16, "eager"),
        (torch.float16, "eager"),
        (torch.float16, "aot_eager"),
        pytest.param(torch.float16, "inductor", marks=pytest.mark.slow),
    ],
)
def test_grad_scaler_under_autocast(dtype: torch.dtype, codegen: str) -> None:
    """Four steps in ``torch.autocast`` with a scaler; in the third a gradient overflows: that step is left out and the
    scale halved, for stock and dorafx alike."""

    def program(model: Callable[..., Any], parameters: list[torch.nn.Parameter]) -> list[float]:
        optimizer = torch.optim.SGD(parameters, lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**7, growth_interval=10)
        scales = []
        for step in range(4):
            with torch.autocast("cpu", dtype):
                loss = model(inputs(step)).float().square().mean()
            scaler.scale(loss * (float("inf") if step == 2 else 1)).backward()
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
        return scales

    ours, stocks = assert_trained_alike(peft_perceptron, program, 2e-3, codegen)
    assert ours == stocks == [128.0, 128.0, 64.0, 64.0]


class Squashed(torch.nn.Module):
    """In place of dropout, so that the base product is made twice: the same for every dtype and draw."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


def with_second_input(model: Any) -> Any:
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = Squashed()
    return model


@pytest.mark.parametrize(
    ("autocast", "second_input", "codegen"),
    [
        *((autocast, second, "eager") for autocast in (False, True) for second in (False, True)),
        (True, True, "aot_eager"),
        pytest.param(False, True, "aot_eager", marks=pytest.mark.slow),
        pytest.param(True, True, "inductor", marks=pytest.mark.slow),
    ],
)
def test_fp32_adapters_on_a_bf16_base(autocast: bool, second_input: bool, codegen: str) -> None:
    """Gradients of fp32 adapters have fp32's dtype, and are as near to fp64's as stock's are."""
    change = with_second_input if second_input else lambda model: model
    model = change(half_base_fp32_adapters())
    exact_model = change(peft_perceptron(dtype=torch.float64).double())
    exact_model.load_state_dict({k: v.double() for k, v in model.state_dict().items()})
    x = inputs(0)

    def region(function: Callable[..., Any]) -> Run:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return run(model, lambda: function(x if autocast else x.bfloat16()))

    stock, ours = region(model), region(compile_eagerly(model, **{"dorafx.codegen": codegen}))
    exact = run(exact_model, lambda: exact_model(x.bfloat16().double()))
    assert {g.dtype for g in ours.gradients.values()} == {torch.float32}
    assert ours.output.dtype == stock.output.dtype
    theirs = squared_errors(stock, exact)
    for kind, error in squared_errors(ours, exact).items():
        assert error <= 2.0 * theirs[kind], kind  # squares of few numbers; tests/zoo has the mean over draws
    assert_all_rewritten(model)


# -- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_to_none", [True, False])
def test_clipping_and_zero_grad(set_to_none: bool) -> None:
    """Micro-batches accumulate into gradients that are None or zero, then are clipped."""

    def program(model: Callable[..., Any], parameters: list[torch.nn.Parameter]) -> list[float]:
        optimizer = torch.optim.AdamW(parameters, lr=1e-2)
        norms = []
        for step in range(3):
            optimizer.zero_grad(set_to_none=set_to_none)
            assert all((p.grad is None) if set_to_none or step == 0 else not p.grad.any() for p in parameters)
            for micro_batch in range(2):
                model(inputs(10 * step + micro_batch)).square().mean().backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, 0.1)))
            optimizer.step()
        return norms

    ours, stocks = assert_trained_alike(peft_perceptron, program, 1e-4)
    assert ours == pytest.approx(stocks, rel=1e-4)
    assert min(stocks) > 0.1  # it was clipped


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [pytest.param(0.0, marks=pytest.mark.slow), 0.1])
def test_gradient_checkpointing(reentrant: bool, dropout: float) -> None:
    """Both kinds, with the random state of dropout: losses of three steps and the parameters after them."""

    def make() -> Any:
        model = peft_model(lora_dropout=dropout)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        return model

    found = []
    for ours in (False, True):
        torch.compiler.reset()
        model = make().train()
        if ours:
            dorafx.optimize(model, codegen="eager", strict=True)
        optimizer = torch.optim.SGD(trainable(model), lr=0.1)
        losses = []
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            ids = tokens(seed=step)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            losses.append(float(loss))
        found.append((losses, [p.detach().clone() for p in trainable(model)]))
    (stock_losses, stock), (losses, ours_after) = found
    assert losses == pytest.approx(stock_losses, abs=1e-5)
    for got, wanted in zip(ours_after, stock):
        assert_close(got, wanted, 1e-4)
    assert rewrite_log().rewrites and not rewrite_log().misses


# -- what autograd cannot do here -------------------------------------------------------------------------------------


def warm(codegen: str) -> tuple[Any, Any]:
    """A perceptron and its compiled call, after a first call."""
    torch.compiler.reset()
    rewrite_log().clear()
    model = peft_perceptron().train()
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": codegen, "dorafx.strict": True})
    compiled(inputs(0))
    assert_all_rewritten(model)
    return model, compiled


@pytest.mark.parametrize("codegen", ["eager", *COMPILED])
def test_a_second_derivative_is_refused(codegen: str) -> None:
    """By dorafx where its own backward runs; by torch, with the words that README quotes, where a compiled one does."""
    model, compiled = warm(codegen)
    refusal = "does not currently support double backward" if codegen != "eager" else "compose has no second derivative"
    with pytest.raises(RuntimeError, match=refusal):
        first = torch.autograd.grad(compiled(inputs(0)).sin().sum(), trainable(model), create_graph=True)
        torch.autograd.grad(sum(g.sum() for g in first), trainable(model))
    if codegen == "eager":
        return
    model, compiled = warm(codegen)
    compiled(inputs(0)).sum().backward()  # which decides that the backward may write over what was saved for it
    # Inductor's caches may hold the backward that was compiled above, which does not.
    donated = "compiled with non-empty donated buffers" + (f"|{refusal}" if codegen == "inductor" else "")
    with pytest.raises(RuntimeError, match=donated):
        first = torch.autograd.grad(compiled(inputs(0)).sin().sum(), trainable(model), create_graph=True)
        torch.autograd.grad(sum(g.sum() for g in first), trainable(model))


@pytest.mark.parametrize("compose", ["auto", "triton"])
def test_batched_gradients(compose: str) -> None:
    model = peft_perceptron(dtype=torch.float64).double().train()
    compiled, x = compile_eagerly(model, **{"dorafx.compose": compose}), inputs(0).double()
    upstream = torch.randn(3, *x.shape, dtype=x.dtype)
    found, wanted = (
        torch.autograd.grad(call(x), trainable(model), upstream, is_grads_batched=True) for call in (compiled, model)
    )
    for got, gradient in zip(found, wanted):
        torch.testing.assert_close(got, gradient)
    jacobians = [torch.autograd.functional.jacobian(call, x, vectorize=True) for call in (model, compiled)]
    torch.testing.assert_close(*jacobians)
    assert_all_rewritten(model, times=2)  # the jacobian records gradients of x, too


@pytest.mark.parametrize("warmed", [True, False])
def test_functional_transforms_are_right(warmed: bool) -> None:
    """Inside ``torch.func`` 's transforms Dynamo runs the original code, so grad, vmap and jvp are the original's."""
    model = peft_perceptron().train()
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager"})
    x, tangent = inputs(0), inputs(1)
    if warmed:
        compiled(x)
    named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}

    def loss(function: Any, values: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
        return torch.func.functional_call(function, {prefix + n: v for n, v in values.items()}, (x,)).sin().sum()

    wanted = torch.func.grad(lambda values: loss(model, values, ""))(named)
    got = torch.func.grad(lambda values: loss(compiled, values, "_orig_mod."))(named)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient)
    torch.testing.assert_close(torch.func.vmap(compiled)(x), torch.func.vmap(model)(x))
    for ours, stocks in zip(torch.func.jvp(compiled, (x,), (tangent,)), torch.func.jvp(model, (x,), (tangent,))):
        torch.testing.assert_close(ours, stocks)


@pytest.mark.parametrize("codegen", ["eager", "aot_eager"])
@pytest.mark.parametrize("of", ["input", "parameters"])
def test_forward_mode_is_refused(of: str, codegen: str) -> None:
    model, compiled = warm(codegen)
    x, tangent = inputs(0), inputs(1)
    with forward_ad.dual_level():
        duals: dict[str, torch.Tensor] = {}
        if of == "input":
            x = forward_ad.make_dual(x, tangent)
        else:
            duals = {n: forward_ad.make_dual(p.detach(), torch.ones_like(p)) for n, p in model.named_parameters()}

        def call() -> torch.Tensor:
            return torch.func.functional_call(compiled, {f"_orig_mod.{n}": d for n, d in duals.items()}, (x,))  # type: ignore[no-any-return]

        if of == "parameters" and minor(torch.__version__) >= (2, 15):
            # Dynamo sees that parameters are dual, and takes the graph for another: there is a tangent.
            wanted = torch.func.functional_call(model, duals, (x,))
            for ours, stocks in zip(forward_ad.unpack_dual(call()), forward_ad.unpack_dual(wanted), strict=True):
                torch.testing.assert_close(ours, stocks)
        else:
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                call()
    x = inputs(0)
    with forward_ad.dual_level():  # without a tangent there is nothing to refuse
        torch.testing.assert_close(compiled(x), model(x))


def test_the_operators_refuse_what_they_would_lose() -> None:
    """The row norm is opaque: its result would have no tangent. A composition that records nothing is plain arithmetic."""
    W, B, A = (torch.randn(s) for s in ((6, 5), (6, 2), (2, 5)))
    base, g = torch.randn(3, 6), torch.rand(6)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(B, torch.ones_like(B))
        with pytest.raises(RuntimeError, match=r"row_norm has no forward-mode derivative.*restore"):
            torch.ops.dorafx.row_norm(W, dual, A, 0.5)
        for kernel, recorded in (("triton", False), ("auto", True)):
            dual_g = forward_ad.make_dual(g.clone().requires_grad_(recorded), torch.ones_like(g))
            with pytest.raises(RuntimeError, match="compose has no forward-mode derivative"):
                torch.ops.dorafx.compose(base, None, dual_g, None, 1.0, torch.float32, kernel)
        y = torch.ops.dorafx.compose(base, None, forward_ad.make_dual(g, torch.ones_like(g)), None, 1.0, torch.float32)
        torch.testing.assert_close(forward_ad.unpack_dual(y).tangent, base)
