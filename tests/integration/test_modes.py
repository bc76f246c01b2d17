"""How a model may be compiled: dynamic shapes, Inductor's modes and options, freezing, compiled autograd, threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_support import (
    assert_all_rewritten,
    assert_close,
    assert_same_run,
    call,
    compile_eagerly,
    dora_sites,
    graphs_in_log,
    lora_config,
    peft_model,
    peft_perceptron,
    randomise,
    run,
    tokens,
)
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.custom_graph_pass import CustomGraphPass
from transformers import CompileConfig

import dorafx
from dorafx import rewrite_log
from dorafx.ops import norm
from dorafx.versions import minor

STRICT = {"dorafx.strict": True}


def graphs() -> int:
    """Graphs that Dynamo captured since the counters were cleared."""
    return int(counters["stats"]["unique_graphs"])


# -- dynamic shapes and recompilations --------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [True, None, False])
def test_lengths(dynamic: bool | None) -> None:
    """``dynamic=True`` compiles one graph for every length, ``None`` a second at the second length, ``False`` one a length."""
    counters.clear()
    model = peft_perceptron().train()
    options = {"dorafx.codegen": "eager", **STRICT}
    compiled = torch.compile(model, backend="dorafx", fullgraph=True, dynamic=dynamic, options=options)
    seen = []
    for length in (5, 9, 13, 33, 7):
        x = torch.randn(2, length, 24)
        expected = run(model, lambda x=x: model(x))
        assert_same_run(run(model, lambda x=x: compiled(x)), expected)
        seen.append(graphs())
    assert seen == {True: [1] * 5, None: [1, 2, 2, 2, 2], False: [1, 2, 3, 4, 5]}[dynamic]
    assert {r.norm_placement for r in rewrite_log().rewrites} == {"prologue"}


def test_numbers_that_are_inputs_of_the_graph_are_looked_at() -> None:
    """With ``dynamic=True`` the scaling is an input of the graph: norms are reused as long as it is the same."""
    model = peft_perceptron()
    compiled = torch.compile(
        model, backend="dorafx", fullgraph=True, dynamic=True, options={"dorafx.codegen": "eager", **STRICT}
    )
    x = torch.randn(1, 24)
    norms = rewrite_log().norms
    with torch.no_grad():
        for factor, computed in ((1.0, 2), (1.0, 2), (1.5, 4), (1.5, 4)):
            for layer in (model.base_model.model.first, model.base_model.model.second):
                layer.scaling["default"] = 1.5 * factor
            assert_close(compiled(x), model(x), 1e-5)
            assert norms.computed == computed
    assert norms.reused == 4
    assert {r.norm_placement for r in rewrite_log().rewrites} == {"prologue"}


@pytest.mark.default_cases("modules")
@pytest.mark.parametrize("scope", ["modules", "model"])
def test_no_recompilation_after_the_second_length_and_one_a_switch_of_adapters(scope: str) -> None:
    counters.clear()
    model = peft_model()
    model.add_adapter("second", lora_config(r=6))
    randomise(model, seed=4)
    model.set_adapter("default")
    shapes = 4 if scope == "modules" else 1  # graphs of one length
    dorafx.optimize(model, codegen="eager", scope=scope, strict=True)

    def forward(length: int) -> int:
        before = graphs()
        with torch.no_grad():
            model(input_ids=tokens(length=length), use_cache=False)
        return graphs() - before

    assert [forward(length) for length in (5, 9)] == [shapes, shapes]
    assert [forward(length) for length in (13, 21, 6, 40)] == [0] * 4
    for adapter, wanted in (("second", shapes), ("default", 0), ("second", 0)):
        model.set_adapter(adapter)
        compiled = [forward(length) for length in (11, 17)]
        assert sum(compiled) <= wanted, adapter
        assert sum(forward(length) for length in (23, 31)) == 0


@pytest.mark.parametrize(("scope", "compiled", "logged"), [("modules", 4, 4), ("blocks", 5, 4)])
def test_graphs_do_not_grow_with_depth(scope: str, compiled: int, logged: int) -> None:
    """Layers of one shape are compiled once, whatever their number. (A block with a cache is four graphs, and one of them is compiled
    again where the number of the block becomes a variable.)"""
    counts = []
    for layers in (2, 16):
        torch._dynamo.reset()
        rewrite_log().clear()
        counters.clear()
        model = dorafx.optimize(peft_model(layers=layers), codegen="eager", strict=True, scope=scope)
        with torch.no_grad():
            call(model, model)
        counts.append((graphs(), graphs_in_log(), rewrite_log().norms.computed))
    assert counts == [(compiled, logged, 14), (compiled, logged, 112)]


# -- modes and options ------------------------------------------------------------------------------------------------


def test_mode_and_options_exclude_each_other_as_in_torch_compile() -> None:
    model = peft_perceptron()
    messages = []
    for backend, options in (("dorafx", STRICT), ("inductor", {"max_autotune": True})):
        with pytest.raises(RuntimeError, match="Either mode or options can be specified") as caught:
            torch.compile(model, backend=backend, mode="max-autotune", options=options)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_an_unknown_option_of_inductor_is_inductors_error() -> None:
    compiled = torch.compile(peft_perceptron(), backend="dorafx", options={**STRICT, "max_autotoon": True})
    with pytest.raises(Exception, match="Unexpected optimization option max_autotoon"):
        compiled(torch.randn(3, 24))


@pytest.mark.parametrize("way", ["mode", "options", "optimize", "generate"])
def test_reduce_overhead_reaches_inductor(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor's CUDA graphs: by the mode, with options of dorafx by Inductor's own option, and by ``generate`` unasked."""
    asked: list[bool] = []

    def compile_fx(gm: Any, inputs: Any, config_patches: dict[str, Any], **rest: Any) -> Any:
        asked.append(config_patches.get("triton.cudagraphs", False))
        return gm.forward

    monkeypatch.setattr(torch._inductor.compile_fx, "compile_fx", compile_fx)
    with torch.no_grad():
        if way == "generate":
            decoder = peft_model()
            settings = {"max_new_tokens": 2, "do_sample": False, "cache_implementation": "static"}
            for config in (
                CompileConfig(backend="dorafx"),
                CompileConfig(backend="dorafx", mode=None, options={**STRICT, "triton.cudagraphs": True}),
            ):
                config._compile_all_devices = True
                decoder.generate(input_ids=tokens(), compile_config=config, **settings)
            assert asked == [True, True]
            assert len(rewrite_log().rewrites) == 2 * len(dora_sites(decoder))
            # ``generate`` compiles the steps of one token; the prompt runs as the model is written, and the log says so.
            assert {record.kind for record in rewrite_log().misses} == {"not-compiled"}
            return
        model, x = peft_perceptron(), torch.randn(1, 24)
        expected = model(x)
        torch.compile(model, backend="dorafx", options=STRICT)(x)
        assert asked.pop() is False
        rewrite_log().clear()
        torch._dynamo.reset()
        if way == "optimize":
            dorafx.optimize(model, scope="model", mode="reduce-overhead", norm_reuse="never", strict=True)
            compiled = model
        elif way == "mode":
            compiled = torch.compile(model, backend="dorafx", mode="reduce-overhead")
        else:
            options = {**STRICT, "dorafx.norm_reuse": "never", "triton.cudagraphs": True}
            compiled = torch.compile(model, backend="dorafx", options=options)
        assert_close(compiled(x), expected, 1e-5)
    assert asked == [True] and len(rewrite_log().rewrites) == 2


@pytest.mark.slow
def test_modes_and_options() -> None:
    """Real compilations by Inductor. Options are seen to arrive where Inductor reads them."""
    model = peft_perceptron().train()
    x = torch.randn(3, 5, 24)
    expected = run(model, lambda: model(x))
    for mode in ("default", "reduce-overhead", "max-autotune"):
        torch._dynamo.reset()
        rewrite_log().clear()
        compiled = torch.compile(model, backend="dorafx", mode=mode, fullgraph=True)
        for _ in range(2):
            assert_same_run(run(model, lambda call=compiled: call(x)), expected)
        assert_all_rewritten(model)
    model.eval()
    seen: list[int] = []

    class Seen(CustomGraphPass):
        def __call__(self, graph: Any) -> None:
            seen.append(inductor_config.max_fusion_size)

        def uuid(self) -> str:
            return "seen"

    torch._dynamo.reset()
    options = {**STRICT, "max_fusion_size": 7, "post_grad_custom_post_pass": Seen(), "fx_graph_cache": False}
    compiled = torch.compile(model, backend="dorafx", fullgraph=True, options=options)
    with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
        assert_close(compiled(x), expected.output, 1e-5)
    assert seen == [7], "the user's own graph pass ran, under the user's other options"


@pytest.mark.slow
def test_freezing_makes_norms_constants() -> None:
    """With Inductor's freezing, parameters are constants of the graph, and so are norms: nothing is left for the prologue,
    and the compiled code computes none, whatever becomes of the parameters."""
    model, x = peft_perceptron(), torch.randn(3, 5, 24)
    computed: list[int] = []
    original = norm.tiled

    def counted(*args: Any) -> torch.Tensor:
        computed.append(1)
        return original(*args)

    with inductor_config.patch(freezing=True), torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(norm, "tiled", counted)
        expected = model(x)
        compiled = torch.compile(model, backend="dorafx", fullgraph=True, options=None)
        assert_close(compiled(x), expected, 1e-5)
        assert {r.norm_placement for r in rewrite_log().rewrites} == {"graph"}
        at_compilation = len(computed)
        for _ in range(2):
            assert_close(compiled(x), expected, 1e-5)
        assert len(computed) == at_compilation >= 2
        assert rewrite_log().norms.computed == 0
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert (compiled(x) - model(x)).abs().max() > 1e-2, "Inductor alone does not follow either"
        assert len(computed) == at_compilation


def test_compiled_autograd() -> None:
    """The backward of a step is captured as a graph of its own and compiled by dorafx too."""
    counters.clear()
    model = peft_perceptron().train()
    x = torch.randn(3, 5, 24)
    expected = run(model, lambda: model(x))
    options = {"dorafx.codegen": "aot_eager", **STRICT}
    compiled = torch.compile(model, backend="dorafx", fullgraph=True, options=options)
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="dorafx", options=options)):
        for _ in range(3):
            assert_same_run(run(model, lambda: compiled(x)), expected)
    assert counters["compiled_autograd"]["captures"] == 1
    assert_all_rewritten(model)
    # In one compiled function.
    torch._dynamo.reset()
    rewrite_log().clear()

    @torch.compile(backend="dorafx", options=options)
    def step(x: torch.Tensor) -> torch.Tensor:
        output = model(x)
        output.sin().sum().backward()
        return output

    with torch._dynamo.config.patch(compiled_autograd=True):
        model.zero_grad(set_to_none=True)
        assert_close(step(x).detach(), expected.output, 1e-5)
    for name, gradient in expected.gradients.items():
        found = model.get_parameter(name).grad
        assert found is not None
        assert_close(found, gradient, 1e-5, name)
    assert {r.pattern for r in rewrite_log().rewrites} == {"linear"}


# -- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(
    minor(torch.__version__) < (2, 13),
    reason="Dynamo itself crashes where several threads compile (seen on torch 2.11)",
)
def test_threads_compile_and_run_regions_of_their_own_and_a_shared_one() -> None:
    """Four threads: each compiles a model of its own at lengths of its own, and all of them one that they share."""
    shared = peft_perceptron()
    compiled = compile_eagerly(shared)
    own = [randomise(peft_perceptron(), seed) for seed in range(4)]
    failures: list[BaseException] = []
    start = threading.Barrier(4)

    def work(number: int) -> None:
        try:
            start.wait()
            mine = compile_eagerly(own[number])
            for length in (1, 5 + number, 9 + number):
                x = torch.randn(1, length, 24)
                with torch.no_grad():
                    assert_close(mine(x), own[number](x), 1e-5)
                    assert_close(compiled(x), shared(x), 1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]
    assert not rewrite_log().misses


# -- artifacts --------------------------------------------------------------------------------------------------------

_ARTIFACTS = """
import json, sys
from pathlib import Path
import torch
from torch._dynamo.utils import counters
from integration_support import call, peft_perceptron, run
from dorafx import rewrite_log
from dorafx._compat import inductor
file, edited = Path(sys.argv[1]), sys.argv[2]
if edited:
    inductor.source_hash = lambda: edited
if file.exists():
    assert torch.compiler.load_cache_artifacts(file.read_bytes()) is not None
model = peft_perceptron().train()
expected = run(model, lambda: call(model, model))
compiled = torch.compile(model, backend="dorafx", fullgraph=True, options={"dorafx.strict": True})
actual = run(model, lambda: call(compiled, model))
torch.testing.assert_close(actual.output, expected.output, rtol=1e-4, atol=1e-5)
for name, gradient in expected.gradients.items():
    torch.testing.assert_close(actual.gradients[name], gradient, rtol=1e-3, atol=1e-4)
if not file.exists():
    content, info = torch.compiler.save_cache_artifacts()
    file.write_bytes(content)
found = {k: v for k, v in counters["aot_autograd"].items() if "cache" in k}
print("RESULT" + json.dumps([found, len(rewrite_log().rewrites)]))
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_cache_artifacts_of_another_machine(tmp_path: Path) -> None:
    """``torch.compiler.save_cache_artifacts`` of one process serve another with empty caches, unless dorafx has changed."""

    def process(cache: str, edited: str = "") -> Any:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / cache),
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).parents[1] / "support"), *filter(None, [os.environ.get("PYTHONPATH")])]
            ),
        }
        command = [sys.executable, "-W", "ignore", "-c", _ARTIFACTS, str(tmp_path / "artifacts"), edited]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.rsplit("RESULT", 1)[1])

    cold, rewritten = process("first")
    assert cold == {"autograd_cache_miss": 1, "autograd_cache_saved": 1} and rewritten == 2
    assert process("second") == [{"autograd_cache_hit": 1}, 2], "the log of a warm start is complete too"
    edited, rewritten = process("third", "edited since")
    assert not edited.get("autograd_cache_hit") and edited["autograd_cache_miss"] == 1 and rewritten == 2
