"""Stock PEFT linear DoRA, every variant of it, compared with itself in eager mode; the log must be complete."""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from typing import Any

import pytest
import torch
from integration_support import (
    HIDDEN,
    assert_all_rewritten,
    assert_close,
    assert_same_run,
    call,
    check_model,
    compile_eagerly,
    dora_sites,
    graphs_in_log,
    in_double,
    lora_config,
    peft_model,
    peft_perceptron,
    randomise,
    run,
    squared_errors,
    tokens,
)
from torch import nn
from transformers.pytorch_utils import Conv1D

from dorafx import rewrite_log

# -- the layer itself -------------------------------------------------------------------------------------------------


@pytest.mark.default_cases("False")
@pytest.mark.parametrize("train", [False, True])
def test_llama(train: bool) -> None:
    check_model(peft_model(layers=2).train(train))
    assert len(rewrite_log().rewrites) == 14


@pytest.mark.parametrize("train", [False, True])
def test_bias_of_the_projections(train: bool) -> None:
    model = peft_model("qwen2").train(train)
    assert model.get_submodule(dora_sites(model)[3]).base_layer is not None
    assert any(n.endswith("q_proj.base_layer.bias") for n, _ in model.named_parameters())
    check_model(model)


@pytest.mark.default_cases("0.2-False", "0.0-True")
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_fan_in_fan_out(dropout: float, everything: bool) -> None:
    """GPT-2 keeps its weights transposed, in a class of its own."""
    model = peft_model(
        "gpt2", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, lora_dropout=dropout
    ).train()
    assert isinstance(model.get_submodule(dora_sites(model)[0]).base_layer, Conv1D)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(everything or "lora_" in name)
    check_model(model)
    shapes = {r.site.rsplit(".", 1)[-1]: (r.d_out, r.d_in) for r in rewrite_log().rewrites}
    assert shapes["c_attn"] == (3 * HIDDEN, HIDDEN)
    assert shapes["c_fc"] == (4 * HIDDEN, HIDDEN)


@pytest.mark.default_cases("eager-True-True", "eager-False-True")
@pytest.mark.parametrize("dynamic", [True, None])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_fan_in_fan_out_with_dynamic_shapes(codegen: str, train: bool, dynamic: bool | None) -> None:
    """The base product is one of all tokens, ``[batch·length, d]``, and the layer's output is ``[batch, length, d]`` with symbolic sizes."""
    model = peft_model("gpt2", target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, lora_dropout=0.0)
    model.train(train)
    options = {"dorafx.codegen": codegen, "dorafx.strict": True}
    compiled = torch.compile(model, backend="dorafx", fullgraph=True, dynamic=dynamic, options=options)
    for length in (5, 7, 11):
        ids = tokens(2, length)
        with torch.set_grad_enabled(train):
            actual, expected = (run(model, lambda f=f, ids=ids: f(ids).logits) for f in (compiled, model))
        assert_same_run(actual, expected, 2e-5)
    records = rewrite_log().records
    assert {(r.status, r.pattern, r.reason) for r in records} == {("rewritten", "linear", "")}
    assert len(records) == len(dora_sites(model)) * (1 if dynamic else 2)


def test_rslora() -> None:
    model = peft_perceptron(use_rslora=True, lora_alpha=5)
    assert model.get_submodule(dora_sites(model)[0]).scaling["default"] == 5 / 4**0.5
    check_model(model.train())


def test_ranks_and_scalings_by_layer() -> None:
    model = peft_perceptron(rank_pattern={"first": 7}, alpha_pattern={"second": 11})
    check_model(model.train())
    assert {r.site.rsplit(".", 1)[-1]: r.rank for r in rewrite_log().rewrites} == {"first": 7, "second": 4}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_bias_trained_with_the_adapters(dropout: float) -> None:
    model = peft_perceptron(bias="lora_only", lora_dropout=dropout).train()
    check_model(model)
    assert all(p.grad is not None for n, p in model.named_parameters() if n.endswith("bias"))


# -- dropout ----------------------------------------------------------------------------------------------------------


@pytest.mark.default_cases("0.3-False")
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout(dropout: float, train: bool) -> None:
    """In training, the same seed draws the same masks: dorafx may neither drop, nor add, nor reorder a draw."""
    check_model(peft_model(lora_dropout=dropout).train(train))
    assert {r.pattern for r in rewrite_log().rewrites} == {"linear_dropout" if dropout and train else "linear"}


def test_dropout_leaves_the_random_state_where_stock_leaves_it() -> None:
    model = peft_perceptron(lora_dropout=0.5).train()
    compiled, x = compile_eagerly(model), torch.randn(3, 24)
    compiled(x)

    def draw_after(call: Any) -> torch.Tensor:
        torch.manual_seed(4)
        call(x)
        return torch.rand(3)

    assert torch.equal(draw_after(compiled), draw_after(model))


# -- several adapters -------------------------------------------------------------------------------------------------


def _two_adapters(**second: Any) -> Any:
    model = peft_perceptron()
    model.add_adapter("second", _second_config(r=6, lora_alpha=3, **second))
    return randomise(model, seed=5)


def _second_config(**changes: Any) -> Any:
    return lora_config(target_modules=["first", "second"], task_type=None, **changes)


def _assert_same_as_stock(compiled: Any, model: Any) -> None:
    assert_same_run(run(model, lambda: call(compiled, model)), run(model, lambda: call(model, model)))


def test_two_adapters_one_active() -> None:
    model = _two_adapters()
    check_model(model.train())
    assert {r.rank for r in rewrite_log().rewrites} == {4}


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("train", [False, True])
def test_two_adapters_both_active(train: bool, dropout: float) -> None:
    model = _two_adapters(lora_dropout=dropout)
    model.base_model.set_adapter(["default", "second"])
    check_model(model.train(train), times=2)
    assert {r.rank for r in rewrite_log().rewrites} == {4, 6}


def test_dora_and_plain_lora_both_active() -> None:
    model = _two_adapters(use_dora=False)
    model.base_model.set_adapter(["default", "second"])
    check_model(model.train())


def test_adapters_switched_after_compiling() -> None:
    model = _two_adapters()
    compiled = compile_eagerly(model)
    for adapter, rank in [("default", 4), ("second", 6), ("default", 4)]:
        model.set_adapter(adapter)
        rewrite_log().clear()
        _assert_same_as_stock(compiled, model)
        assert {r.rank for r in rewrite_log().rewrites} <= {rank}
    # The first adapter's graph is kept: coming back to it compiles nothing.
    assert not rewrite_log().records


def test_adapter_added_after_compiling() -> None:
    model = peft_model()
    compiled = compile_eagerly(model)
    _assert_same_as_stock(compiled, model)
    model.add_adapter("late", lora_config(r=3))
    randomise(model, seed=8)
    model.set_adapter("late")
    rewrite_log().clear()
    _assert_same_as_stock(compiled, model)
    assert_all_rewritten(model)
    assert {r.rank for r in rewrite_log().rewrites} == {3}


@pytest.mark.filterwarnings("ignore:Adapter default was active")
def test_adapter_deleted_after_compiling() -> None:
    model = _two_adapters()
    compiled = compile_eagerly(model)
    _assert_same_as_stock(compiled, model)
    model.delete_adapter("default")
    model.set_adapter("second")
    _assert_same_as_stock(compiled, model)


def test_disable_adapter() -> None:
    model = peft_model()
    compiled, ids = compile_eagerly(model), tokens()
    adapted = model(input_ids=ids).logits
    assert_close(compiled(input_ids=ids).logits, adapted, 1e-5)
    assert_all_rewritten(model)
    rewrite_log().clear()
    with model.disable_adapter():
        plain = model(input_ids=ids).logits
        assert_close(compiled(input_ids=ids).logits, plain, 1e-5)
    assert not rewrite_log().records, "there is no DoRA in the graph of a disabled adapter"
    assert (plain - adapted).abs().max() > 1e-3
    assert_close(compiled(input_ids=ids).logits, adapted, 1e-5)


def test_merged_and_unmerged_after_compiling() -> None:
    model = peft_perceptron()
    compiled = compile_eagerly(model)
    before = call(compiled, model)
    model.merge_adapter()
    rewrite_log().clear()
    assert_close(call(compiled, model), before, 1e-5)
    assert not rewrite_log().records, "merged weights hold no DoRA computation"
    model.unmerge_adapter()
    assert_close(call(compiled, model), before, 1e-5)


# -- what is trained --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("trained", ["lora_[AB]", "lora_magnitude_vector", "lora_B", "base_layer", "", "."])
def test_what_is_trained(trained: str, dropout: float) -> None:
    """Whatever is frozen. PEFT detaches the norm: the gradient of a trained base weight comes through the product
    alone, and that of the factors must not leak in through the norm."""
    model = peft_perceptron(lora_dropout=dropout).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(trained) and re.search(trained, name) is not None)
    check_model(model)
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_module_saved_beside_the_adapters() -> None:
    model = peft_model(modules_to_save=["lm_head"]).train()
    check_model(model)
    assert any("lm_head" in n and p.grad is not None for n, p in model.named_parameters())


def test_gradient_of_the_input() -> None:
    model = peft_perceptron(lora_dropout=0.2).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    compiled = compile_eagerly(model)

    def input_gradient(call: Any) -> torch.Tensor:
        x = torch.linspace(-1, 1, 3 * 24).reshape(3, 24).requires_grad_()
        torch.manual_seed(2)
        (gradient,) = torch.autograd.grad(call(x).sin().sum(), x)
        return gradient

    assert_close(input_gradient(compiled), input_gradient(model), 1e-5)
    assert_all_rewritten(model)


def test_gradients_requested_after_compiling() -> None:
    """Freezing and unfreezing a parameter is a new graph, not a stale one."""
    model = peft_perceptron().train()
    compiled, x = compile_eagerly(model), torch.randn(3, 24)
    for wanted in (True, False, True):
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name or "lora_A" in name:
                parameter.requires_grad_(wanted)
        assert_same_run(run(model, lambda: compiled(x)), run(model, lambda: model(x)))


@pytest.mark.parametrize("order", [("no_grad", "grad", "inference"), ("inference", "grad", "no_grad")])
def test_gradient_modes(order: tuple[str, ...]) -> None:
    model = peft_perceptron()
    compiled = compile_eagerly(model)
    modes = {"no_grad": torch.no_grad, "grad": contextlib.nullcontext, "inference": torch.inference_mode}
    expected = call(model, model).detach()
    for mode in order:
        with modes[mode]():
            actual = call(compiled, model)
            assert actual.requires_grad == (mode == "grad")
            assert actual.is_inference() == (mode == "inference")
        assert_close(actual.detach().clone(), expected, 1e-5, mode)
    assert not rewrite_log().misses


def test_parameters_updated_after_compiling() -> None:
    """The norm is never a constant: an optimizer step, and a write through ``.data``, change the next result."""
    model = peft_perceptron().train()
    compiled, x = compile_eagerly(model), torch.randn(3, 24)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    for _ in range(3):
        optimizer.zero_grad()
        compiled(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            assert_close(compiled(x), model(x), 1e-5)
    for parameter in model.parameters():
        parameter.data.mul_(1.5)
    with torch.no_grad():
        assert_close(compiled(x), model(x), 1e-5)


# -- inputs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(5, 24), (1, 24), (2, 5, 24), (2, 3, 5, 24), (1, 1, 1, 24)], ids=str)
def test_input_of_any_rank_to_a_bare_layer(shape: tuple[int, ...], dropout: float) -> None:
    layer = peft_perceptron(lora_dropout=dropout).base_model.model.first.train()
    x = torch.randn(shape)
    expected = run(layer, lambda: layer(x))
    compiled = compile_eagerly(layer)
    assert_same_run(run(layer, lambda: compiled(x)), expected)
    (record,) = rewrite_log().records
    assert (record.status, record.d_out, record.d_in, record.rank) == ("rewritten", 48, 24, 4)


def test_input_that_is_not_contiguous() -> None:
    model = peft_perceptron()
    x = torch.randn(24, 6, 2).permute(2, 1, 0)
    assert_close(compile_eagerly(model)(x), model(x), 1e-5)
    assert_all_rewritten(model)


@pytest.mark.parametrize("shape", [(0, 24), (2, 0, 24)], ids=str)
def test_empty_batch(shape: tuple[int, ...]) -> None:
    model = peft_perceptron().train()
    compiled, x = compile_eagerly(model), torch.randn(shape)
    actual, expected = run(model, lambda: compiled(x)), run(model, lambda: model(x))
    assert actual.output.shape == shape
    assert_same_run(actual, expected)
    assert all(not g.any() for g in actual.gradients.values())
    assert_all_rewritten(model)
    full = torch.randn(3, *shape[1:-1], 24) if len(shape) == 2 else torch.randn(2, 3, 24)
    assert_close(compiled(full), model(full), 1e-5)


@pytest.mark.default_cases("False")
@pytest.mark.parametrize("train", [False, True])
def test_sequence_length_is_dynamic(train: bool) -> None:
    """The second length makes the graph dynamic; no later one compiles anything."""
    model = peft_model(lora_dropout=0.1).train(train)
    compiled = compile_eagerly(model)
    for length in (5, 6, 7, 9, 13, 21, 34, 55):
        ids = tokens(length=length)
        assert_same_run(
            run(model, lambda ids=ids: compiled(input_ids=ids).logits),
            run(model, lambda ids=ids: model(input_ids=ids).logits),
        )
    assert graphs_in_log() == 2
    assert not rewrite_log().misses


def test_batch_size_and_length_are_dynamic_on_request() -> None:
    model = peft_perceptron()
    options = {"dorafx.codegen": "eager", "dorafx.strict": True}
    compiled = torch.compile(model, backend="dorafx", fullgraph=True, dynamic=True, options=options)
    for shape in [(2, 5, 24), (3, 4, 24), (7, 11, 24)]:
        x = torch.randn(shape)
        assert_close(compiled(x), model(x), 1e-5)
    assert graphs_in_log() == 1
    assert_all_rewritten(model)


# -- dtypes -----------------------------------------------------------------------------------------------------------


def _in_region(model: Any, function: Any, x: torch.Tensor, autocast: str | None) -> Any:
    def forward() -> torch.Tensor:
        with torch.autocast("cpu", getattr(torch, autocast)) if autocast else contextlib.nullcontext():
            return function(x)

    return run(model, forward)


@pytest.mark.parametrize(
    ("base", "adapter", "autocast"),
    [
        ("bfloat16", "bfloat16", None),
        ("float16", "float16", None),
        ("bfloat16", "float32", None),
        ("float32", "float32", "bfloat16"),
        ("bfloat16", "float32", "bfloat16"),
        ("float32", "float32", "float16"),
        ("float32", "float32", None),
    ],
)
@pytest.mark.parametrize("second_input", [False, True])
def test_reduced_precision(base: str, adapter: str, autocast: str | None, second_input: bool) -> None:
    """Against the same model in fp64, dorafx errs no more than stock does, in outputs and in all gradients.

    One run is one draw of rounding errors; their mean squares over many weights are compared. ``second_input`` is the
    dropout form, where the base product is computed again from the adapter's own input, with a function in the place of
    the dropout, so that the fp64 copy sees the same input.
    """
    model = peft_perceptron(dtype=getattr(torch, base), lora_dropout=0.5 if second_input else 0.0).train()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(getattr(torch, adapter))
    if second_input:
        for module in model.modules():
            if isinstance(module, nn.ModuleDict) and "default" in module and isinstance(module["default"], nn.Dropout):
                module["default"] = Squashed()
    compiled, stock_error, our_error = compile_eagerly(model), Counter(), Counter()
    for seed in range(24):
        randomise(model, seed)
        x = torch.randn((64, 24), generator=torch.Generator().manual_seed(seed)).to(getattr(torch, base))
        exact_model = in_double(model)
        exact = run(exact_model, lambda m=exact_model, x=x: m(x.double()))
        stock, ours = _in_region(model, model, x, autocast), _in_region(model, compiled, x, autocast)
        assert ours.output.dtype == stock.output.dtype
        assert {n: g.dtype for n, g in ours.gradients.items()} == {n: g.dtype for n, g in stock.gradients.items()}
        stock_error.update(squared_errors(stock, exact))
        our_error.update(squared_errors(ours, exact))
    assert_all_rewritten(model)
    ratios = {what: (our_error[what] / stock_error[what]) ** 0.5 for what in stock_error}
    assert all(ratio <= 1.05 for ratio in ratios.values()), ratios


class Squashed(nn.Module):
    """In place of dropout: the same for every dtype and draw."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x)


def test_autocast_entered_after_compiling() -> None:
    model = peft_perceptron()
    compiled, x = compile_eagerly(model), torch.randn(3, 24)
    assert compiled(x).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = compiled(x), model(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert_close(actual, expected, 2e-2)
    assert compiled(x).dtype == torch.float32


def test_fp64() -> None:
    model = peft_perceptron(dtype=torch.float64)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    compiled, x = compile_eagerly(model.train()), torch.randn(5, 24, dtype=torch.float64)
    assert_same_run(run(model, lambda: compiled(x)), run(model, lambda: model(x)), 1e-12)
    assert_all_rewritten(model)


def test_adapter_dtype_cast_by_peft() -> None:
    """PEFT's default on a bf16 base: fp32 adapters (``autocast_adapter_dtype``), whose input it casts."""
    model = peft_model(dtype=torch.bfloat16)
    assert {p.dtype for n, p in model.named_parameters() if "lora_A" in n} == {torch.float32}
    check_model(model, tolerance=3e-2)
