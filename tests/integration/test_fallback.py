"""When dorafx fails, the user's program does not: the original graph is compiled, the log says why, one warning."""

from __future__ import annotations

import warnings
from dataclasses import fields
from typing import Any

import pytest
import torch
from integration_support import (
    assert_all_rewritten,
    assert_close,
    assert_same_run,
    captured_graph,
    compile_eagerly,
    dora_sites,
    lora_config,
    peft_model,
    peft_perceptron,
    randomise,
    run,
    tokens,
)
from peft import get_peft_model
from torch import fx, nn
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import fresh_cache

import dorafx.match.matcher
import dorafx.pipeline
from dorafx import DorafxWarning, RewriteMissError, codegen, rewrite_log
from dorafx._compat.inductor import with_way_back
from dorafx.lift import Lifter
from dorafx.options import Options

STAGES = {
    "lift": (dorafx.match.matcher, "Lifter"),
    "match": (dorafx.pipeline, "match_graph"),
    "plan": (dorafx.pipeline, "make_plan"),
    "rewrite": (dorafx.pipeline, "apply_plan"),
}


class InjectedError(Exception):
    """What no stage raises by itself."""


def _break(monkeypatch: pytest.MonkeyPatch, stage: str, message: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise InjectedError(message)

    module, name = STAGES[stage]
    monkeypatch.setattr(module, name, fail)


def _compile(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="dorafx", fullgraph=True, options={"dorafx.codegen": "eager", **options})


def _dorafx_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if issubclass(w.category, DorafxWarning)]


# -- internal failures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_failing_stage_leaves_the_graph_as_it_was(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_perceptron(lora_dropout=0.2).train()
    x = torch.randn(3, 24)
    expected = run(model, lambda: model(x))
    compiled = _compile(model)
    _break(monkeypatch, stage, f"no {stage} today")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same_run(run(model, lambda: compiled(x)), expected, 1e-6)
        torch._dynamo.reset()
        assert_same_run(run(model, lambda: compiled(x)), expected, 1e-6)
    (message,) = _dorafx_warnings(caught)
    assert f"no {stage} today" in message
    assert not rewrite_log().rewrites
    records = rewrite_log().misses
    assert len(records) == 2, (
        "each of the two compilations of the graph is in the log, though the warning is not repeated"
    )
    for record in records:
        assert "InjectedError" in record.reason
        assert f"no {stage} today" in record.reason


def test_failing_stage_hands_the_original_graph_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[fx.GraphModule] = []

    def compile_graph(gm: fx.GraphModule, inputs: Any, options: Options, *rest: Any) -> Any:
        received.append(gm)
        assert options.codegen == "inductor"
        return gm.forward

    monkeypatch.setattr(codegen, "compile_graph", compile_graph)
    _break(monkeypatch, "rewrite", "original graph, please")
    model, x = peft_perceptron(), torch.randn(3, 24)
    with pytest.warns(DorafxWarning, match="original graph, please"):
        assert_close(torch.compile(model, backend="dorafx", fullgraph=True)(x), model(x), 1e-6)
    (graph,) = received
    assert not [n for n in graph.graph.nodes if "dorafx" in str(n.target)]


def _refuse_dorafx(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A codegen that raises for every graph in which an operator of dorafx's is."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise InjectedError("no such operator")

    original = codegen.compile_graph

    def compile_graph(gm: fx.GraphModule, *rest: Any) -> Any:
        if not any("dorafx" in str(node.target) for node in gm.graph.nodes):
            return original(gm, *rest)
        if name == "eager":
            return refuse()
        with fresh_cache(), pytest.MonkeyPatch.context() as inside:  # deep in it, when the graph is lowered
            inside.setattr(GraphLowering, "run", refuse)
            return original(gm, *rest)

    monkeypatch.setattr(codegen, "compile_graph", compile_graph)


@pytest.mark.parametrize("name", ["eager", "inductor"])
@pytest.mark.parametrize("training", [True, False])
def test_original_is_compiled_where_the_codegen_fails(
    name: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program runs as it was, in as many graphs, and the log claims no rewrite."""
    model = peft_perceptron().train(training)
    x = torch.randn(3, 24)
    sites = dora_sites(model)
    _refuse_dorafx(monkeypatch, name)
    monkeypatch.setattr(dorafx.pipeline, "_warned", set())
    compiled = _compile(model, **{"dorafx.codegen": name})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if training:
            assert_same_run(run(model, lambda: compiled(x)), run(model, lambda: model(x)), 1e-6)
        else:
            with torch.no_grad():
                assert_close(compiled(x), model(x), 1e-6)
                assert_close(compiled(x), model(x), 1e-6)
    (message,) = _dorafx_warnings(caught)
    assert f"{name} failed" in message and "no such operator" in message
    log = rewrite_log()
    assert not log.rewrites
    assert sorted(record.site for record in log.misses) == sorted(sites)
    assert {record.kind for record in log.misses} == {"codegen-failed"}
    assert not any(record.dense_bytes_avoided for record in log.misses)


def test_strict_raises_where_the_codegen_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    _refuse_dorafx(monkeypatch, "eager")
    with pytest.raises(Exception, match="no such operator"):
        _compile(peft_perceptron(), **{"dorafx.strict": True})(torch.randn(3, 24))


@pytest.fixture
def no_backwards(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An Inductor that compiles forwards, and raises deep in its lowering of a backward."""
    original = GraphLowering.run

    def lower(self: GraphLowering, *args: Any) -> Any:
        if self.is_backward:
            raise InjectedError("no backwards")
        return original(self, *args)

    monkeypatch.setattr(GraphLowering, "run", lower)
    monkeypatch.setattr(dorafx.pipeline, "_warned", set())
    with fresh_cache():
        yield


def _convolutions() -> tuple[nn.Module, torch.Tensor]:
    """Inductor saves activations of convolutions channels last, in strides with which the flattening of positions is no view."""

    class Channels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.head(torch.relu(self.conv(x)).flatten(1))
            return y

    torch.manual_seed(0)
    config = lora_config(target_modules=["conv", "head"], task_type=None)
    return randomise(get_peft_model(Channels(), config)).eval(), torch.randn(2, 3, 6, 6)


@pytest.mark.default_cases("optimize", "checkpoint", "convolutions")
@pytest.mark.parametrize("way", ["optimize", "backend", "dynamic", "checkpoint", "bf16", "convolutions"])
def test_backward_that_is_not_compiled_runs_by_operators(way: str, no_backwards: None) -> None:
    """More than once, and with its graph retained; what is rewritten stays rewritten, and the log says what happened."""
    model: Any
    if way == "convolutions":
        model, x = _convolutions()
    else:
        model, x = peft_perceptron(lora_dropout=0.2 if way == "optimize" else 0.0), torch.randn(3, 24)
    if way == "bf16":
        model, x = model.bfloat16(), x.bfloat16()

    def program(x: torch.Tensor) -> torch.Tensor:
        if way == "checkpoint":
            out: torch.Tensor = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
            return out
        return model(x)  # type: ignore[no-any-return]

    expected = run(model, lambda: program(x))
    other = torch.cat([x, x])
    expected_other = run(model, lambda: program(other))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if way == "optimize":
            dorafx.optimize(model)
            compiled: Any = model
        else:
            compiled = torch.compile(program, backend="dorafx", dynamic=True if way == "dynamic" else None)
        tolerance = 0.05 if way == "bf16" else 1e-5
        for _ in range(2):
            assert_same_run(run(model, lambda: compiled(x)), expected, tolerance)
        assert_same_run(run(model, lambda: compiled(other)), expected_other, tolerance)
        if way != "dynamic":  # stock torch retains no graph there, nor one of a backward whose first call did not
            torch._dynamo.reset()
            leaf = x.clone().requires_grad_()
            loss = compiled(leaf).square().sum()
            first, second = (torch.autograd.grad(loss, leaf, retain_graph=True)[0] for _ in range(2))
            assert torch.equal(first, second)
    log = rewrite_log()
    assert log.rewrites and not log.misses
    messages = _dorafx_warnings(caught)
    assert len(messages) == 1 and "no backwards" in messages[0] and "operator by operator" in messages[0]
    notes = [note for note in log.notes if "no backwards" in note]
    assert notes and all(note.startswith("graph ") for note in notes)
    assert any(record.site in notes[0] for record in log.rewrites)


def test_a_backward_run_by_operators_takes_saved_tensors_in_any_strides() -> None:
    """A compiled forward saves a tensor in other strides than it was traced with, so that a view of it may be none; and it hands over its
    arguments in a list, for them to be freed."""

    def fail(*args: Any, **kwargs: Any) -> Any:
        raise InjectedError("not today")

    graph = fx.Graph()
    saved = graph.placeholder("saved")
    graph.output([graph.call_function(torch.ops.aten.view.default, (saved, [2, 12]))])
    gm = fx.GraphModule({}, graph)
    errors: list[Exception] = []
    compile_or_run = with_way_back(fail, errors.append)
    arguments = [torch.randn(2, 4, 3).mT]
    (expected,) = (t.reshape(2, 12) for t in arguments)
    (out,) = compile_or_run(gm, arguments, is_backward=True)(arguments)
    assert torch.equal(out, expected)
    assert not arguments
    assert [str(error) for error in errors] == ["not today"]
    with pytest.raises(InjectedError):
        compile_or_run(gm, [expected], is_backward=False)


def test_strict_raises_where_a_backward_is_not_compiled(no_backwards: None) -> None:
    compiled = torch.compile(peft_perceptron(), backend="dorafx", options={"dorafx.strict": True})
    y = compiled(torch.randn(3, 24))
    with pytest.raises(Exception, match="no backwards"):
        y.sum().backward()


def test_backward_of_a_graph_without_rewrites_raises_its_own_error(no_backwards: None) -> None:
    y = torch.compile(nn.Linear(24, 8), backend="dorafx")(torch.randn(3, 24))
    with pytest.raises(Exception, match="no backwards"):
        y.sum().backward()
    assert not [note for note in rewrite_log().notes if "no backwards" in note]


def test_a_program_that_no_compiler_takes_raises_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_graph(gm: fx.GraphModule, *rest: Any) -> Any:
        raise InjectedError("dorafx" if any("dorafx" in str(n.target) for n in gm.graph.nodes) else "the user's own")

    monkeypatch.setattr(codegen, "compile_graph", compile_graph)
    with pytest.raises(Exception, match="the user's own"):
        _compile(peft_perceptron())(torch.randn(3, 24))


@pytest.mark.parametrize("stage", STAGES)
def test_strict_raises_on_a_failing_stage(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, stage, f"strict about {stage}")
    compiled = _compile(peft_perceptron(), **{"dorafx.strict": True})
    with pytest.raises(Exception, match=f"strict about {stage}"):
        compiled(torch.randn(3, 24))


def test_failure_after_a_body_was_rewritten_is_no_rewrite_in_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The body of a higher-order operator is rewritten before the graph around it; where the latter fails, the whole
    graph is left as it was, so the log may not claim the body's rewrites."""
    model = peft_perceptron().train()

    def checkpointed(x: torch.Tensor) -> torch.Tensor:
        return torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)

    calls = 0
    original = dorafx.pipeline.match_graph

    def fail_on_the_outer_graph(graph: fx.Graph, *rest: Any) -> Any:
        nonlocal calls
        calls += 1
        if any("checkpoint" in str(n.target) for n in graph.nodes):
            raise InjectedError("outer graph")
        return original(graph, *rest)

    x = torch.randn(3, 24)
    expected = run(model, lambda: checkpointed(x))
    assert_same_run(run(model, lambda: _compile(checkpointed)(x)), expected)
    assert len(rewrite_log().rewrites) == 2
    torch._dynamo.reset()
    rewrite_log().clear()
    monkeypatch.setattr(dorafx.pipeline, "match_graph", fail_on_the_outer_graph)
    with pytest.warns(DorafxWarning, match="outer graph"):
        assert_same_run(run(model, lambda: _compile(checkpointed)(x)), expected)
    assert calls > 1
    assert not rewrite_log().rewrites


# -- strict and misses ------------------------------------------------------------------------------------------------


def _dense_norm_with_unknown_delta(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """A norm of ``W + tanh(B·A)``: no low-rank form exists, so nothing may be rewritten."""
    dense = w + torch.tanh(b @ a)
    g = (dense.norm(dim=1) / dense.norm(dim=1).detach()).detach()
    return g * (x @ w.T + (x @ a.T) @ b.T)


def test_what_cannot_be_rewritten_stays_right() -> None:
    w, a, b, x = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2), torch.randn(3, 8)
    actual = _compile(_dense_norm_with_unknown_delta)(w, a, b, x)
    assert_close(actual, _dense_norm_with_unknown_delta(w, a, b, x), 1e-6)
    assert not rewrite_log().rewrites


def test_strict_names_the_first_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    from dorafx.match import Reason

    original = dorafx.pipeline.match_graph

    def refuse_all(graph: fx.Graph, *rest: Any) -> Any:
        matches = original(graph, *rest)
        for atom_id in list(matches.norms):
            matches.misses[atom_id] = Reason("not on a Sunday", None)
            del matches.norms[atom_id]
        matches.compositions = []
        return matches

    monkeypatch.setattr(dorafx.pipeline, "match_graph", refuse_all)
    model, x = peft_perceptron(), torch.randn(3, 24)
    with pytest.raises(Exception, match="not on a Sunday") as caught:
        _compile(model, **{"dorafx.strict": True})(x)
    inner = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(inner, RewriteMissError)
    torch._dynamo.reset()
    rewrite_log().clear()
    assert_close(_compile(model)(x), model(x), 1e-6)
    assert [r.reason for r in rewrite_log().misses] == ["not on a Sunday"] * 2


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"dorafx.nrom": "tiled"}, ["dorafx.nrom", *("dorafx." + f.name for f in fields(Options))]),
        ({"dorafx.norm": "quick"}, ["quick", "auto", "tiled", "factored"]),
        ({"dorafx.compose": "slowly"}, ["slowly", "auto"]),
        ({"dorafx.strict": "yes"}, ["dorafx.strict", "yes"]),
        ({"dorafx.codegen": "no_such_backend"}, ["no_such_backend", "inductor", "eager", "aot_eager"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_option(wrong: dict[str, Any], named: list[str]) -> None:
    model = peft_perceptron()
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", **wrong})
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is looked at below)
        compiled(torch.randn(3, 24))
    for word in named:
        assert word in str(caught.value)


def test_inductors_options_pass_through(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[tuple[str | None, dict[str, Any]]] = []

    def compile_with_inductor(gm: Any, inputs: Any, mode: str | None, options: dict[str, Any], *_: Any) -> Any:
        received.append((mode, options))
        return gm.forward

    monkeypatch.setattr(codegen, "compile_with_inductor", compile_with_inductor)
    model, x = peft_perceptron(), torch.randn(3, 24)
    options = {"dorafx.norm": "factored", "max_autotune": False, "trace.graph_diagram": False}
    assert_close(torch.compile(model, backend="dorafx", options=options)(x), model(x), 1e-5)
    ((mode, passed),) = received
    assert mode is None
    assert passed == {"max_autotune": False, "trace.graph_diagram": False}
    assert {r.norm_algorithm for r in rewrite_log().rewrites} == {"factored"}
    assert_all_rewritten(model)


def test_inductors_mode_passes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[str | None] = []

    def compile_with_inductor(gm: Any, inputs: Any, mode: str | None, options: dict[str, Any], *_: Any) -> Any:
        received.append(mode)
        return gm.forward

    monkeypatch.setattr(codegen, "compile_with_inductor", compile_with_inductor)
    model, x = peft_perceptron(), torch.randn(3, 24)
    assert_close(torch.compile(model, backend="dorafx", mode="max-autotune-no-cudagraphs")(x), model(x), 1e-5)
    assert received == ["max-autotune-no-cudagraphs"]


@pytest.mark.parametrize("algorithm", ["tiled", "factored"])
def test_norm_algorithm_on_request(algorithm: str) -> None:
    model, x = peft_perceptron().train(), torch.randn(3, 24)
    expected = run(model, lambda: model(x))
    compiled = compile_eagerly(model, **{"dorafx.norm": algorithm})
    assert_same_run(run(model, lambda: compiled(x)), expected)
    assert {r.norm_algorithm for r in rewrite_log().rewrites} == {algorithm}


# -- codegen ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("train", "compose"), [(False, "auto"), (True, "auto"), (True, "accumulated"), (True, "epilogue")]
)
def test_inductor(train: bool, compose: str) -> None:
    """Real compilations by Inductor, forward and backward, of either way to add the low-rank product."""
    model = peft_perceptron(lora_dropout=0.0).train(train)
    x = torch.randn(3, 24)
    expected = run(model, lambda: model(x))
    options = {"dorafx.strict": True, "dorafx.norm": "factored", "dorafx.compose": compose, "max_autotune": False}
    compiled = torch.compile(model, backend="dorafx", fullgraph=True, options=options)
    assert_same_run(run(model, lambda: compiled(x)), expected)
    assert_all_rewritten(model)
    assert {r.codegen for r in rewrite_log().rewrites} == {"inductor"}


def test_other_backends_receive_the_rewritten_graph() -> None:
    """The norms are inputs of the graph, after the user's own; the composition is an operator in it."""
    received: list[list[str]] = []

    def recorder(gm: fx.GraphModule, inputs: Any) -> Any:
        placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
        assert len(inputs) == len(placeholders)
        assert [tuple(t.shape) for t in inputs[-2:]] == [(48,), (24,)]
        received.append([str(n.target) for n in gm.graph.nodes if n.op == "call_function"])
        return gm.forward

    name = "dorafx_test_recorder"
    torch._dynamo.register_backend(recorder, name=name)
    model, x = peft_perceptron(), torch.randn(3, 24)
    assert_close(compile_eagerly(model, **{"dorafx.codegen": name})(x), model(x), 1e-5)
    (targets,) = received
    assert targets.count("dorafx.compose.default") == 2
    assert not any("eye" in t or "linalg" in t or "row_norm" in t for t in targets)
    assert {r.norm_placement for r in rewrite_log().rewrites} == {"prologue"}
    assert {r.codegen for r in rewrite_log().rewrites} == {name}


def test_aot_eager() -> None:
    model, x = peft_perceptron(lora_dropout=0.2).train(), torch.randn(3, 24)
    expected = run(model, lambda: model(x))
    compiled = compile_eagerly(model, **{"dorafx.codegen": "aot_eager"})
    assert_same_run(run(model, lambda: compiled(x)), expected)
    assert_all_rewritten(model)


def test_no_compiler_on_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_inductor(*args: Any) -> Any:
        raise AssertionError("Inductor was asked though there is no compiler")

    monkeypatch.setattr(codegen, "has_cpp_compiler", lambda: False)
    monkeypatch.setattr(codegen, "compile_with_inductor", no_inductor)
    monkeypatch.setattr(codegen, "_warned_no_compiler", False)
    model, x = peft_perceptron().train(), torch.randn(3, 24)
    expected = run(model, lambda: model(x))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        compiled = torch.compile(model, backend="dorafx", fullgraph=True)
        assert_same_run(run(model, lambda: compiled(x)), expected)
        assert_close(compiled(torch.randn(2, 5, 24)).detach()[:0], torch.empty(0, 5, 24), 0)
    (message,) = _dorafx_warnings(caught)
    assert "C++ compiler" in message
    assert not rewrite_log().misses
    assert len(rewrite_log().rewrites) >= 2


# -- graphs without DoRA ----------------------------------------------------------------------------------------------


def test_graph_without_dora_is_the_same_object(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
    graph = captured_graph(model, torch.randn(2, 5, 16))
    before = graph.print_readable(print_output=False)
    assert dorafx.pipeline.rewrite_graph(graph, Options()).graph is graph
    assert graph.print_readable(print_output=False) == before
    assert not rewrite_log().records


def test_plain_lora_passes_through() -> None:
    model = peft_model(use_dora=False, lora_dropout=0.2).train()
    ids = tokens()
    assert not dora_sites(model)
    expected = run(model, lambda: model(input_ids=ids).logits)
    compiled = compile_eagerly(model)
    assert_same_run(run(model, lambda: compiled(input_ids=ids).logits), expected, 1e-6)
    assert not rewrite_log().records


def test_weight_normalisation_is_not_dora() -> None:
    torch.manual_seed(0)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(8, 6))
    x = torch.randn(3, 8)
    assert_close(_compile(layer)(x), layer(x), 1e-6)
    assert not rewrite_log().rewrites


@pytest.mark.default_cases("False")
@pytest.mark.parametrize("use_dora", [False, True])
def test_work_of_the_pass_is_linear_in_nodes(use_dora: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each node is lifted a bounded number of times: once where there is no DoRA, at most twice where there is."""
    lifted: dict[fx.Node, int] = {}
    original = Lifter._lift

    def count(self: Lifter, node: fx.Node) -> Any:
        lifted[node] = lifted.get(node, 0) + 1
        return original(self, node)

    def pass_over(layers: int) -> tuple[int, int]:
        torch._dynamo.reset()
        graph = captured_graph(lambda ids: model(input_ids=ids).logits, tokens())
        lifted.clear()
        dorafx.pipeline.rewrite_graph(graph, Options(strict=True))
        assert max(lifted.values()) <= (2 if use_dora else 1)
        return sum(lifted.values()), len(graph.graph.nodes)

    monkeypatch.setattr(Lifter, "_lift", count)
    ratios = []
    for layers in (1, 3):
        model = peft_model(layers=layers, use_dora=use_dora)
        visits, nodes = pass_over(layers)
        ratios.append(visits / nodes)
    assert ratios[1] <= ratios[0] * 1.1


# -- graphs that others compile, and dry runs -------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_failing_stage_leaves_the_users_program_as_it_is(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = peft_perceptron(), torch.randn(3, 24)
    exported, traced = torch.export.export(model, (x,)), captured_graph(model, x)
    _break(monkeypatch, stage, f"no {stage} for rewrite")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert dorafx.rewrite(exported) is exported
        assert dorafx.rewrite(traced) is traced
        explanation = dorafx.explain(model, x)
    (message,) = _dorafx_warnings(caught)
    assert f"InjectedError: no {stage} for rewrite" in message
    for records in (rewrite_log().records, explanation.log.records):
        assert {r.status for r in records} == {"missed"}
        assert all(f"InjectedError: no {stage} for rewrite" in r.reason for r in records)
    assert (len(rewrite_log().records), len(explanation.misses), explanation.graph_count) == (2, 1, 1)


def test_failing_after_the_rewrite_claims_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    import dorafx.rewriter.lowering

    def fail(*args: Any) -> Any:
        raise InjectedError("no lowering")

    monkeypatch.setattr(dorafx.rewriter.lowering, "lower_to_aten", fail)
    model, x = peft_perceptron(), torch.randn(3, 24)
    exported = torch.export.export(model, (x,))
    with pytest.warns(DorafxWarning, match="no lowering"):
        assert dorafx.rewrite(exported) is exported
    assert [r.status for r in rewrite_log().records] == ["missed"]
