"""Graphs that are captured once and replayed, as CUDA graphs are: a replay sees the norms of its own call."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from integration_support import (
    assert_close,
    call,
    compile_eagerly,
    dora_sites,
    lora_config,
    peft_model,
    peft_perceptron,
    randomise,
    rewritten_sites,
    run,
    tokens,
)
from peft import get_peft_model
from reuse_support import LAYERS, OPTIMIZERS, Decoder, counts, one_token, overwrite, parameters
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CompileConfig

from dorafx import rewrite_log
from dorafx.backend import dorafx as backend
from dorafx.rewriter import hoist
from dorafx.runtime import norm_store, prologue


class Captured:
    """A compiled graph that keeps to the contract of CUDA graph trees. At the first call it remembers where its static
    inputs lie and takes copies of the others; a replay reads the static ones where they lay, copies the others into the
    same buffers, and leaves its outputs at the same addresses. A static input that has moved makes it record again."""

    def __init__(self, gm: torch.fx.GraphModule, static: set[int]) -> None:
        self.gm = gm
        self.static = static
        self.recordings = 0
        self.addresses: list[int] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []

    def __call__(self, *args: Any) -> list[Any]:
        addresses = [args[i].data_ptr() for i in sorted(self.static)]
        with torch.no_grad():
            if not self.recordings or addresses != self.addresses:
                self.recordings += 1
                self.addresses = addresses
                self.inputs = [a.detach() if i in self.static else a.clone() for i, a in enumerate(args)]
                self.outputs = []
            for i, (kept, given) in enumerate(zip(self.inputs, args)):
                if i not in self.static:
                    kept.copy_(given)
            results = list(self.gm(*self.inputs))
            if not self.outputs:
                self.outputs = [None if r is None else r.clone() for r in results]
            for kept, result in zip(self.outputs, results):
                if kept is not None:
                    kept.copy_(result)
        return [None if kept is None else kept.detach() for kept in self.outputs]


GRAPHS: list[Captured] = []


def _forward(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    """As Inductor decides it: what AOTAutograd took for static is."""
    GRAPHS.append(Captured(gm, set(TracingContext.get().fw_metadata.static_input_indices)))
    return make_boxed_func(GRAPHS[-1])


def _backward(gm: torch.fx.GraphModule, inputs: Any) -> Any:
    """What the forward saved lies where the forward's replay leaves it."""
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    GRAPHS.append(Captured(gm, {i for i, name in enumerate(names) if "tangent" not in name}))
    return make_boxed_func(GRAPHS[-1])


torch._dynamo.register_backend(
    aot_autograd(fw_compiler=_forward, bw_compiler=_backward, inference_compiler=_forward), name="dorafx_test_captured"
)
CODEGEN = {"dorafx.codegen": "dorafx_test_captured"}


@pytest.fixture(autouse=True)
def graphs() -> Iterator[list[Captured]]:
    GRAPHS.clear()
    yield GRAPHS
    GRAPHS.clear()


@pytest.mark.parametrize("optimizer", ["adamw fused", "adamw foreach"])
def test_training(optimizer: str, graphs: list[Captured]) -> None:
    model = peft_perceptron().train()
    twin = copy.deepcopy(model)
    compiled = compile_eagerly(model, **CODEGEN)
    ours, stock = (OPTIMIZERS[optimizer](parameters(m)) for m in (model, twin))
    for _ in range(4):
        got, expected = run(model, lambda: call(compiled, model)), run(twin, lambda: call(twin, twin))
        assert_close(got.output, expected.output, 1e-4)
        for name, gradient in expected.gradients.items():
            assert_close(got.gradients[name], gradient, 1e-3, name)
        ours.step()
        stock.step()
    assert len(graphs) == 2, "forward and backward"
    assert [g.recordings for g in graphs] == [1, 1]
    tensors = len(list(model.parameters()))
    # The inputs of the graph are the parameters, x, and the norms.
    assert len(graphs[0].static) == tensors and len(graphs[0].inputs) == tensors + 1 + LAYERS
    assert counts() == (4 * LAYERS, 0)


def test_decoding_replays_with_norms_that_changed(graphs: list[Captured]) -> None:
    decoder = Decoder(None, **CODEGEN).warm()
    for change in (overwrite, lambda p: p.data.mul_(1.2)):
        for p in parameters(decoder.model):
            change(p)
        decoder.step()
        decoder.step()
    assert counts() == (3 * LAYERS, 3 * LAYERS)
    assert [g.recordings for g in graphs] == [1]


def test_the_contract_tells_static_norms(monkeypatch: pytest.MonkeyPatch, graphs: list[Captured]) -> None:
    """The same with norms declared static, which they are not: every call that computes them has to record again."""
    mark = hoist.mark_new_input

    def static(node: Any) -> None:
        mark(node)
        node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}

    monkeypatch.setattr(hoist, "mark_new_input", static)
    model = peft_perceptron()
    compiled = compile_eagerly(model, **CODEGEN, **{"dorafx.norm_reuse": "never"})
    earlier = []  # alive, so that no two calls compute their norms at the same address
    with torch.no_grad():
        for _ in range(3):
            compiled(one_token())
            earlier.append(graphs[0].inputs)
    assert graphs[0].recordings == 3


def test_nothing_is_reused_nor_kept_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own ``torch.cuda.graph``: a reused norm would be read from where it lay at the capture, for ever."""
    decoder = Decoder().warm()
    before, kept = counts(), len(norm_store())
    monkeypatch.setattr(prologue, "being_captured", lambda: True)
    decoder.step()
    decoder.step()
    assert counts() == (before[0] + 2 * LAYERS, before[1])
    assert len(norm_store()) == kept
    monkeypatch.setattr(prologue, "being_captured", lambda: False)
    decoder.step()
    assert counts()[1] == before[1] + LAYERS


def test_graphs_that_share_parameters() -> None:
    """A layer that is called twice in one graph has one norm; in two graphs they share what the store keeps."""
    model = peft_perceptron()
    layer = model.base_model.model.second

    def twice(x: torch.Tensor) -> torch.Tensor:
        return layer(x) + layer(2 * x)

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = layer(x)
        torch._dynamo.graph_break()
        return y + layer(2 * x)

    x = torch.randn(1, 48)
    for program, step in ((twice, 1), (broken, 2)):
        norm_store().clear()
        rewrite_log().clear()
        torch._dynamo.reset()
        compiled = torch.compile(program, backend="dorafx", options={"dorafx.codegen": "eager"})
        with torch.no_grad():
            for _ in range(2):
                assert_close(compiled(x), program(x), 1e-5)
        assert counts() == (1, 2 * step - 1), "one computation serves every graph"
    norm_store().clear()
    rewrite_log().clear()
    torch._dynamo.reset()
    options = {"dorafx.codegen": "eager"}
    compiled = torch.compile(broken, backend="dorafx", options=options)
    optimizer = torch.optim.SGD(parameters(model), lr=0.1, fused=True)
    for _ in range(2):
        optimizer.zero_grad()
        assert_close(compiled(x), broken(x), 1e-5)
        compiled(x).sum().backward()
        optimizer.step()
    assert counts() == (2, 6), "once a step"


def test_generate_with_a_static_cache(graphs: list[Captured]) -> None:
    """``generate`` compiles its decoding step itself: one graph for all of its calls, recorded once for each cache that it makes."""
    model = peft_model()
    ids, sites = tokens(length=5), len(dora_sites(model))
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    expected = model.generate(input_ids=ids, disable_compile=True, **settings)
    rewrite_log().clear()
    counters.clear()
    config = CompileConfig(backend="dorafx", mode=None, fullgraph=True, options={**CODEGEN, "dorafx.strict": True})
    config._compile_all_devices = True  # without it, on GPUs alone
    for change in (None, overwrite):
        if change is not None:
            for p in parameters(model):
                change(p)
            expected = model.generate(input_ids=ids, disable_compile=True, **settings)
        before = counts()
        assert torch.equal(model.generate(input_ids=ids, compile_config=config, **settings), expected)
        # The first of the tokens comes with the prompt, which is not compiled.
        assert counts() == (before[0] + sites, before[1] + 4 * sites)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    (graph,) = graphs
    assert 1 <= graph.recordings <= 2
    assert rewritten_sites() == sorted(dora_sites(model.base_model.model))
    assert {record.kind for record in rewrite_log().misses} == {"not-compiled"}, "of the prompt"


class _TwoLayers(torch.nn.Module):
    """DoRA written by hand, so that it can be made of fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(2):
            for name, shape in (("W", (8, 8)), ("A", (2, 8)), ("B", (8, 2)), ("m", (8,))):
                self.register_parameter(f"{name}{i}", torch.nn.Parameter(torch.empty(shape), requires_grad=name != "W"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i in range(2):
            w, a, b, m = (self.get_parameter(f"{name}{i}") for name in "WABm")
            n = torch.linalg.norm(w + 0.5 * (b @ a), dim=1).detach()
            linear = torch.nn.functional.linear
            x = (m / n) * (linear(x, w) + 0.5 * linear(linear(x, a), b))
        return x


class _Calls(TorchDispatchMode):
    """What is called of ATen and dorafx, with the shapes of operands; all results lie on one device."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(func, torch._ops.OpOverload) and func.namespace != "prim":
            self.seen.append((str(func), [tuple(t.shape) for t in tree_leaves(args) if isinstance(t, torch.Tensor)]))
            assert all(t.device.type == self.device for t in tree_leaves(result) if isinstance(t, torch.Tensor)), func
        return result


torch._dynamo.register_backend(lambda gm, inputs: gm.forward, name="dorafx_test_operators")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_capture_calls_what_the_first_warm_up_called(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that all it launches was compiled before; and nothing reads what lies on the device. Of CUDA by fake tensors, of which no
    norm is kept."""
    calls = _Calls(device)

    def compiler(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        made = backend(gm, inputs, options={"dorafx.codegen": "dorafx_test_operators", "dorafx.strict": True})

        def run(*args: Any) -> Any:
            with calls:  # here, for Dynamo runs nothing compiled within such a mode
                return made(*args)

        return run

    seen = []
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext(), torch.device(device), torch.no_grad():
        compiled, x = torch.compile(_TwoLayers(), backend=compiler, fullgraph=True), torch.empty(1, 8)
        for captured in (False, False, True, True):
            monkeypatch.setattr(prologue, "being_captured", lambda captured=captured: captured)
            calls.seen = []
            compiled(x)
            seen.append(calls.seen)
    first, second, *captures = seen
    assert captures == [first, first]
    operators = [name for name, _ in first]
    assert operators.count("dorafx.row_norms.default") == 1, "both norms in one call"
    assert not {"aten._local_scalar_dense.default", "aten._to_copy.default", "aten.copy_.default"} & set(operators)
    assert ("dorafx.row_norms.default" in [name for name, _ in second]) == (device == "cuda"), "a kept norm is read"


# -- on a GPU ---------------------------------------------------------------------------------------------------------

needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_of_inductor(mode: str) -> None:
    model = peft_perceptron().cuda().train()
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="dorafx", mode=mode, fullgraph=True)
    ours, stock = (OPTIMIZERS["adamw fused"](parameters(m)) for m in (model, twin))
    x = torch.randn(3, 5, 24, device="cuda")
    for _ in range(6):
        torch.compiler.cudagraph_mark_step_begin()
        got, expected = run(model, lambda: compiled(x)), run(twin, lambda: twin(x))
        assert_close(got.output, expected.output, 1e-3)
        for name, gradient in expected.gradients.items():
            assert_close(got.gradients[name], gradient, 1e-2, name)
        ours.step()
        stock.step()
    token = torch.randn(1, 24, device="cuda")
    for _ in range(4):
        with torch.no_grad():
            torch.compiler.cudagraph_mark_step_begin()
            assert_close(compiled(token).clone(), model(token), 1e-3)
            for p in parameters(model):
                p.mul_(1.1)


def _of_one_shape() -> Any:
    """Layers whose norms are computed together."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Tanh(), torch.nn.Linear(24, 24))
    return randomise(get_peft_model(layers, lora_config(target_modules=["0", "2"], task_type=None))).eval()


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("build", [peft_perceptron, _of_one_shape])
def test_cuda_graph_of_the_user(build: Callable[[], Any], codegen: str) -> None:
    """Launch by launch what is captured was loaded before: ``tests/ops/test_captured_launches.py`` counts that without a device."""
    model = build().cuda()
    compiled = torch.compile(model, backend="dorafx", fullgraph=True, options={"dorafx.codegen": codegen})
    token = torch.randn(1, 24, device="cuda")
    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                compiled(token)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            output = compiled(token)
        for factor in (1.3, 1.0, 1.3, 1.3, 0.5):
            for p in parameters(model):
                p.data.mul_(factor)
            for _ in range(2):
                graph.replay()
                assert_close(output, model(token), 1e-3)
