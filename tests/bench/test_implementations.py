"""What dorafx is compared with computes the same thing: norms, compositions, layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dorafx
from dorafx.bench import norms
from dorafx.bench.clock import Clock
from dorafx.bench.implementations import Task, build_layer, build_model
from dorafx.bench.models import Size
from dorafx.bench.suites.compose import FORMS
from dorafx.ops import reference


def task(name: str, dtype: torch.dtype = torch.float64, **parameters: int) -> Task:
    return Task(name, parameters, Clock("cpu", 0, least=1), dtype)


def operands(d_out: int, d_in: int, rank: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(*s, dtype=torch.float64) for s in ((d_out, d_in), (d_out, rank), (rank, d_in)))


@pytest.mark.parametrize("name", list(norms.NORMS))
def test_norms(name: str) -> None:
    weight, left, right = operands(13, 300, 5)
    torch.testing.assert_close(
        norms.NORMS[name](weight, left, right, 0.7), reference.row_norm(weight, left, right, 0.7)
    )


def test_the_chunks_cover_every_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_CHUNK_BYTES", 1)
    weight, left, right = operands(13, 300, 5)  # chunks of 64, the last one of 44
    torch.testing.assert_close(norms.chunked(weight, left, right, 0.7), reference.row_norm(weight, left, right, 0.7))


def test_the_identity_trick_is_what_peft_computes() -> None:
    from peft.tuners.lora.dora import DoraLinearLayer

    weight, left, right = operands(6, 9, 2)
    a, b = torch.nn.Linear(9, 2, bias=False), torch.nn.Linear(2, 6, bias=False)
    a.weight.data, b.weight.data = right, left
    stock = DoraLinearLayer(fan_in_fan_out=False)
    delta = stock.get_lora_weight(lora_A=a, lora_B=b).detach()
    expected = stock.get_weight_norm(weight, delta, 0.7)
    torch.testing.assert_close(norms.identity(weight, left, right, 0.7), expected)


def test_compositions_agree() -> None:
    base, lora = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    m, n = (torch.rand(6, dtype=torch.float64) + 1 for _ in range(2))
    stock = FORMS["peft"](base, lora, m, n)
    torch.testing.assert_close(FORMS["dorafx"](base, lora, m, n), stock)
    torch.testing.assert_close(FORMS["lora"](base, lora, m, m), FORMS["peft"](base, lora, m, m))


@pytest.mark.parametrize("name", ["dense", "chunked"])
def test_layers_with_another_norm_are_stock_layers(name: str) -> None:
    parameters = {"d_out": 12, "d_in": 10, "rank": 3}
    stock, other = build_layer(task("peft", **parameters)), build_layer(task(name, **parameters))
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    expected, actual = stock(x), other(x)
    assert other(x).shape == (2, 5, 12)
    torch.testing.assert_close(actual, expected)
    expected.sin().sum().backward()
    actual.sin().sum().backward()
    gradients = {key: p.grad for key, p in stock.named_parameters() if p.requires_grad}
    assert len(gradients) == 3  # A, B and the magnitude
    for key, p in other.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, gradients[key])


def test_merged_layer_is_a_plain_linear_with_the_same_output() -> None:
    parameters = {"d_out": 12, "d_in": 10, "rank": 3}
    x = torch.randn(2, 10, dtype=torch.float64)
    merged = build_layer(task("merged", **parameters))
    assert type(merged) is torch.nn.Linear
    torch.testing.assert_close(merged(x), build_layer(task("peft", **parameters))(x))


def test_models_agree_and_lora_does_not() -> None:
    size, ids = Size(64, 1, 4, 8, intermediate=96, heads=2, kv_heads=1, head_dim=16), torch.arange(8)[None]
    made = {name: build_model(task(name), size).eval() for name in ("peft", "dense", "chunked", "merged", "lora")}
    with torch.no_grad():
        logits = {name: model(input_ids=ids).logits for name, model in made.items()}
    assert logits["peft"].dtype == torch.float64
    assert not [n for n, _ in made["merged"].named_modules() if "lora" in n]
    for name in ("dense", "chunked", "merged"):
        torch.testing.assert_close(logits[name], logits["peft"], msg=name)
    assert (logits["lora"] - logits["peft"]).abs().max() > 1e-3


def test_every_adapter_has_the_models_dtype() -> None:
    model = build_model(task("peft", torch.bfloat16), Size(64, 1, 4, 8))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    layer = build_layer(task("peft", torch.bfloat16, d_out=12, d_in=10, rank=3))
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


def test_under_autocast_adapters_are_fp32_and_products_are_not() -> None:
    """PEFT's default, ``autocast_adapter_dtype``: a base in bf16, adapters in fp32."""
    asked = Task("peft", {}, Clock("cpu", 0), torch.bfloat16, autocast=True)
    model = build_model(asked, Size(64, 1, 4, 8))
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if "lora_" in name} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if "lora_" not in name} == {torch.bfloat16}
    seen: list[torch.dtype] = []
    layer = next(m for name, m in model.named_modules() if name.endswith("lora_A.default"))
    layer.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    loss = asked.compiled(model)(input_ids=torch.arange(8)[None], labels=torch.arange(8)[None]).loss
    loss.backward()
    assert torch.bfloat16 in seen  # the identity that PEFT sends through may be of another dtype
    assert not torch.is_autocast_enabled("cpu")


def test_a_checkpointed_model_is_one_graph() -> None:
    asked = Task("peft", {}, Clock("cpu", 0), torch.float32, checkpointing=True)
    model = build_model(asked, Size(64, 1, 4, 8)).train()
    ids = torch.arange(8)[None]
    graphs: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return gm.forward

    dorafx.optimize(torch.nn.Linear(2, 2))  # installs the polyfills
    torch.compile(model, backend=keep, fullgraph=True, dynamic=False)(input_ids=ids, labels=ids).loss.backward()
    (graph,) = graphs
    assert "tag_activation_checkpoint" in str(graph.graph)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_against_fp64(dtype: torch.dtype) -> None:
    weight, left, right = (t.to(dtype) for t in operands(1030, 40, 3))
    exact = torch.linalg.norm(weight.double() + 0.7 * (left.double() @ right.double()), dim=1)
    assert norms.largest_error(exact, weight, left, right, 0.7) < 1e-15
    exact[1029] *= 1.25
    assert norms.largest_error(exact, weight, left, right, 0.7) == pytest.approx(0.25)
    found = norms.product(weight, left, right, 0.7)
    torch.testing.assert_close(found.double(), weight.double() @ right.double().T, rtol=0.02, atol=0.1)


@pytest.mark.parametrize("compose", ["auto", "epilogue"])
def test_the_way_of_composing_reaches_the_compiler(compose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda call, **options: given.append(options))
    for name in ("dorafx", "lora"):
        Task(name, {}, Clock("cpu", 0, least=1), torch.float32, codegen="eager", compose=compose).compiled(lambda: None)
    assert given[0]["options"] == {"dorafx.codegen": "eager"} | (
        {"dorafx.compose": compose} if compose != "auto" else {}
    )
    assert given[1]["options"] is None
    for mode in ("reduce-overhead", "max-autotune"):  # with options, whose place a mode would take
        Task("dorafx", {}, Clock("cpu", 0, least=1), torch.float32, mode=mode, compose=compose).compiled(lambda: None)
        if compose == "auto":
            assert (given[-1]["mode"], given[-1]["options"]) == (mode, None)
        else:
            asked = {**torch._inductor.list_mode_options(mode), "dorafx.compose": compose}
            assert (given[-1]["mode"], given[-1]["options"]) == (None, asked)


def test_options_reach_layers_that_are_compiled_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``generate`` and ``--scope auto`` have them."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(dorafx, "optimize", lambda model, **options: given.update(options))
    Task("dorafx", {}, Clock("cpu", 0, least=1), torch.float32, codegen="eager", compose="epilogue").compile_in_place(
        torch.nn.Linear(2, 2)
    )
    assert given == {"scope": "auto", "codegen": "eager", "compose": "epilogue", "dynamic": None, "mode": None}
