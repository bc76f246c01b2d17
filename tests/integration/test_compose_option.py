"""How compositions are computed: by kernels on request, and in place where nobody needs what is overwritten."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integration_support import assert_close, assert_same_run, call, check_model, peft_perceptron, run
from torch import fx

from dorafx import codegen, rewrite_log
from dorafx.ops import dispatch


@pytest.fixture
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as for a CUDA device; the operators of the kernels then compute on the CPU, by ATen calls."""
    monkeypatch.setattr(dispatch, "runs_kernels", lambda device, *dtypes: torch.float64 not in dtypes)
    monkeypatch.setattr("dorafx.plan.kernel.runs_kernels", lambda device, *dtypes: torch.float64 not in dtypes)
    monkeypatch.setattr(dispatch, "_served", lambda *a: False)
    monkeypatch.setattr(dispatch, "_served_linear", lambda *a: False)


def graph_of(monkeypatch: pytest.MonkeyPatch) -> list[fx.GraphModule]:
    """The graphs that codegen receives from here on."""
    graphs: list[fx.GraphModule] = []
    compile_graph = codegen.compile_graph
    monkeypatch.setattr(codegen, "compile_graph", lambda gm, *a: graphs.append(gm) or compile_graph(gm, *a))
    return graphs


def operators(gm: fx.GraphModule) -> list[str]:
    return [
        str(n.target) for n in gm.graph.nodes if str(n.target).startswith("dorafx.") and "norm" not in str(n.target)
    ]


@pytest.mark.parametrize("compose", ["triton", "triton_linear"])
def test_on_a_cpu_the_kernels_are_left_out_and_the_log_says_so(compose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = graph_of(monkeypatch)
    check_model(peft_perceptron(), **{"dorafx.compose": compose})
    assert operators(graphs[0]) == ["dorafx.compose.default"] * 2
    assert all("triton" not in n.args for n in graphs[0].graph.nodes)
    assert {r.decision for r in rewrite_log().rewrites} == {"composed without a kernel: the output is float32 on cpu"}


@pytest.mark.usefixtures("kernels_everywhere")
@pytest.mark.parametrize(
    ("compose", "dropout", "operator", "said"),
    [
        ("auto", 0.0, "dorafx.compose.default", ""),  # the layer in one kernel is for those who ask for it
        ("triton", 0.0, "dorafx.compose.default", "composed by a Triton kernel"),
        ("triton", 0.3, "dorafx.compose_delta.default", "composed by a Triton kernel"),
        ("triton_linear", 0.0, "dorafx.dora_linear.default", "the whole layer is one Triton kernel"),
        ("triton_linear", 0.3, "dorafx.compose_delta.default", "its form is linear_dropout"),
    ],
)
@pytest.mark.parametrize("name", ["eager", pytest.param("aot_eager", marks=pytest.mark.slow)])
def test_the_plan(
    compose: str, dropout: float, operator: str, said: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = graph_of(monkeypatch)
    model = peft_perceptron(lora_dropout=dropout).train()
    check_model(model, **{"dorafx.compose": compose, "dorafx.codegen": name})
    assert operators(graphs[0]) == [operator] * 2
    assert all(said in r.decision for r in rewrite_log().rewrites)


@pytest.mark.usefixtures("kernels_everywhere")
def test_the_linear_is_left_where_its_base_product_is_read() -> None:
    """A hook-like second reader of ``x·Wᵀ``: the product is made anyway, so the layer is not one kernel."""
    torch.manual_seed(0)
    W, A, B, m = (torch.randn(s) for s in ((6, 5), (2, 5), (6, 2), (6,)))

    def layer(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        base = torch.nn.functional.linear(x, W)
        g = m / torch.linalg.norm(W + 0.5 * (B @ A), dim=1)
        return g * (base + 0.5 * torch.nn.functional.linear(torch.nn.functional.linear(x, A), B)), base

    x = torch.randn(3, 5)
    options = {"dorafx.codegen": "eager", "dorafx.compose": "triton_linear", "dorafx.strict": True}
    for got, wanted in zip(torch.compile(layer, backend="dorafx", options=options)(x), layer(x)):
        torch.testing.assert_close(got, wanted)
    assert "somebody else reads the base product" in rewrite_log().rewrites[0].decision


@pytest.mark.slow
@pytest.mark.usefixtures("kernels_everywhere")
@pytest.mark.parametrize("compose", ["triton", "triton_linear"])
@pytest.mark.parametrize("inference", [False, True])
def test_inductor_calls_the_kernels_operators(compose: str, inference: bool) -> None:
    """The compiled code holds the opaque calls, forward and backward; values and gradients agree."""
    from torch._inductor.utils import run_fw_bw_and_get_code

    model = peft_perceptron()
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.strict": True, "dorafx.compose": compose})
    forward = "dora_linear_forward" if compose == "triton_linear" else "compose_forward"
    if inference:
        with torch.inference_mode():
            assert_close(call(compiled, model), call(model, model), 1e-5)
        return
    expected = run(model, lambda: call(model, model))
    _, code = run_fw_bw_and_get_code(lambda: call(compiled, model))
    assert code[0].count(f"dorafx.{forward}") >= 2
    assert code[1].count("dorafx.compose_backward") >= 2
    assert_same_run(run(model, lambda: call(compiled, model)), expected)


# -- in place ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("compose", ["accumulated", "epilogue"])
def test_without_gradients_the_product_is_overwritten(
    compose: str, guard: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = graph_of(monkeypatch)
    model = peft_perceptron()
    x = torch.randn(3, 5, 24)
    before, expected = x.clone(), model(x)
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.compose": compose})
    with guard():
        assert_close(compiled(x), expected.detach(), 1e-5)
    assert operators(graphs[0]) == ["dorafx.compose_.default"] * 2
    assert torch.equal(x, before)
    assert_same_run(run(model, lambda: call(compiled, model)), run(model, lambda: call(model, model)))
    assert operators(graphs[1]) == ["dorafx.compose.default"] * 2


def test_what_others_read_is_not_overwritten(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base product that is returned, and one that is an input of the graph."""
    graphs = graph_of(monkeypatch)
    torch.manual_seed(0)
    W, A, B, m = (torch.randn(s) for s in ((6, 5), (2, 5), (6, 2), (6,)))

    def layer(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        base = torch.nn.functional.linear(x, W)
        g = m / torch.linalg.norm(W + 0.5 * (B @ A), dim=1)
        return g * (base + 0.5 * torch.nn.functional.linear(torch.nn.functional.linear(x, A), B)), base

    def toggled(x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            return layer(x)[0]

    x = torch.randn(3, 5)
    with torch.no_grad():
        for program in (layer, toggled):
            options = {"dorafx.codegen": "eager", "dorafx.compose": "epilogue"}
            got = torch.compile(program, backend="dorafx", options=options)(x)
            torch.testing.assert_close(got, program(x))
    assert len(graphs) == 2
    assert not any("compose_." in name for gm in graphs for name in operators(gm))


def test_the_operators_refuse_to_overwrite_what_a_gradient_needs() -> None:
    base, g = torch.randn(3, 4), torch.randn(4).requires_grad_()
    for call_in_place in (
        lambda: torch.ops.dorafx.compose_(base, None, g, None, 1.0),
        lambda: torch.ops.dorafx.compose_delta_(base, base.clone(), base.clone(), g, 1.0),
    ):
        with pytest.raises(RuntimeError, match="overwrites what its gradient needs"):
            call_in_place()


def test_in_place_values() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        base, lora, result = (torch.randn(3, 4).to(dtype) for _ in range(3))
        g, bias = torch.rand(4) + 0.5, torch.randn(4).to(dtype)
        g = g.double() if dtype == torch.float64 else g
        for low, offset in ((lora, bias), (None, bias), (lora, None)):
            written = base.clone()
            torch.ops.dorafx.compose_(written, low, g, offset, 1.3)
            torch.testing.assert_close(written, torch.ops.dorafx.compose(base, low, g, offset, 1.3, dtype))
        written = result.clone()
        torch.ops.dorafx.compose_delta_(written, base, lora, g, 1.3)
        assert torch.equal(written, torch.ops.dorafx.compose_delta(result, base, lora, g, 1.3, dtype))


@pytest.mark.parametrize("grad", [True, False])
def test_functionalize(grad: bool) -> None:
    """What is written over in a graph that runs as it stands is taken apart by ``torch.func.functionalize``, as an operator of ATen is."""
    W, A, B, m = torch.randn(4, 5), torch.randn(2, 5), torch.randn(4, 2).requires_grad_(), torch.rand(4)

    def layer(x: torch.Tensor) -> torch.Tensor:
        low = torch.nn.functional.linear(torch.nn.functional.linear(x, A), B)
        return m / (W + 0.5 * (B @ A)).norm(dim=1) * (torch.nn.functional.linear(x, W) + 0.5 * low)

    x = torch.randn(3, 5)
    call = torch.compile(layer, backend="dorafx", options={"dorafx.codegen": "eager"})
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(torch.func.functionalize(call)(x), layer(x))
    assert rewrite_log().rewrites


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_writing_operators_are_compiled(backend: str) -> None:
    base, lora, g, bias = torch.randn(3, 4), torch.randn(3, 4), torch.rand(4), torch.randn(4)

    def both(base: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        torch.ops.dorafx.compose_(base, lora, g, bias, 1.3)
        torch.ops.dorafx.compose_delta_(result, base, lora, g, 1.3)
        return base + result

    wanted, got = ([base.clone(), lora.clone()] for _ in range(2))
    torch.testing.assert_close(torch.compile(both, backend=backend)(*got), both(*wanted))
    torch.testing.assert_close(got, wanted)
