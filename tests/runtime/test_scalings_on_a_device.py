"""A scaling that is a tensor stays one: reading its number makes the host wait for the device, and fails while a CUDA graph is
captured. dorafx reads none that the program does not read itself.

Counted are calls of ``aten::_local_scalar_dense``, which is what ``item()``, ``float(…)`` and ``bool(…)`` come to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from integration_support import assert_close, assert_same_run, compile_eagerly, peft_perceptron, run
from quantized_support import quantized
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

import dorafx
from dorafx import rewrite_log
from dorafx.backend import dorafx as backend
from dorafx.ops import norm
from dorafx.rewriter import closures, hoist

PROGRAMS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {}


def program(function: Callable[[Any, torch.Tensor], torch.Tensor]) -> Callable[[Any, torch.Tensor], torch.Tensor]:
    PROGRAMS[function.__name__] = function
    return function


def _lora(p: Any, x: torch.Tensor) -> torch.Tensor:
    return F.linear(F.linear(x, p.A), p.B)


@program
def direct(p: Any, x: torch.Tensor) -> torch.Tensor:
    n = torch.linalg.norm(p.W + p.scaling * (p.B @ p.A), dim=1).detach()
    return (p.m / n) * (F.linear(x, p.W) + _lora(p, x) * p.scaling)


@program
def delta(p: Any, x: torch.Tensor) -> torch.Tensor:
    g = p.m / torch.linalg.norm(p.W + p.scaling * (p.B @ p.A), dim=1).detach()
    base = F.linear(x, p.W)
    return base + ((g - 1) * base + g * _lora(p, x) * p.scaling)


@program
def merged(p: Any, x: torch.Tensor) -> torch.Tensor:
    v = p.W + p.scaling * (p.B @ p.A)
    return F.linear(x, p.m.unsqueeze(1) * v / v.norm(dim=1, keepdim=True))


@program
def differentiable_norm(p: Any, x: torch.Tensor) -> torch.Tensor:
    n = torch.linalg.norm(p.W + p.scaling * (p.B @ p.A), dim=1)
    return (p.m / n) * (F.linear(x, p.W) + _lora(p, x) * p.scaling)


def checkpointed(p: Any, x: torch.Tensor) -> torch.Tensor:
    found: torch.Tensor = torch.utils.checkpoint.checkpoint(lambda x: direct(p, x), x, use_reentrant=False)
    return found


@program
def read(p: Any, x: torch.Tensor) -> torch.Tensor:
    s = p.scaling.item()
    n = torch.linalg.norm(p.W + s * (p.B @ p.A), dim=1).detach()
    return (p.m / n) * (F.linear(x, p.W) + _lora(p, x) * s)


@program
def read_and_halved(p: Any, x: torch.Tensor) -> torch.Tensor:
    s = p.scaling.item() * 0.5
    n = torch.linalg.norm(p.W + s * (p.B @ p.A), dim=1).detach()
    return (p.m / n) * (F.linear(x, p.W) + _lora(p, x) * s)


# By default a graph ends where the program reads a number.
scalars_in_graphs = torch._dynamo.config.patch(capture_scalar_outputs=True)


class Layer(torch.nn.Module):
    """W ``[10, 12]``, rank 3, and a scaling of its own: a buffer or a parameter, without axes or with one of one element."""

    def __init__(self, name: str, trained: bool = False, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.forward = {**PROGRAMS, "checkpointed": checkpointed}[name].__get__(self)  # type: ignore[method-assign]
        self.W = torch.nn.Parameter(torch.empty(10, 12), requires_grad=False)
        self.A, self.B = torch.nn.Parameter(torch.empty(3, 12)), torch.nn.Parameter(torch.empty(10, 3))
        self.m = torch.nn.Parameter(torch.empty(10))
        if trained:
            self.scaling = torch.nn.Parameter(torch.empty(shape))
        else:
            self.register_buffer("scaling", torch.empty(shape))

    def filled(self) -> Layer:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        return self


class Reads(TorchDispatchMode):
    """Counts them. To be entered below a compiled frame, as Dynamo compiles and runs none within such a mode."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def reads_of(layer: Any, x: torch.Tensor, options: dict[str, Any] | None, train: bool) -> int:
    """Of the second forward (and its backward), as Dynamo's graph has them, or with dorafx's options as what it makes of the graph."""
    torch._dynamo.reset()
    counted = Reads()

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        made = gm.forward if options is None else backend(gm, inputs, options={**ONE_BY_ONE, **options})

        def call(*args: Any) -> Any:
            with counted:
                return made(*args)

        return call

    compiled = torch.compile(layer, backend=compiler, fullgraph=True)
    for _ in range(2):
        counted.count = 0
        with torch.set_grad_enabled(train):
            y = compiled(x)
        if train:
            with counted:
                y.sum().backward()
    return counted.count


# Of fake tensors the operators are called one by one; ``"eager"`` would write over buffers, for which it launches kernels.
torch._dynamo.register_backend(lambda gm, inputs: gm.forward, name="dorafx_test_one_by_one")
ONE_BY_ONE = {"dorafx.codegen": "dorafx_test_one_by_one", "dorafx.strict": True}
ROADS = [
    *({"dorafx.norm": algorithm} for algorithm in ("tiled", "factored")),
    *({"dorafx.compose": how} for how in ("accumulated", "triton", "triton_linear")),
    {"dorafx.norm_reuse": "never"},
]


@pytest.fixture
def host_is_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host's memory stands for a device's."""
    for module in (closures, hoist):
        monkeypatch.setattr(module, "waits_for_device", lambda node: node.target == "item")


def check_reads(layer: Layer, x: torch.Tensor, name: str, train: bool) -> None:
    reads = 1 if name.startswith("read") else 0
    assert reads_of(layer, x, None, train) == reads
    for road in ROADS[:1] if name == "merged" else ROADS:
        rewrite_log().clear()
        assert reads_of(layer, x, road, train) == reads, road
        in_graph = train and name in ("merged", "differentiable_norm")
        assert {r.norm_placement for r in rewrite_log().rewrites} == {"graph" if in_graph else "prologue"}


@scalars_in_graphs
@pytest.mark.parametrize("name", PROGRAMS)
def test_a_device_is_waited_for_as_often_as_by_the_program_itself(name: str) -> None:
    """On fake CUDA tensors, without gradients: a CPU's build of torch has no autograd for them."""
    with FakeTensorMode(shape_env=ShapeEnv()), torch.device("cuda"):
        check_reads(Layer(name), torch.empty(4, 12), name, False)


@scalars_in_graphs
@pytest.mark.parametrize("name", PROGRAMS)
def test_training_waits_as_often_as_the_program_itself(name: str, host_is_device: None) -> None:
    check_reads(Layer(name).filled(), torch.randn(4, 12), name, True)


@scalars_in_graphs
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", ["read", "read_and_halved"])
def test_the_tensor_in_place_of_the_number(name: str, shape: Any, host_is_device: None) -> None:
    """The prologue takes the tensor that the program reads a number from, and follows what is written to it."""
    layer = Layer(name, shape=shape).filled()
    compiled = compile_eagerly(layer)
    x, norms = torch.randn(1, 12), rewrite_log().norms
    with torch.no_grad():
        for change, computed in ((1.0, 1), (None, 1), (1.5, 2), (None, 2)):
            if change is not None:
                layer.scaling.mul_(change)
            assert_close(compiled(x), layer(x), 1e-6)
            assert norms.computed == computed
    assert norms.reused == 2
    assert {(r.norm_placement, r.decision) for r in rewrite_log().rewrites} == {("prologue", "")}


@scalars_in_graphs
def test_what_takes_numbers_alone_keeps_the_norm_in_the_graph() -> None:

    class Floored(Layer):
        def __init__(self) -> None:
            super().__init__("read")
            self.forward = self.floored  # type: ignore[method-assign]

        def floored(self, x: torch.Tensor) -> torch.Tensor:
            factor = self.B.clamp(min=self.scaling.item())
            n = torch.linalg.norm(self.W + factor @ self.A, dim=1).detach()
            return (self.m / n) * (F.linear(x, self.W) + F.linear(F.linear(x, self.A), factor))

    with FakeTensorMode(shape_env=ShapeEnv()), torch.device("cuda"):
        layer, x = Floored(), torch.empty(4, 12)
        assert reads_of(layer, x, ONE_BY_ONE, False) == 1
    (record,) = rewrite_log().rewrites
    assert record.norm_placement == "graph" and "takes a number that lies on a device" in record.decision


def reads_while(call: Callable[[], Any]) -> int:
    """By the profiler, which sees into compiled code."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    return sum(event.name == "aten::_local_scalar_dense" for event in seen.events())


@pytest.mark.parametrize("name", [*(n for n in PROGRAMS if not n.startswith("read")), "checkpointed"])
def test_scalings_that_are_parameters_or_buffers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norm, "_READ_AT_ONCE", ())  # the CPU stands for a device

    def check(layer: Layer) -> None:
        torch._dynamo.reset()
        compiled = compile_eagerly(layer, **{"dorafx.codegen": "aot_eager"})
        x = torch.randn(4, 12)
        expected = run(layer, lambda: layer(x))
        assert_same_run(run(layer, lambda: compiled(x)), expected)
        assert reads_while(lambda: run(layer, lambda: compiled(x))) == 0

    for trained in (False, True):
        check(Layer(name, trained).filled())


@pytest.mark.default_cases("modules-eager", "model-inductor")
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("scope", ["modules", "model"])
def test_optimize(scope: str, codegen: str) -> None:
    """A PEFT model whose scalings somebody made tensors."""
    model = peft_perceptron().train()
    for layer in (model.base_model.model.first, model.base_model.model.second):
        layer.scaling["default"] = torch.tensor(1.5)
    x = torch.randn(3, 5, 24)
    expected = run(model, lambda: model(x))
    dorafx.optimize(model, scope=scope, codegen=codegen, strict=True)
    for _ in range(2):
        actual = run(model, lambda: model(x))
    assert_close(actual.output, expected.output, 1e-5)
    assert reads_while(lambda: run(model, lambda: model(x))) == 0
    with torch.no_grad():
        model(x[:1, 0])
        assert reads_while(lambda: model(x[:1, 0])) == 0
    assert len(rewrite_log().rewrites) >= 2 and not rewrite_log().misses


@pytest.mark.parametrize("kind", ["nf4", "hqq 4 bit"])
def test_quantised_bases(kind: str) -> None:
    model = quantized(kind)
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.scaling["default"] = torch.tensor(1.5)
    x = torch.randn(2, 64)
    with torch.no_grad():
        expected = model(x)
        dorafx.optimize(model, codegen="eager", norm_reuse="never", strict=True)
        assert_close(model(x), expected, 1e-5)
        assert reads_while(lambda: model(x)) == 0
    assert len(rewrite_log().rewrites) == 2
