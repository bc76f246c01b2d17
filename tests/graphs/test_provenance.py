"""The name of the module that a record speaks of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint

import dorafx
from dorafx import rewrite_log
from dorafx._compat.dynamo import module_at
from dorafx.graphs.provenance import module_path


@pytest.mark.parametrize(
    ("access", "name"),
    [
        ("L['self']", ""),
        ("L['self'].layers.0.q_proj", "layers.0.q_proj"),
        ("L['self']._modules['layers'].0.q_proj", "layers.0.q_proj"),
        ("L['self'].__dict__['_modules']['head']", "head"),
        ("getattr(L['self'].layers, '0').q_proj", "layers.0.q_proj"),
        ("L['fn'].layers[3]", "layers.3"),
        ("L['adapters']['default']", "adapters.default"),
        ("G['MODEL'].head", "MODEL.head"),
        ("self.head", "head"),
        ("self_attn.q_proj", "self_attn.q_proj"),
        ("L['___stack0']", ""),
        ("L['___stack12'].lora_A", "lora_A"),
        ("L['args'][0]._modules['model']._modules['layers']._modules['0']", "model.layers.0"),
        ("L['args'][1]._modules['layer']", "args.1.layer"),
        ("L['self'].layers.0._compiled_call_impl.module.q_proj", "layers.0.q_proj"),
        ("L['self']._modules['layers']._modules['0']._compiled_call_impl.module._modules['q_proj']", "layers.0.q_proj"),
        ("L['self'].head._compiled_call_impl.module", "head"),
    ],
)
def test_names(access: str, name: str) -> None:
    assert module_path(access) == name


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.a, self.b, self.m = (
            torch.nn.Parameter(torch.randn(shape)) for shape in [(6, 5), (2, 5), (6, 2), (6,)]
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = (self.weight + self.b @ self.a).norm(dim=1)
        return self.m / norm * (x @ self.weight.T + x @ self.a.T @ self.b.T)


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = Layer(), torch.nn.Linear(6, 5), Layer()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.first(x)))


def test_parameters_of_the_compiled_module_have_their_own_names_in_drawings() -> None:
    layer = Layer()
    torch.compile(layer, backend="dorafx", options={"dorafx.codegen": "eager"})(torch.randn(3, 5))
    (drawing,) = rewrite_log().drawings.values()
    assert {node.label for node in drawing.before if node.label} - {"x"} == {"weight", "a", "b", "m"}


def test_a_frame_that_a_hook_ends_names_no_variable_of_dynamo() -> None:
    """Dynamo cannot trace the hook: what comes after it is compiled by itself, with the next layer on the stack."""
    model = Model()
    model.first.register_forward_hook(torch.compiler.disable(lambda module, inputs, output: None))
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager"})
    x = torch.randn(3, 5)
    torch.testing.assert_close(compiled(x), model(x))
    sites = [record.site for record in rewrite_log().rewrites]
    assert len(sites) == 2
    assert not any("stack" in site for site in sites), sites


class Odd(Layer):
    """Its methods call their module otherwise."""

    def forward(this, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return Layer.forward(this, x)


class Wrapped(torch.nn.Module):
    """A graph break, then a layer that is reached by ``call(layer, x)``."""

    def __init__(self, call: Callable[[Layer, torch.Tensor], torch.Tensor], layer: type[Layer] = Layer) -> None:
        super().__init__()
        self.inner = torch.nn.ModuleDict({"adapted": layer()})
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return self.call(self.inner["adapted"], x)


def _checkpointed(call: Any, x: torch.Tensor) -> torch.Tensor:
    """As some trainers wrap gradient checkpointing: the call is a bound method or a partial of one."""
    torch._dynamo.graph_break()
    return call(x)


def _by_checkpoint(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    holder = torch.nn.Sequential(layer)  # so that the layer is below of what the frame reaches
    return _checkpointed(functools.partial(torch.utils.checkpoint.checkpoint, holder.__call__, use_reentrant=False), x)


def _by_closure(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    def inner(y: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return layer(y)

    return inner(x)


def _by_list(layer: Layer, x: torch.Tensor) -> torch.Tensor:
    return _in_list([layer], x)


def _in_list(layers: list[Layer], x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    for layer in layers:
        x = layer(x)
    return x


CALLS: dict[str, Callable[[], Wrapped]] = {
    "odd self": lambda: Wrapped(lambda layer, x: layer(x), Odd),
    "partial": lambda: Wrapped(lambda layer, x: _checkpointed(functools.partial(layer.__call__), x)),
    "method": lambda: Wrapped(lambda layer, x: _checkpointed(layer.forward, x)),
    "checkpoint": lambda: Wrapped(_by_checkpoint),
    "closure": lambda: Wrapped(_by_closure),
    "list": lambda: Wrapped(_by_list),
}


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("how", ["backend", "explain", "skip"])
def test_a_frame_of_no_method_names_layers_as_the_model_does(way: str, how: str) -> None:
    model = CALLS[way]()
    x = torch.randn(3, 5)
    if how == "explain":
        assert [r.site for r in dorafx.explain(model, x).rewrites] == ["inner.adapted"]
        return
    options = {"dorafx.codegen": "eager", "dorafx.skip": "inner.adapted" if how == "skip" else ""}
    compiled = torch.compile(model, backend="dorafx", options=options)
    torch.testing.assert_close(compiled(x), model(x))
    records = rewrite_log().misses if how == "skip" else rewrite_log().rewrites
    assert [r.site for r in records] == ["inner.adapted"]


class Stack(torch.nn.Module):
    """More than ten layers that lie in one list."""

    def __init__(self, by_function: bool) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(Layer() for _ in range(12))
        self.by_function = by_function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.by_function:
            torch._dynamo.graph_break()
            return _sum_of(self.layers, x)
        return sum((layer(x) for layer in self.layers), torch.zeros(()))


def _sum_of(layers: torch.nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    total = torch.zeros(())
    for layer in layers:  # no generator: after a graph break torch 2.15 does not trace what it yields
        total = total + layer(x)
    return total


@pytest.mark.parametrize("by_function", [False, True])
def test_the_names_of_layers_that_begin_with_those_of_others(by_function: bool) -> None:
    model = Stack(by_function)
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.skip": "layers.10"})
    compiled(torch.randn(3, 5))
    sites = [record.site for record in rewrite_log().rewrites]
    assert sites == [f"layers.{i}" for i in range(12) if i != 10]
    assert [record.site for record in rewrite_log().misses] == ["layers.10"]


@pytest.mark.parametrize("key", ["x if print('run') else 0", """it's "quoted\"""", "0", "0 or 1", "v1 (old)", "a"])
def test_modules_of_any_name(key: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Names are text, not code."""
    modules = torch.nn.ModuleDict({key: Layer(), "v1": torch.nn.Linear(5, 6)})
    found = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        stacks = [node.meta.get("nn_module_stack") or {} for node in gm.graph.nodes]
        found.extend(module_at(entry[0]) for stack in stacks for entry in stack.values())
        return gm.forward

    def call(modules: torch.nn.ModuleDict, x: torch.Tensor) -> torch.Tensor:
        return modules[key](x)  # type: ignore[no-any-return]

    torch.compile(call, backend=backend)(modules, torch.randn(3, 5))
    assert set(found) == {modules[key]}
    assert not capsys.readouterr().out


def test_accesses_that_are_not_followed() -> None:
    called: list[int] = []
    found = []

    def backend(gm: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        accesses = [
            "L['layer']",
            "L['call']()",
            "L['layer'] if L['call']() else 0",
            "L['no']",
            "L[",
            "",
            "L['layer'].weight",
        ]
        found.extend(module_at(access) for access in accesses)
        return gm.forward

    def forward(layer: Layer, call: Callable[[], None], x: torch.Tensor) -> torch.Tensor:
        return layer(x)

    layer = Layer()
    torch.compile(forward, backend=backend)(layer, lambda: called.append(1), torch.randn(3, 5))
    assert found == [layer, None, None, None, None, None, None]
    assert not called


@pytest.mark.parametrize("broken", ["module_of_frame", "module_at"])
def test_what_cannot_be_named_is_compiled_all_the_same(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a version of torch keeps frames in another way."""

    def fails(*args: Any) -> Any:
        raise AttributeError("no such thing as root_tx")

    monkeypatch.setattr(f"dorafx.capture.outside.{broken}", fails)
    model, x = Stack(False), torch.randn(3, 5)
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True})
    torch.testing.assert_close(compiled(x), model(x))
    assert [record.site for record in rewrite_log().rewrites] == [f"layers.{i}" for i in range(12)]
