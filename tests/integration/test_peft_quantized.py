"""QDoRA: stock PEFT DoRA on bases that bitsandbytes, torchao and HQQ have quantised."""

from __future__ import annotations

import importlib
from typing import Any

import peft
import pytest
import torch
from quantized_support import FORMATS, quantized, steps, torchao_config

import dorafx
import dorafx.backend
from dorafx.rewriter.lowering import _ALL_DECOMPOSITIONS
from dorafx.runtime import norm_store
from dorafx.versions import minor

functional = pytest.importorskip("bitsandbytes.functional")
pytest.importorskip("hqq")
quantize_ = pytest.importorskip("torchao.quantization").quantize_

EAGER = {"dorafx.codegen": "eager", "dorafx.strict": True}


def compiled(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()
    dorafx.rewrite_log().clear()
    return torch.compile(model, backend="dorafx", fullgraph=True, options={**EAGER, **options})


def stock(model: Any, kind: str) -> Any:
    """The model as it is; compiled without dorafx where Dynamo itself gives other gradients: 2.11 takes HQQ's own backward wrongly."""
    if kind.startswith("hqq") and minor(torch.__version__) < (2, 12):
        torch._dynamo.reset()
        return torch.compile(model, backend="eager", fullgraph=True)
    return model


@pytest.mark.default_cases("nf4 double", "hqq 4 bit", "torchao int8")
@pytest.mark.parametrize("kind", FORMATS)
def test_whole_and_equal_to_stock(kind: str) -> None:
    """One graph; every layer rewritten whole, its norm in the prologue by blocks; outputs and gradients are stock's."""
    model, x = quantized(kind), torch.randn(2, 5, 64)
    for train in (True, False):
        model.train(train)
        wanted = steps(model, stock(model, kind), x, train)
        call = compiled(model, **{"dorafx.verify": True})
        for _ in range(2):
            found = steps(model, call, x, train)
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        records = dorafx.rewrite_log().rewrites
        assert [r.pattern for r in records] == ["linear", "linear"]
        assert {(r.dtype, r.norm_placement, r.decision, r.reason) for r in records} == {
            (FORMATS[kind], "prologue", "", "")
        }


@pytest.mark.default_cases("torchao int8")
@pytest.mark.parametrize("kind", ["nf4 double", "torchao int8", "hqq 4 bit"])
def test_dropout(kind: str) -> None:
    """With a dropout stock multiplies by the dequantised weight itself; its norm still is that of the codes."""
    model, x = quantized(kind, lora_dropout=0.3).train(), torch.randn(5, 64)
    wanted = steps(model, stock(model, kind), x, True)
    found = steps(model, compiled(model), x, True)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    records = dorafx.rewrite_log().rewrites
    assert {(r.pattern, r.dtype) for r in records} == {("linear_dropout", FORMATS[kind])}
    without = quantized(kind).train()
    steps(without, compiled(without), x, True)
    for one, other in zip(records, dorafx.rewrite_log().rewrites, strict=True):
        assert (
            other.dense_bytes_avoided - one.dense_bytes_avoided == 4 * 64 * 128
        )  # of the weight that the product reads


def test_bitsandbytes_8_bit() -> None:
    """Stock runs one forward on a CPU, and then has lost its scales; through dorafx the layer goes on."""
    x = torch.randn(5, 64)
    for train in (True, False):
        stock = quantized("bnb 8 bit").train(train)
        wanted = steps(stock, stock, x, train)
        with pytest.raises(AttributeError, match="NoneType"):
            stock(x)
        model = quantized("bnb 8 bit").train(train)
        call = compiled(model)
        for _ in range(3):
            found = steps(model, call, x, train)
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        records = dorafx.rewrite_log().rewrites
        assert {(r.pattern, r.dtype, r.norm_placement) for r in records} == {("linear", "bnb8", "prologue")}


@pytest.mark.parametrize(
    "how", ["compile", *(pytest.param(h, marks=pytest.mark.slow) for h in ("optimize", "dynamic"))]
)
def test_bitsandbytes_8_bit_with_outliers(how: str) -> None:
    """As transformers loads it: in half precision and with a threshold, the base layer breaks the graph, and what stands
    around each of them is one code, whose second shape makes sizes symbols."""
    model, dtype = quantized("bnb 8 bit outliers", torch.float16).eval(), torch.float16
    call = model
    if how == "optimize":
        dorafx.optimize(model, codegen="eager")
    else:
        call = torch.compile(model, backend="dorafx", dynamic=how == "dynamic" or None, options=EAGER)
    for tokens in (5, 5):
        x = torch.randn(tokens, 64, dtype=dtype)
        x[:, 3] = 20  # an outlier
        stock = quantized("bnb 8 bit outliers", dtype).eval()
        wanted = steps(stock, stock, x, False)
        torch.testing.assert_close(steps(model, call, x, False), wanted, rtol=2e-3, atol=2e-3)
    log = dorafx.rewrite_log()
    assert {(r.d_out, r.d_in) for r in log.rewrites} == {(128, 64), (64, 128)} and not log.misses
    assert {(r.pattern, r.dtype, r.norm_placement) for r in log.rewrites} == {("linear", "bnb8", "prologue")}
    assert log.norms.reused or how == "dynamic"  # a number of tokens that is a symbol may be a large one


def test_repacked_weights() -> None:
    """In evaluation on a CPU with AVX512-BF16 bitsandbytes lays weights out anew, and dequantises them in the old order."""
    if not functional.has_avx512bf16():
        pytest.skip("no AVX512-BF16: nothing multiplies by weights that are laid out anew")
    model, x = quantized("nf4", torch.bfloat16).eval(), torch.randn(5, 64, dtype=torch.bfloat16)
    right = steps(model, model, x, False)[0]
    repacked = quantized("nf4", torch.bfloat16, repack=True).eval()
    scrambled = steps(repacked, repacked, x, False)[0]
    assert repacked.base_model.model.up.base_layer.weight.quant_state.packing_format_for_cpu
    call = compiled(repacked)
    for _ in range(2):
        found = steps(repacked, call, x, False)[0]
        assert (found - right).abs().mean() < (scrambled - right).abs().mean() / 4
    assert {(r.pattern, r.dtype) for r in dorafx.rewrite_log().rewrites} == {("linear", "nf4-cpu")}


@pytest.mark.default_cases("torchao int8-eager")
@pytest.mark.parametrize(
    ("kind", "codegen"),
    [
        *(pytest.param(k, "inductor", marks=pytest.mark.slow) for k in ("nf4 double", "torchao int8")),
        ("torchao int8", "eager"),
        ("hqq 4 bit", "eager"),
    ],
)
def test_as_many_graphs_as_plain_lora(kind: str, codegen: str) -> None:
    counts = []
    for use_dora in (False, True):
        torch._dynamo.reset()
        model, x = quantized(kind, use_dora=use_dora), torch.randn(5, 64)
        graphs: list[Any] = []

        def backend(gm: Any, inputs: Any, graphs: list[Any] = graphs) -> Any:
            graphs.append(gm)
            return dorafx.backend.dorafx(gm, inputs, options={"dorafx.codegen": codegen})

        call = torch.compile(model, backend=backend)
        for train in (True, False):
            wanted = steps(model.train(train), model, x, train)
            for one, other in zip(steps(model, call, x, train), wanted, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        counts.append(len(graphs))
    assert counts == [2, 2]


def codes_and_scales(model: Any, kind: str) -> tuple[Any, Any, Any]:
    """Of the first layer: its codes, its scales, and who holds the scales under what name."""
    base = model.base_model.model.up.base_layer
    if kind == "nf4":
        return base.weight.data, base.weight.quant_state.absmax, (base.weight.quant_state, "absmax")
    if kind.startswith("hqq"):
        return base.W_q, base.meta["scale"], (base.meta, "scale")
    if kind.startswith("bnb"):
        return base.state.CB, base.state.SCB, (base.state, "SCB")
    return base.weight.qdata, base.weight.scale, (base.weight, "scale")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("nf4", torch.float32),
        ("torchao int8", torch.float32),
        pytest.param("hqq 4 bit", torch.float32, marks=pytest.mark.slow),
        ("hqq 4 bit", torch.bfloat16),
        ("bnb 8 bit", torch.float32),
    ],
)
def test_norms_are_reused_and_never_stale(kind: str, dtype: torch.dtype) -> None:
    """Decoding reuses a norm; codes, scales and factors that change, however they change, are seen. The twin runs as stock,
    whose forward on a CPU makes parameters of bitsandbytes anew; that of 8 bits, which stock runs once only, computes every norm."""
    model, twin = (quantized(kind, dtype, block={"bias": False}).eval() for _ in range(2))
    call, truth, x = compiled(model), twin, torch.randn(1, 64, dtype=dtype)
    if kind.startswith("bnb"):
        truth = torch.compile(twin, backend="dorafx", options={**EAGER, "dorafx.norm_reuse": "never"})
        steps(model, call, x, False)  # makes the codes that all further forwards read
        steps(twin, truth, x, False)
        norm_store().clear()
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2

    def check(reused: int) -> None:
        before = dorafx.rewrite_log().norms.reused
        wanted = steps(twin, truth, x, False)
        torch.testing.assert_close(steps(model, call, x, False), wanted, rtol=tolerance, atol=tolerance / 10)
        # HQQ quantises in inference mode, whose tensors count no versions, and a zero point that needs no cast stays one of
        # these: what cannot be watched is compared by content.
        assert dorafx.rewrite_log().norms.reused - before == reused

    def change(write: Any) -> None:
        with torch.no_grad():
            for each in (model, twin):
                write(each)
        check(1)
        check(2)

    def replace(each: Any) -> None:
        _, scales, (holder, name) = codes_and_scales(each, kind)
        if isinstance(holder, dict):
            holder[name] = scales * 0.5
        else:
            setattr(holder, name, scales * 0.5)

    check(0)
    check(2)
    change(lambda each: codes_and_scales(each, kind)[1].mul_(1.25))
    change(lambda each: codes_and_scales(each, kind)[0].copy_(codes_and_scales(each, kind)[0].flip(0)))
    change(lambda each: each.base_model.model.up.lora_A["default"].weight.data.mul_(2))
    change(replace)


def test_a_model_that_decoded_can_be_moved() -> None:
    """torchao's parameters are swapped when they are moved, which torch refuses of tensors that somebody refers to."""
    model, x = quantized("torchao int8").eval(), torch.randn(1, 64)
    call = compiled(model)
    for _ in range(3):
        steps(model, call, x, False)
    assert dorafx.rewrite_log().norms.reused
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    model.to(torch.bfloat16)
    found, wanted = (steps(model, f, x.bfloat16(), False)[0] for f in (call, model))
    torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)


def operators(gm: Any) -> set[str]:
    return {str(n.target) for n in gm.graph.nodes if "dorafx" in str(n.target)}


@pytest.mark.parametrize(
    "kind", ["nf4", *(pytest.param(k, marks=pytest.mark.slow) for k in ("torchao int8", "bnb 8 bit"))]
)
def test_portable_graphs_hold_no_operator_of_ours(kind: str) -> None:
    model, twin, x = quantized(kind).eval(), quantized(kind).eval(), torch.randn(1, 64)

    def rewritten(gm: Any, _: Any) -> Any:
        before = str(gm.graph)
        assert "dorafx.row_norm_quantized.default" in operators(dorafx.rewrite(gm))
        new = dorafx.rewrite(gm, portable=True)
        assert str(gm.graph) == before and not operators(new)
        return new.forward

    call = torch.compile(model, backend=rewritten, fullgraph=True)
    torch.testing.assert_close(steps(model, call, x, False), steps(twin, twin, x, False), rtol=1e-4, atol=1e-5)
    assert {(r.pattern, r.d_in) for r in dorafx.rewrite_log().rewrites} == {("linear", 64), ("linear", 128)}


def test_portable_programs_of_hqq(monkeypatch: pytest.MonkeyPatch) -> None:
    """A polyfill stands for its dequantisation by an operator of dorafx's, which is written out as well."""
    model, x = quantized("hqq 4 bit").eval(), torch.randn(5, 64)
    with torch.no_grad():
        wanted = model(x)
        exported = torch.export.export(model, (x,), strict=True)
        program = dorafx.rewrite(exported, portable=True)
        assert operators(exported.graph_module) and not operators(program.graph_module)
        for call in (program.module(), program.run_decompositions().module()):
            torch.testing.assert_close(call(x), wanted, rtol=1e-4, atol=1e-5)
        monkeypatch.delitem(_ALL_DECOMPOSITIONS, torch.ops.dorafx.dequantize.default)
        with pytest.raises(
            dorafx.DorafxError, match=r"holds dorafx\.dequantize\.default, which could not be written out"
        ):
            dorafx.rewrite(exported, portable=True)


def test_training_and_decoding_in_turns() -> None:
    """The fused optimizer moves no version counter."""
    model, x = quantized("nf4"), torch.randn(1, 64)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, fused=True)
    call = compiled(model)
    for _ in range(2):
        model.train()
        loss = call(x).sum()
        loss.backward()
        optimizer.step()
        model.eval()
        torch.testing.assert_close(steps(model, call, x, False), steps(model, model, x, False), rtol=1e-4, atol=1e-5)


def test_a_format_whose_rows_are_not_whole_groups_is_formed_with_a_reason() -> None:
    model, x = quantized("nf4", block={"d_in": 96}).eval(), torch.randn(5, 96)
    wanted = steps(model, model, x, False)
    torch.testing.assert_close(steps(model, compiled(model), x, False), wanted, rtol=1e-4, atol=1e-5)
    up, down = dorafx.rewrite_log().rewrites
    assert up.dtype == "float32"
    assert (up.decision, up.norm_placement) == (
        "the dequantised weight is formed: its rows are not whole groups",
        "prologue",
    )
    assert (down.dtype, down.decision) == ("nf4", "")


@pytest.mark.parametrize("train", [True, False])
def test_codes_that_are_unpacked_into_empty_memory(train: bool) -> None:
    """HQQ with 3 bits (ten codes in 32 bits) dequantises for the product and for the norm, each time into memory that it fills by
    rows: one weight, which is formed."""
    model, x = quantized("hqq 3 bit").train(train), torch.randn(5, 64)
    wanted = steps(model, stock(model, "hqq 3 bit"), x, train)
    for one, other in zip(steps(model, compiled(model), x, train), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert {(r.pattern, r.dtype, r.reason) for r in dorafx.rewrite_log().rewrites} == {("linear", "float32", "")}


@pytest.mark.parametrize(
    ("kind", "pattern", "reason"),
    [
        ("torchao int8, one scale", "linear", "its scales are not those of groups along a row (block size (128, 64))"),
        ("torchao fp8", "norm_only", "this dequantisation of Float8Tensor is not known"),
    ],
)
def test_torchao_weights_of_other_kinds_are_formed_with_a_reason(kind: str, pattern: str, reason: str) -> None:
    model, x = quantized(kind).train(), torch.randn(5, 64)
    wanted = steps(model, model, x, True)
    for one, other in zip(steps(model, compiled(model), x, True), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    records = dorafx.rewrite_log().rewrites
    assert [(r.pattern, r.dtype) for r in records] == [(pattern, "float32")] * 2
    assert records[0].decision == f"the dequantised weight is formed: {reason}"


@pytest.mark.parametrize("kind", ["torchao int8", "torchao intx", "torchao int8, one scale"])
def test_a_merged_weight_of_torchao(kind: str) -> None:
    linear = torch.nn.Linear(64, 128, bias=False)
    quantize_(linear, torchao_config(kind))
    weight, left, right, magnitude = linear.weight, torch.randn(128, 4), torch.randn(4, 64), torch.rand(128, 1) + 0.5

    def merged(x: torch.Tensor) -> torch.Tensor:
        dense = weight.dequantize() + left @ right
        return torch.nn.functional.linear(x, magnitude * dense / dense.norm(dim=1, keepdim=True))

    with torch.no_grad():
        x = torch.randn(5, 64)
        torch.testing.assert_close(compiled(merged)(x), merged(x), rtol=1e-4, atol=1e-5)
    assert [r.pattern for r in dorafx.rewrite_log().rewrites] == ["linear"]


@pytest.mark.parametrize("kind", ["torchao int8, activations too", "torchao intx, activations too"])
def test_a_product_that_quantises_activations_is_not_that_of_the_dequantised_weight(kind: str) -> None:
    """They differ by a per cent, so that neither may stand for the other, nor be split into sums."""
    linear = torch.nn.Linear(64, 128, bias=False)
    quantize_(linear, torchao_config(kind))
    weight, a, b, magnitude = linear.weight, torch.randn(4, 64), torch.randn(128, 4), torch.rand(128) + 0.5
    product = torch.nn.functional.linear

    def base_first(x: torch.Tensor) -> torch.Tensor:
        dense = weight.dequantize()
        g = magnitude / (dense + b @ a).norm(dim=1)
        return product(x, weight) + (g - 1) * product(x, dense) + g * product(product(x, a), b)

    def dense_first(x: torch.Tensor) -> torch.Tensor:
        dense = weight.dequantize()
        g = magnitude / (dense + b @ a).norm(dim=1)
        return product(x, dense) + (g - 1) * product(x, weight) + g * product(product(x, a), b)

    def of_a_sum(x: torch.Tensor) -> torch.Tensor:
        g = magnitude / (weight.dequantize() + b @ a).norm(dim=1)
        return g * (product(x + x.flip(0), weight) + product(product(x, a), b))

    x = torch.randn(50, 64)
    assert (product(x, weight) - product(x, weight.dequantize())).abs().max() > 3e-3
    with torch.no_grad():
        for program in (base_first, dense_first, of_a_sum):
            torch.testing.assert_close(compiled(program)(x), program(x), rtol=1e-4, atol=1e-5)
            assert {r.dtype for r in dorafx.rewrite_log().rewrites} == {"affine"}


@pytest.mark.parametrize("kind", ["gptq.GPTQLoraLinear", "awq.AwqLoraLinear", "eetq.EetqLoraLinear"])
def test_what_peft_refuses_stays_refused(kind: str) -> None:
    module, name = kind.split(".")
    layer = getattr(importlib.import_module(f"peft.tuners.lora.{module}"), name, None)
    if layer is None:
        pytest.skip("PEFT defines this layer only where its library is installed")
    importlib.import_module("dorafx.backend")  # with the polyfills in place
    with pytest.raises(ValueError, match=f"{name} does not support DoRA yet"):
        layer(torch.nn.Linear(8, 8), "default", config=peft.LoraConfig(use_dora=True))
