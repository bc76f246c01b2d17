"""What a user leaves alone (``skip``, ``only``), and the file of the option ``explain``."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integration_support import (
    assert_close,
    assert_same_run,
    call,
    dora_sites,
    peft_model,
    peft_perceptron,
    run,
)
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

import dorafx
from dorafx import rewrite_log, selection
from dorafx.log import ReasonKind
from dorafx.selection import Selection, matches

Options = dict[str, Any]
LINEARS = ["q_proj", "gate_proj", "down_proj"]


@pytest.fixture(autouse=True)
def _nothing_settled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(selection, "_settled", set())
    with warnings.catch_warnings():
        warnings.simplefilter("error", dorafx.DorafxWarning)
        yield


def skipped_sites() -> list[str]:
    """The sites of all misses, each of which is the user's choice."""
    misses = rewrite_log().misses
    assert {r.kind for r in misses} <= {ReasonKind.SKIPPED.value}, [r.reason for r in misses]
    assert all("dorafx.skip=" in r.reason or "dorafx.only=" in r.reason for r in misses)
    return sorted({r.site for r in misses})  # a layer may be compiled into several graphs


def rewritten_sites() -> list[str]:
    """The sites of all rewrites."""
    return sorted({r.site for r in rewrite_log().rewrites})


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("lm_head", "base_model.model.lm_head", True),
        ("base_model.model.lm_head", "base_model.model.lm_head", True),
        ("lm_head", "lm_head", True),
        ("head", "lm_head", False),
        ("*_head", "model.lm_head", True),
        ("*.down_proj", "layers.0.mlp.down_proj", True),
        ("*.down_proj", "down_proj", False),
        ("layers.1.*", "model.layers.1.mlp.down_proj", True),
        ("layers.1", "model.layers.1.mlp.down_proj", True),  # all that is inside
        ("layers.1", "model.layers.10.mlp", False),
        ("layers.1", "model.sublayers.1.mlp", False),
        ("layers.[0-2]", "model.layers.2.mlp", True),
        ("layers.?.mlp", "model.layers.12.mlp", False),
        ("LM_head", "lm_head", False),
        ("*", "", True),
        ("lm_head", "", False),
    ],
)
def test_what_a_pattern_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) == expected
    assert (Selection(skip=(pattern,)).excluded(name) is not None) == expected
    assert (Selection(only=(pattern,)).excluded(name) is None) == expected


def test_skip_goes_before_only() -> None:
    chosen = Selection(skip=("*.q_proj",), only=("layers.0",))
    assert chosen.excluded("model.layers.0.k_proj") is None
    for name, option in (("model.layers.0.q_proj", "skip"), ("model.layers.1.k_proj", "only")):
        why = chosen.excluded(name)
        assert why is not None and why.option == option and f"dorafx.{option}=" in why.text


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("how", ["backend", "model", "blocks", "modules"])
@pytest.mark.default_cases("modules-eager", "blocks-eager", "backend-eager")
def test_layers_are_left_alone(how: str, codegen: str) -> None:
    """One layer of one of two equal blocks, and one of both."""
    model = peft_model(layers=2, target_modules=LINEARS)
    expected = run(model, lambda: call(model, model))
    skip = ["layers.1.mlp.gate_proj", "*.down_proj"]
    if how == "backend":
        options = {"dorafx.codegen": codegen, "dorafx.strict": True, "dorafx.skip": ", ".join(skip)}
        function = torch.compile(model, backend="dorafx", options=options)
    else:
        function = dorafx.optimize(model, codegen=codegen, scope=how, strict=True, skip=skip)
    assert_same_run(run(model, lambda: call(function, model)), expected)
    skipped = [site for site in dora_sites(model) if site.endswith(("layers.1.mlp.gate_proj", ".down_proj"))]
    assert len(skipped) == 3
    assert skipped_sites() == skipped
    assert rewritten_sites() == sorted(set(dora_sites(model)) - set(skipped))
    assert {r.reason for r in rewrite_log().misses} == {f"skipped by the option dorafx.skip={p!r}" for p in skip}
    dorafx.restore(model)


@pytest.mark.parametrize("how", ["backend", "model", "blocks", "modules"])
@pytest.mark.default_cases("backend", "blocks")
def test_only_some_layers(how: str) -> None:
    model = peft_model(layers=2, target_modules=LINEARS)
    expected = run(model, lambda: call(model, model))
    only = ("self_attn", "layers.1.mlp.gate_proj")
    if how == "backend":
        options = {"dorafx.codegen": "eager", "dorafx.strict": True, "dorafx.only": only}
        function = torch.compile(model, backend="dorafx", options=options)
    else:
        function = dorafx.optimize(model, codegen="eager", scope=how, strict=True, only=only)
    assert_same_run(run(model, lambda: call(function, model)), expected)
    rewritten = [s for s in dora_sites(model) if "self_attn" in s or s.endswith("layers.1.mlp.gate_proj")]
    assert len(rewritten) == 3
    assert rewritten_sites() == rewritten
    assert skipped_sites() == sorted(set(dora_sites(model)) - set(rewritten))
    dorafx.restore(model)


@pytest.mark.parametrize("scope", ["modules", "blocks"])
def test_what_is_wholly_left_alone_is_not_compiled(scope: str) -> None:
    """It is called as the stock module, and gives the same bits."""
    model = peft_model(layers=2, target_modules=LINEARS)
    inner = model.base_model.model.model.layers
    x = torch.randn(2, 5, 32)
    expected = [inner[0].mlp(x), inner[1].mlp(x)]
    dorafx.optimize(model, codegen="eager", scope=scope, skip="layers.0", strict=True)
    assert skipped_sites() == [s for s in dora_sites(model) if ".layers.0." in s]  # before anything is compiled
    compiled = [name for name, m in model.named_modules() if vars(m).get("_compiled_call_impl") is not None]
    assert compiled and not any(".layers.0" in name for name in compiled)
    assert torch.equal(inner[0].mlp(x), expected[0])
    assert_close(inner[1].mlp(x), expected[1], 1e-5)
    call(model, model)
    assert skipped_sites() == [s for s in dora_sites(model) if ".layers.0." in s]
    dorafx.restore(model)


@pytest.mark.parametrize("scope", ["auto", "modules", "blocks", "model"])
@pytest.mark.default_cases("auto")
def test_all_is_left_alone(scope: str) -> None:
    model = peft_model(layers=2, target_modules=LINEARS)
    expected = call(model, model)
    dorafx.optimize(model, codegen="eager", scope=scope, skip="*", strict=True)
    assert_close(call(model, model), expected, 1e-6)
    assert skipped_sites() == dora_sites(model)
    assert rewritten_sites() == []


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_convolutions_embeddings_and_normalised_weights(codegen: str) -> None:
    """Norms without a node of their own, and a layer that is no module of PEFT's."""

    class Merged(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 6), requires_grad=False)
            self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(8, 2))
            self.m = nn.Parameter(torch.rand(8, 1) + 0.5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.linear(x, self.m * F.normalize(self.w + self.b @ self.a, dim=1))

    model = nn.ModuleDict({"first": Merged(), "second": Merged()})

    def forward(x: torch.Tensor) -> torch.Tensor:
        return model["first"](x) + model["second"](x)

    x = torch.randn(3, 6)
    expected = run(model, lambda: forward(x))
    options = {"dorafx.codegen": codegen, "dorafx.strict": True, "dorafx.skip": ["second"]}
    compiled = torch.compile(forward, backend="dorafx", fullgraph=True, options=options)
    assert_same_run(run(model, lambda: compiled(x)), expected)
    (record,) = rewrite_log().rewrites
    assert record.site.endswith("first")
    assert [site.rpartition(".")[2] for site in skipped_sites()] == ["second"]


class Adapted(nn.Module):
    """A layer whose norm is computed elsewhere, and one that is no DoRA."""

    def __init__(self, hidden: bool = False) -> None:
        super().__init__()
        self.hidden = hidden
        self.w = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))
        self.m = nn.Parameter(torch.rand(8) + 0.5)

    def norm(self) -> torch.Tensor:
        delta = self.b @ self.a
        return (self.w + (delta.tanh() if self.hidden else delta)).norm(dim=1).detach()

    def forward(self, x: torch.Tensor, n: torch.Tensor | None = None) -> torch.Tensor:
        n = self.norm() if n is None else n
        return self.m / n * (F.linear(x, self.w) + F.linear(F.linear(x, self.a), self.b))


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module, norms_outside: bool = False) -> None:
        super().__init__()
        self.one, self.two = layers
        self.norms_outside = norms_outside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (self.one, self.two):
            x = layer(x, layer.norm()) if self.norms_outside else layer(x)
        return x


@pytest.mark.parametrize("option", [{"dorafx.skip": "two"}, {"dorafx.only": "one"}], ids=["skip", "only"])
def test_a_norm_that_is_computed_elsewhere(option: Options) -> None:
    """The layer that it scales decides."""
    model, x = Stack(Adapted(), Adapted(), norms_outside=True), torch.randn(3, 8)
    expected = run(model, lambda: model(x))
    compiled = torch.compile(
        model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True, **option}
    )
    assert_same_run(run(model, lambda: compiled(x)), expected)
    assert (rewritten_sites(), skipped_sites()) == (["one"], ["two"])


@pytest.mark.parametrize("option", ["first", "second"])
def test_a_norm_that_two_layers_share(option: str) -> None:
    """Neither is rewritten where one is skipped: each reads the other's norm."""
    model, x = Adapted(), torch.randn(3, 8)

    class Reading(nn.Module):
        def forward(self, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
            return model.m / n * (F.linear(x, model.w) + F.linear(F.linear(x, model.a), model.b))

    readers = nn.ModuleDict({"first": Reading(), "second": Reading()})

    def forward(x: torch.Tensor) -> torch.Tensor:
        n = model.norm()
        return readers["second"](readers["first"](x, n).relu(), n)

    expected = run(model, lambda: forward(x))
    options = {"dorafx.codegen": "eager", "dorafx.strict": True, "dorafx.skip": option}
    compiled = torch.compile(forward, backend="dorafx", options=options)
    assert_same_run(run(model, lambda: compiled(x)), expected)
    assert rewritten_sites() == []
    (site,) = skipped_sites()
    assert site.endswith(option)


def test_a_layer_that_would_be_missed_anyway() -> None:
    """With ``strict`` it is no error any more."""
    model, x = Stack(Adapted(), Adapted(hidden=True)), torch.randn(3, 8)
    options = {"dorafx.codegen": "eager", "dorafx.strict": True}
    with pytest.raises(BackendCompilerFailed, match=r"RewriteMissError: .*two"):
        torch.compile(model, backend="dorafx", options=options)(x)
    torch._dynamo.reset()
    rewrite_log().clear()
    compiled = torch.compile(model, backend="dorafx", options={**options, "dorafx.skip": "two"})
    assert_close(compiled(x), model(x), 1e-5)
    assert (rewritten_sites(), skipped_sites()) == (["one"], ["two"])


def test_with_verification() -> None:
    """Also where norms have to be put back into the graph, which is planned again."""
    model = peft_perceptron()
    expected = call(model, model)
    options = {"dorafx.codegen": "eager", "dorafx.strict": True, "dorafx.verify": True, "dorafx.skip": "second"}
    compiled = torch.compile(model, backend="dorafx", options=options)
    assert_close(call(compiled, model), expected, 1e-5)
    assert (len(rewritten_sites()), len(skipped_sites())) == (1, 1)


# -- mistyped patterns -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["model", "blocks", "modules"])
@pytest.mark.default_cases("blocks")
def test_a_mistyped_pattern_of_optimize(scope: str) -> None:
    model = peft_model(layers=2, target_modules=LINEARS)
    with pytest.warns(dorafx.DorafxWarning, match=r"dorafx\.skip: no module of the model matches 'lm_haed'.*'lm_head'"):
        dorafx.optimize(model, codegen="eager", scope=scope, skip=["lm_haed", "*.down_proj"])
    call(model, model)  # not reported again
    assert len(skipped_sites()) == 2
    dorafx.restore(model)
    with pytest.warns(
        dorafx.DorafxWarning, match=r"dorafx\.only: .*'\*\.q_porj', and nothing is rewritten by it.*'q_proj'"
    ):
        dorafx.optimize(model, codegen="eager", scope=scope, only="*.q_porj")


def test_a_mistyped_pattern_of_the_backend() -> None:
    model = peft_perceptron()
    options = {"dorafx.codegen": "eager", "dorafx.skip": ["scond", "first"]}
    compiled = torch.compile(model, backend="dorafx", options=options, dynamic=False)
    with pytest.warns(
        dorafx.DorafxWarning, match=r"dorafx\.skip: no module in this graph matches 'scond'.*'second'"
    ) as seen:
        call(compiled, model)
    assert len(seen) == 1
    compiled(torch.randn(2, 24))  # another graph: not reported again
    assert (len(skipped_sites()), len(rewritten_sites()), len(rewrite_log().records)) == (1, 1, 4)


def test_a_pattern_for_another_graph() -> None:
    """It matched there, and so is no mistake."""
    model = nn.ModuleDict({"one": Adapted(), "two": Adapted()})

    def forward(x: torch.Tensor) -> torch.Tensor:
        x = model["one"](x)
        torch._dynamo.graph_break()
        return model["two"](x)

    options = {"dorafx.codegen": "eager", "dorafx.skip": "one"}
    torch.compile(forward, backend="dorafx", options=options)(torch.randn(3, 8))
    assert (len(rewritten_sites()), len(skipped_sites())) == (1, 1)


@pytest.mark.parametrize("value", [3, [3], ["a", ""], "a,,b", {"a": 1}, [["a"]]], ids=repr)
@pytest.mark.parametrize("option", ["skip", "only"])
def test_what_is_no_pattern(option: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"dorafx\.{option}: .* is not a list of patterns of module names, such as \['lm_head'"
    ):
        dorafx.optimize(peft_perceptron(), **{option: value})
    with pytest.raises(ValueError, match=rf"dorafx\.{option}"):
        torch.compile(lambda x: x + 1, backend="dorafx", options={f"dorafx.{option}": value})(torch.ones(2))


def test_a_failing_optimize_leaves_the_model_alone() -> None:
    model = peft_perceptron()
    with pytest.raises(ValueError, match=r"\.txt, \.html or \.json"):
        dorafx.optimize(model, explain="a.csv")
    assert all(vars(m).get("_compiled_call_impl") is None for m in model.modules())
    dorafx.optimize(model, codegen="eager")


# -- the explanation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("how", ["backend", "optimize"])
def test_explanation_of_the_first_forward(how: str, codegen: str, tmp_path: Path) -> None:
    """All graphs of a forward, with misses and the graph break, in each form."""
    layers = nn.ModuleDict({"one": Adapted(), "two": Adapted(hidden=True)})

    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.layers["one"](x)
            torch._dynamo.graph_break()
            return self.layers["two"](x)

    for suffix in (".txt", ".html", ".json"):
        torch._dynamo.reset()
        model, path = Broken(), tmp_path / f"explanation{suffix}"
        if how == "backend":
            options = {"dorafx.codegen": codegen, "dorafx.explain": path}
            function = torch.compile(model, backend="dorafx", options=options)
        else:
            function = dorafx.optimize(model, codegen=codegen, explain=path)
        assert not path.exists()
        function(torch.randn(3, 8))
        text = path.read_text(encoding="utf-8")
        assert list(tmp_path.iterdir()) == [path]  # nothing half written is left
        path.unlink()
        assert "layers.one" in text and "layers.two" in text and "tanh" in text and "graph_break" in text, text
        if suffix == ".txt":
            assert text.startswith("2 graphs, 1 graph break\n") and "1 modules rewritten, 1 missed" in text
        elif suffix == ".json":
            content = json.loads(text)
            assert (content["graphs"], content["graph_breaks"], len(content["breaks"])) == (2, 1, 1)
            assert [r["status"] for r in content["records"]] == ["rewritten", "missed"]
            assert len(dorafx.RewriteLog.from_json(text).records) == 2
        else:
            assert text.lstrip().lower().startswith("<!doctype html>") and "2 graphs, 1 graph break" in text


def test_explanation_goes_on(tmp_path: Path) -> None:
    """A graph that is compiled later is added; another file, and another model's breaks, are not mixed in."""
    one, other = tmp_path / "one.txt", tmp_path / "other.txt"
    model = peft_perceptron()

    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return model(x) + 1

    torch.compile(broken, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.explain": str(one)})(
        torch.randn(2, 24)
    )
    options = {"dorafx.codegen": "eager", "dorafx.explain": str(other)}
    compiled = torch.compile(model, backend="dorafx", options=options, dynamic=False)
    for graphs, rows in (("1 graph", 2), ("2 graphs", 5)):
        compiled(torch.randn(rows, 24))
        assert other.read_text(encoding="utf-8").startswith(f"{graphs}, 0 graph breaks\n")
    assert len(dorafx.rewrite_log().rewrites) == 6


def test_explanation_where_strict_raises(tmp_path: Path) -> None:
    path = tmp_path / "why.txt"
    options = {"dorafx.codegen": "eager", "dorafx.strict": True, "dorafx.explain": path}
    with pytest.raises(BackendCompilerFailed, match="RewriteMissError"):
        torch.compile(Adapted(hidden=True), backend="dorafx", options=options)(torch.randn(3, 8))
    assert "tanh" in path.read_text(encoding="utf-8")


def test_explanation_that_cannot_be_written(tmp_path: Path) -> None:
    """One warning, and the model runs."""
    model = peft_perceptron()
    expected = call(model, model)
    options = {"dorafx.codegen": "eager", "dorafx.explain": tmp_path / "absent" / "why.html"}
    compiled = torch.compile(model, backend="dorafx", options=options, dynamic=False)
    with pytest.warns(dorafx.DorafxWarning, match=r"dorafx\.explain: cannot write .*why\.html: No such file") as seen:
        assert_close(call(compiled, model), expected, 1e-5)
        compiled(torch.randn(2, 24))
    assert len(seen) == 1


def test_an_explanation_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no layout")

    monkeypatch.setattr("dorafx.log.html.fitting", broken)
    model = Adapted(hidden=True)
    options = {"dorafx.codegen": "eager", "dorafx.explain": str(tmp_path / "why.html")}
    compiled, x = torch.compile(model, backend="dorafx", options=options), torch.randn(3, 8)
    with pytest.warns(dorafx.DorafxWarning, match=r"dorafx\.explain: cannot write .*why\.html: no layout"):
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize(
    ("value", "text"), [("a.csv", r"does not end in \.txt, \.html or \.json"), (3, "is not the path")]
)
def test_wrong_explanations(value: Any, text: str) -> None:
    with pytest.raises(ValueError, match=rf"dorafx\.explain: .*{text}"):
        torch.compile(lambda x: x + 1, backend="dorafx", options={"dorafx.explain": value})(torch.ones(2))
    with pytest.raises(ValueError, match="does not end in"):
        dorafx.explain(Adapted(), torch.randn(3, 8)).write("a.csv")


def test_the_folder_may_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = peft_perceptron()
    dorafx.optimize(model, codegen="eager", explain="why.txt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    call(model, model)
    assert (tmp_path / "why.txt").exists()
