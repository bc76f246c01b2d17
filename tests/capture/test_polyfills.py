"""Every branch of each polyfill against the function that it stands for."""

from __future__ import annotations

import functools
import importlib
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from capture_support import Graphs, mlp
from peft import LoraConfig
from peft.tuners import lora
from peft.tuners.lora import dora
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import integrations, other
from torch import nn

from dorafx.capture.fingerprint import fingerprint
from dorafx.capture.polyfills import (
    POLYFILLS,
    make_cache_clear,
    make_dequantize_module_weight,
    make_get_base_layer,
    make_transpose,
)

ORIGINAL = integrations.dequantize_module_weight
POLYFILL = make_dequantize_module_weight(ORIGINAL)


class Plain(nn.Module):
    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.weight = weight


class Hqq(nn.Module):
    """No ``weight``: like HQQ's, it must not be asked for one."""

    def __init__(self) -> None:
        super().__init__()
        self.W_q = torch.full((2, 3), 5.0)

    def dequantize(self) -> torch.Tensor:
        return self.W_q * 0.5


class Quantized(torch.Tensor):
    def dequantize(self) -> torch.Tensor:
        return self * 7

    __torch_function__ = torch._C._disabled_torch_function_impl


class Params4bit(nn.Parameter):
    quant_state = "its state"


class Int8Params(nn.Parameter):
    SCB = torch.tensor([127.0, 254.0])


class Custom(nn.Parameter):
    pass


def forget_imports(name: str) -> None:
    """Dynamo keeps what a traced function imported, by its name and among the globals of the frame that it compiles, for good."""
    torch._dynamo.symbolic_convert._import_module.cache_clear()
    for module in list(sys.modules.values()):
        for key in [key for key in getattr(module, "__dict__", ()) if key.startswith(f"__import_{name}")]:
            delattr(module, key)


@pytest.fixture
def _quantizers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As much of bitsandbytes and torchao as PEFT sees."""

    def dequantize_4bit(data: torch.Tensor, state: Any) -> torch.Tensor:
        assert state == Params4bit.quant_state
        return data * 3

    def int8_vectorwise_dequant(data: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return data * scales.view(-1, 1) / 127

    module = types.ModuleType("bitsandbytes")
    module.__spec__ = importlib.machinery.ModuleSpec("bitsandbytes", None)
    module.functional = types.SimpleNamespace(  # type: ignore[attr-defined]
        dequantize_4bit=dequantize_4bit, int8_vectorwise_dequant=int8_vectorwise_dequant
    )
    monkeypatch.setitem(sys.modules, "bitsandbytes", module)
    monkeypatch.setattr(Quantized, "__module__", "torchao.dtypes")
    forget_imports("bitsandbytes")
    yield
    forget_imports("bitsandbytes")


def weight() -> torch.Tensor:
    return torch.arange(6.0).reshape(2, 3)


def eight_bit() -> nn.Module:
    module = Plain(Int8Params(weight()))
    module.state = types.SimpleNamespace(SCB=None)
    return module


BRANCHES: dict[str, Callable[[], nn.Module]] = {
    "parameter": lambda: Plain(nn.Parameter(weight())),
    "own parameter class": lambda: Plain(Custom(weight())),
    "HQQ": Hqq,
    "torchao": lambda: Plain(weight().as_subclass(Quantized)),
    "bare tensor": lambda: Plain(weight()),
    "4 bit": lambda: Plain(Params4bit(weight())),
    "8 bit": eight_bit,
}
CHANGED = {"HQQ": weight() * 0 + 2.5, "torchao": weight() * 7, "4 bit": weight() * 3}


@pytest.mark.usefixtures("_quantizers")
@pytest.mark.parametrize("branch", BRANCHES)
def test_dequantize_equals_the_original(branch: str) -> None:
    expected_module, module = BRANCHES[branch](), BRANCHES[branch]()
    expected, actual = ORIGINAL(expected_module), POLYFILL(module)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    if branch in CHANGED:
        torch.testing.assert_close(actual, CHANGED[branch])
    if not hasattr(module, "W_q") and branch not in ("torchao", "4 bit", "8 bit"):
        assert actual is module.weight
    if branch == "8 bit":
        torch.testing.assert_close(actual, weight() * torch.tensor([[1.0], [2.0]]))
        assert module.state.SCB is module.weight.SCB  # the original remembers the scales in the state


@pytest.mark.usefixtures("_quantizers")
@pytest.mark.parametrize("branch", BRANCHES)
def test_dequantize_is_traced_in_the_place_of_the_original(branch: str) -> None:
    module, graphs = BRANCHES[branch](), Graphs()

    def program(x: torch.Tensor) -> torch.Tensor:
        return x + integrations.dequantize_module_weight(module)

    x = torch.ones(2, 3)
    expected = program(x)
    # A class that Dynamo does not know may break the graph elsewhere; then it must still be right.
    fullgraph = branch not in ("4 bit", "8 bit")
    torch.testing.assert_close(torch.compile(program, backend=graphs, fullgraph=fullgraph)(x), expected)
    assert len(graphs) >= 1


@pytest.mark.parametrize("wrong", [None, [1.0, 2.0]])
def test_dequantize_raises_what_the_original_raises(wrong: Any) -> None:
    errors = []
    for function in (ORIGINAL, POLYFILL):
        with pytest.raises(TypeError) as caught:
            function(Plain(wrong))
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_8bit_weight_that_its_dequantisation_moved_is_moved_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def moves(moved: Any, state: Any) -> torch.Tensor:
        # Stands for an accelerator, which this machine may not have.
        module.weight = nn.Parameter(weight().to("meta"))
        return weight()

    module = Plain(Int8Params(weight()))
    monkeypatch.setattr(integrations, "dequantize_bnb_weight", moves)
    asked: list[torch.device] = []
    monkeypatch.setattr(
        nn.Parameter, "to", lambda self, device: asked.append(device) or nn.Parameter(weight()), raising=False
    )
    POLYFILL(module)
    assert asked == [torch.device("cpu")]
    assert module.weight.device.type == "cpu"


@pytest.mark.parametrize("parameter", [False, True])
@pytest.mark.parametrize("fan_in_fan_out", [False, True])
def test_transpose_equals_the_original(parameter: bool, fan_in_fan_out: bool) -> None:
    polyfill = make_transpose(other.transpose)
    flow = []
    for function in (other.transpose, polyfill):
        leaf = nn.Parameter(weight())
        given = leaf if parameter else leaf * 1
        result = function(given, fan_in_fan_out)
        torch.testing.assert_close(result.detach(), weight().T if fan_in_fan_out else weight())
        # Whether a gradient reaches the weight: not through a parameter that was made of another.
        other_leaf = torch.ones((), requires_grad=True)
        (result * other_leaf).sum().backward()
        flow.append(leaf.grad is not None)
    assert flow == [not (parameter and fan_in_fan_out)] * 2


def test_cache_clear_equals_the_original() -> None:
    polyfill = make_cache_clear(dora.DoraLinearLayer._cache_clear)
    layer = dora.DoraLinearLayer(fan_in_fan_out=False)
    cache = layer._dora_cache
    polyfill(layer)
    assert cache == {}
    layer._cache_store("a", 1)
    polyfill(layer)
    assert cache == {} and layer._dora_cache is cache


def test_dora_caching_means_under_compile_what_it_means_in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    model = mlp().eval()
    magnitudes = [m for m in model.modules() if isinstance(m, dora.DoraLinearLayer)]
    x, graphs = torch.randn(3, 32), Graphs()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)

    def same() -> None:
        expected = model(x)
        torch.testing.assert_close(compiled(x), expected)

    with torch.no_grad():
        same()
        assert not any(m._dora_cache for m in magnitudes)
        monkeypatch.setattr(dora, "ENABLE_DORA_CACHING", True)
        compiled(x)  # fills the caches
        assert all(len(m._dora_cache) == 2 for m in magnitudes)
        same()
        # A cache is stale when a factor is written without train() in between; compiled is then as stale as eager.
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(3)
        same()
        stale = compiled(x)
        model.train()
        assert not any(m._dora_cache for m in magnitudes)
        model.eval()
        same()
        assert not torch.allclose(compiled(x), stale)
        # Filled caches are cleared by the first forward that does not use them, traced as well.
        assert all(m._dora_cache for m in magnitudes)
        monkeypatch.setattr(dora, "ENABLE_DORA_CACHING", False)
        compiled(x)
        assert not any(m._dora_cache for m in magnitudes)
        same()


def _adapted(base: nn.Module) -> lora.Linear:
    return lora.Linear(base, "default", config=LoraConfig(r=2, use_dora=True), r=2)


def test_base_layers_are_the_originals() -> None:
    polyfill = make_get_base_layer(BaseTunerLayer.get_base_layer)
    plain = nn.Linear(4, 4)
    once = _adapted(plain)
    with_child = nn.Linear(4, 4)
    with_child.base_layer = nn.Linear(4, 4)
    unknown = Plain(torch.zeros(1))
    unknown.base_layer = plain
    for layer in (once, _adapted(with_child), types.SimpleNamespace(base_layer=unknown), _adapted(nn.Linear(3, 5))):
        assert polyfill(layer) is BaseTunerLayer.get_base_layer(layer)  # type: ignore[arg-type]


def test_a_call_asks_no_plain_layer_for_what_it_has_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's guards on absent attributes would."""
    model, x, asked = mlp().eval(), torch.randn(3, 32), []
    compiled = torch.compile(model, backend=Graphs(), fullgraph=True)
    with torch.no_grad():
        expected = compiled(x)
        ask = nn.Module.__getattr__
        monkeypatch.setattr(nn.Module, "__getattr__", lambda self, name: asked.append(name) or ask(self, name))
        compiled(x)
        assert not {"W_q", "base_layer"} & set(asked)
        monkeypatch.undo()
        # A child of that name is seen all the same.
        layer = next(m for m in model.modules() if isinstance(m, lora.Linear))
        inner = layer.base_layer
        inner.base_layer = nn.Linear(inner.in_features, inner.out_features)
        assert not torch.allclose(compiled(x), expected)
        torch.testing.assert_close(compiled(x), model(x))


def test_fingerprints_are_of_what_a_function_does(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = {
        "plain": "def f(a, b=2):\n    return a + b\n",
        "dressed": 'def f(a: int, b: int = 2) -> int:\n    """Sum."""\n    # by hand\n    return (a +\n        b)\n',
        "another_default": "def f(a, b=3):\n    return a + b\n",
        "another_body": "def f(a, b=2):\n    return b + a\n",
    }
    monkeypatch.syspath_prepend(str(tmp_path))
    prints = {}
    for name, body in bodies.items():
        (tmp_path / f"written_{name}.py").write_text(body)
        prints[name] = fingerprint(importlib.import_module(f"written_{name}").f)
    assert len(prints["plain"]) == 16
    assert prints["plain"] == prints["dressed"]
    assert len(set(prints.values())) == 3


def test_no_fingerprint_without_a_source_of_its_own() -> None:
    scope: dict[str, Any] = {}
    exec("def f(): return 1", scope)
    assert fingerprint(scope["f"]) == ""

    @functools.wraps(ORIGINAL)
    def wrapper(module: Any) -> Any:
        return ORIGINAL(module) * 2

    # inspect.getsource would show the wrapped function's source, and a polyfill would leave the wrapper out.
    assert fingerprint(wrapper) == ""
    assert fingerprint(len) == ""


def test_each_polyfill_knows_the_installed_original() -> None:
    found = {p.qualified: p for p in POLYFILLS}
    assert len(found) == len(POLYFILLS)
    assert fingerprint(ORIGINAL) in found["peft.utils.integrations.dequantize_module_weight"].known
    assert fingerprint(other.transpose) in found["peft.utils.other.transpose"].known
    cache_clear = found["peft.tuners.lora.dora.DoraLinearLayer._cache_clear"]
    assert fingerprint(dora.DoraLinearLayer._cache_clear) in cache_clear.known
