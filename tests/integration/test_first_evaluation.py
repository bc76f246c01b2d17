"""The first call of a model on bitsandbytes' 4-bit layers, which lay their weight out anew in the first evaluation on a CPU with
AVX512-BF16: by itself a compiled graph, made for the layout before, fails there. ``repack=True`` gives layers that property on any CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from integration_support import base_model, randomise, tokens
from quantized_support import bitsandbytes_layer, quantized, steps
from torch import nn

import dorafx
from dorafx.capture.installer import _install_one
from dorafx.capture.polyfills import OF_BITSANDBYTES, Polyfill

functional = pytest.importorskip("bitsandbytes.functional")

SLOW = pytest.mark.slow
ORDERS = {"eval": "ee", "train": "tt", "eval, train, eval": "ete", "train, eval, train": "tet"}
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def made(*args: Any, **kwargs: Any) -> Any:
    """A model of :func:`quantized`, whose magnitudes are not the norms."""
    model = quantized(*args, **kwargs)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def switched_on(model: Any, how: str, codegen: str) -> Any:
    if how == "backend":
        return torch.compile(
            model, backend="dorafx", fullgraph=True, options={"dorafx.codegen": codegen, "dorafx.strict": True}
        )
    return dorafx.optimize(model, codegen=codegen, scope=how, strict=True)


def assert_alike(found: list[torch.Tensor], wanted: list[torch.Tensor], tolerance: float) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        error = (one.float() - other.float()).abs().max() / other.float().abs().max()
        assert error < tolerance, error


def layouts(model: nn.Module) -> list[Any]:
    return [
        (p.data_ptr(), p.shape, p.quant_state.dtype, getattr(p.quant_state, "packing_format_for_cpu", False))
        for p in model.parameters()
        if hasattr(p, "quant_state")
    ]


def whole(kinds: set[str]) -> None:
    log = dorafx.rewrite_log()
    assert not log.misses
    assert {(r.pattern, r.reason) for r in log.rewrites} == {("linear", "")}
    assert {r.dtype for r in log.rewrites} == kinds


def check(model: Any, twin: Any, how: str, codegen: str, order: str, dtype: torch.dtype, tolerance: float) -> None:
    """``twin`` never lays a weight out anew: what stock PEFT computes where it computes DoRA."""
    before, state = layouts(model), {n: p.detach().clone() for n, p in model.named_parameters()}
    assert before
    call = switched_on(model, how, codegen)
    for mode in order:
        for m in (model, twin):
            m.train(mode == "t")
        x = torch.randn(5, 64, dtype=dtype)
        assert_alike(steps(model, call, x, mode == "t"), steps(twin, twin, x, mode == "t"), tolerance)
    assert layouts(model) == before
    for name, value in model.named_parameters():
        assert value.dtype == state[name].dtype and torch.equal(value, state[name])


DEFAULT = {
    ("nf4", torch.float32, "modules", "eager", "eval, train, eval"),
    ("nf4 double", torch.bfloat16, "model", "eager", "eval"),
    ("nf4", torch.float32, "backend", "eager", "train, eval, train"),
    ("nf4", torch.float32, "modules", "inductor", "eval"),
}


@pytest.mark.parametrize(
    ("kind", "dtype", "how", "codegen", "order"),
    [
        pytest.param(*case, marks=() if case in DEFAULT else SLOW)
        for case in (
            (kind, dtype, how, codegen, order)
            for kind in ("nf4", "nf4 double", "fp4")
            for dtype in TOLERANCE
            for how in ("modules", "model", "backend")
            for codegen in ("eager", "inductor")
            for order in ORDERS
            # Inductor takes long, and what it is given is the same.
            if codegen == "eager" or (kind != "fp4" and dtype != torch.float16 and len(order) < 6)
        )
    ],
)
def test_first_call(kind: str, dtype: torch.dtype, how: str, codegen: str, order: str) -> None:
    model, twin = made(kind, dtype, repack=True), made(kind, dtype)
    check(model, twin, how, codegen, ORDERS[order], dtype, TOLERANCE[dtype])
    whole({kind[:3]})


@pytest.mark.default_cases("bf16")
@pytest.mark.parametrize("compute", ["bf16", "fp16", "not set"])
def test_compute_dtype_of_its_own(compute: str) -> None:
    """A layer that computes in another dtype than it is called with, or finds its dtype in the first call."""
    models = made("nf4", repack=True), made("nf4")
    for model in models:
        for layer in model.modules():
            if type(layer).__module__.startswith("bitsandbytes"):
                layer.compute_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "not set": None}[compute]
                layer.compute_type_is_set = compute != "not set"
    x = torch.randn(5, 64)
    call = switched_on(models[0].eval(), "modules", "eager")
    models[1].eval()
    for _ in range(2):
        assert_alike(steps(models[0], call, x, False), steps(models[1], models[1], x, False), 1e-2)
    whole({"nf4"})


def test_several_adapters() -> None:
    def add(model: Any) -> Any:
        torch.manual_seed(3)
        config = peft.LoraConfig(r=6, use_dora=True, init_lora_weights=False, target_modules=["up", "down"])
        model.add_adapter("other", config)
        return model.eval()

    model, twin = add(made("nf4", repack=True)), add(made("nf4"))
    call = switched_on(model, "modules", "eager")
    x = torch.randn(5, 64)
    for name in ("default", "other", "default"):
        for m in (model, twin):
            m.set_adapter(name)
        assert_alike(steps(model, call, x, False), steps(twin, twin, x, False), 1e-4)
    for m in (model, twin):
        m.base_model.set_adapter(["default", "other"])
    assert_alike(steps(model, call, x, False), steps(twin, twin, x, False), 1e-4)
    assert {r.dtype for r in dorafx.rewrite_log().rewrites} == {"nf4"}


def llama(repack: bool, prepare: bool = False, every: bool = True) -> Any:
    """A Llama whose linears are 4-bit (``every`` one, or those with an adapter), with DoRA; equal for equal arguments."""
    targets = ["q_proj", "v_proj", "up_proj", "down_proj"]
    model: Any = base_model("llama", 2)
    for parent in list(model.model.layers.modules()):
        for name, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear) and (every or name in targets):
                setattr(parent, name, bitsandbytes_layer(linear, "nf4 double", torch.float32, repack))
    model.is_loaded_in_4bit = True
    if prepare:
        model = peft.prepare_model_for_kbit_training(model)
    torch.manual_seed(2)
    config = peft.LoraConfig(r=4, use_dora=True, task_type="CAUSAL_LM", target_modules=targets)
    return randomise(peft.get_peft_model(model, config))


@pytest.mark.default_cases("auto-eager")
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("how", ["auto", "modules", "model"])
def test_generation(how: str, codegen: str) -> None:
    """``generate`` is the first call."""
    # By modules, bitsandbytes itself repacks the layers without an adapter, and fails on sizes as small as these.
    every = how != "modules"
    model, twin = llama(True, every=every).eval(), llama(False, every=every).eval()
    dorafx.optimize(model, codegen=codegen, scope=how)
    wanted = twin.generate(input_ids=tokens(), max_new_tokens=5, do_sample=False)
    for _ in range(2):
        assert torch.equal(model.generate(input_ids=tokens(), max_new_tokens=5, do_sample=False), wanted)
    assert "nf4" in {r.dtype for r in dorafx.rewrite_log().rewrites}
    assert {r.pattern for r in dorafx.rewrite_log().rewrites} == {"linear"}


@pytest.mark.default_cases("eager")
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_prepared_for_training(codegen: str) -> None:
    """``prepare_model_for_kbit_training`` switches activation checkpointing on, and gradients of the embedding's output."""
    model, twin = llama(True, prepare=True).train(), llama(False, prepare=True).train()
    dorafx.optimize(model, codegen=codegen)
    for mode in (True, False, True):
        results = []
        for m in (model, twin):
            m.train(mode)
            m.zero_grad()
            out = m(input_ids=tokens(), labels=tokens())
            if mode:
                out.loss.backward()
            results.append([out.logits, *(p.grad for p in m.parameters() if p.grad is not None)])
        assert_alike(results[0], results[1], 1e-3)
    assert "nf4" in {r.dtype for r in dorafx.rewrite_log().rewrites}  # rows of 32 are no whole groups of 64
    assert {r.pattern for r in dorafx.rewrite_log().rewrites} == {"linear"}


@pytest.mark.skipif(not functional.has_avx512bf16(), reason="nothing here multiplies by weights that are laid out anew")
@pytest.mark.default_cases("modules", "backend")
@pytest.mark.parametrize("how", ["modules", "model", "backend"])
def test_laid_out_anew_by_an_eager_call(how: str) -> None:
    """Evaluation of what stock has laid out uses its kernel; training takes the weight's gradient, where stock's kernel has none."""
    model, twin = made("nf4", repack=True), made("nf4")
    x = torch.randn(5, 64)
    model.eval()
    steps(model, model, x, False)
    assert all(packed for *_, packed in layouts(model))
    stock = copy.deepcopy(model).train()
    with pytest.raises(RuntimeError, match="in-place"):  # its own bias, added to a result without a gradient
        steps(stock, stock, x, True)
    check(model, twin, how, "eager", "etet", torch.float32, 3e-2)
    assert {(r.pattern, r.dtype) for r in dorafx.rewrite_log().rewrites} == {("linear", "nf4-cpu")}


def test_the_polyfill_is_for_known_versions_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.nn.modules as home

    (polyfill,) = OF_BITSANDBYTES
    unknown = Polyfill(polyfill.module, polyfill.name, polyfill.make, {}, method=True, needed_for=polyfill.needed_for)
    assert "differs" in (_install_one(unknown) or "")
    monkeypatch.delattr(home, polyfill.needed_for)
    assert _install_one(unknown) == ""  # bitsandbytes before 0.49


def test_eager_bitsandbytes_is_left_as_it_was() -> None:
    model = made("nf4", repack=True).eval()
    forward: Callable[..., Any] = type(model.base_model.model.up.base_layer).forward
    assert forward.__module__ == "bitsandbytes.nn.modules"
    steps(model, model, torch.randn(5, 64), False)
    assert all(packed for *_, packed in layouts(model))
