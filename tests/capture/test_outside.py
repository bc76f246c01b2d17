"""DoRA layers that run outside of every graph: each is in the log, with the cause."""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import pickle
import weakref
from typing import Any

import outside_programs
import pytest
import torch
from integration_support import peft_model
from outside_programs import PROGRAMS, compiled, rows, two
from peft import get_peft_model
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import CompileConfig

import dorafx
from dorafx import RewriteMissError, rewrite_log
from dorafx._compat.dynamo import graph_statistics
from dorafx.log import ReasonKind
from dorafx.scope import adapted_modules

LAYERS = {"base_model.model.first", "base_model.model.second"}
Codegen = pytest.mark.parametrize("codegen", ["eager", "inductor"])


def outside() -> dict[str, str]:
    return {record.site: record.kind for record in rewrite_log().misses}


@pytest.mark.default_cases(*(f"{kind.value}-eager" for kind in PROGRAMS), f"{ReasonKind.ADDED_LATER.value}-inductor")
@Codegen
@pytest.mark.parametrize("kind", PROGRAMS, ids=lambda kind: kind.value)
def test_cause_is_logged(kind: ReasonKind, codegen: str) -> None:
    PROGRAMS[kind](codegen)
    misses = rewrite_log().misses
    assert {record.kind for record in misses} == {kind.value}
    assert all(record.reason and record.advice for record in misses)
    sites = {record.site for record in misses}
    assert len(sites) == len(misses), "a layer is said once"
    if kind is ReasonKind.ADDED_LATER:
        assert sites == {"base_model.model.second"}
    elif kind is not ReasonKind.NOT_COMPILED:
        assert {site.removeprefix("_fsdp_wrapped_module.") for site in sites} == LAYERS


def test_function_is_named() -> None:
    outside_programs.disabled("eager")
    assert "Two.forward" in rewrite_log().misses[0].reason
    assert "(it prints)" in rewrite_log().misses[0].reason
    rewrite_log().clear()
    outside_programs.beyond_the_limit("eager")
    assert "PeftModel" in rewrite_log().misses[0].reason


def test_added_layer_is_compiled_from_its_second_call() -> None:
    outside_programs.added_later("eager")
    assert {record.site for record in rewrite_log().rewrites} == LAYERS


def test_added_layers_are_restored() -> None:
    model = two("first")
    dorafx.optimize(model, codegen="eager")
    model.add_adapter("wider", outside_programs.lora_config(task_type=None, target_modules=["first", "second"]))
    model.set_adapter("wider")
    model(rows(20))
    dorafx.restore(model)
    assert all(
        module._compiled_call_impl is None for module in model.modules() if "peft" not in type(module).__module__
    )
    rewrite_log().clear()
    model(rows(20))
    assert not rewrite_log().records


def test_strict_raises() -> None:
    model = two("first", "second")
    inner = model.base_model.model
    inner.forward = torch.compiler.disable(inner.forward)
    function = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True})
    with pytest.raises(RewriteMissError, match=r"first: torch\.compiler\.disable keeps Two\.forward"):
        function(rows(20))


@Codegen
@pytest.mark.parametrize("scope", ["model", "modules"])
def test_another_backend_trains_an_optimized_model(scope: str, codegen: str) -> None:
    """Results are stock's, and each layer is named once, with the backend."""
    model = two("first", "second").train()
    stock = copy.deepcopy(model)
    dorafx.optimize(model, scope=scope)
    step = torch.compile(lambda x: model(x).square().mean(), backend="aot_eager" if codegen == "eager" else codegen)
    for _ in range(2):
        step(rows(20)).backward()
        stock(rows(20)).square().mean().backward()
    for own, other in zip(model.parameters(), stock.parameters()):
        torch.testing.assert_close(own.grad, other.grad)
    assert outside() == dict.fromkeys(LAYERS, "another-backend") and len(rewrite_log().records) == 2
    assert f"the backend '{'aot_eager' if codegen == 'eager' else 'inductor'}'" in rewrite_log().misses[0].reason


@pytest.mark.parametrize("kind", ["embedding", "convolution"])
def test_another_backend_and_other_layers(kind: str) -> None:
    layers = {"embedding": nn.Embedding(7, 24), "convolution": nn.Conv2d(3, 4, 3)}
    inputs = {"embedding": torch.arange(5)[None], "convolution": torch.randn(2, 3, 6, 6)}
    config = outside_programs.lora_config(task_type=None, target_modules=["0"])
    model = outside_programs.randomise(get_peft_model(nn.Sequential(layers[kind]), config))
    stock = copy.deepcopy(model)
    dorafx.optimize(model, codegen="eager")
    torch.testing.assert_close(torch.compile(model, backend="aot_eager")(inputs[kind]), stock(inputs[kind]))
    assert outside() == {"base_model.model.0": "another-backend"}


def test_generation_that_compiles_its_steps() -> None:
    """With a static cache on a GPU, here as on any device: Inductor gets the steps, unless it is told of dorafx."""
    model = peft_model()
    dorafx.optimize(model, codegen="eager")
    for backend, kinds in (("aot_eager", {"another-backend"}), ("dorafx", set())):
        config = CompileConfig(backend=backend, mode=None, fullgraph=False)
        config._compile_all_devices = True
        settings = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static"}
        model.generate(input_ids=torch.arange(1, 6)[None], compile_config=config, **settings)
        assert {record.kind for record in rewrite_log().misses} == kinds
        assert {r.site for r in rewrite_log().records} == {name for name, _ in adapted_modules(model)}
        rewrite_log().clear()


def test_strict_raises_where_another_backend_compiles() -> None:
    model = two("first", "second")
    dorafx.optimize(model, codegen="eager", strict=True)
    with pytest.raises(RewriteMissError, match=r"first: torch\.compile compiles it with the backend 'aot_eager'"):
        torch.compile(model, backend="aot_eager")(rows(20))


def _exported(model: Any) -> None:
    torch.export.export(model, (rows(20),), strict=True)


def _compiled_once_restored(model: Any) -> None:
    torch.compile(dorafx.restore(model), backend="aot_eager")(rows(20))


def _other_compiled(model: Any) -> None:
    torch.compile(two("first", "second"), backend="aot_eager")(rows(20))


def _disabled_adapter(model: Any) -> None:
    with model.disable_adapter():
        torch.compile(model, backend="aot_eager")(rows(20))


@pytest.mark.parametrize("call", [_exported, _compiled_once_restored, _other_compiled, _disabled_adapter])
def test_no_miss_where_another_backend_computes_no_dora(call: Any) -> None:
    """Or where it is no optimized model of which it does, or no backend."""
    model = two("first", "second")
    dorafx.optimize(model, codegen="eager", strict=True)
    call(model)
    assert not rewrite_log().records


def test_all_of_an_optimized_model_compiled_with_dorafx() -> None:
    model = two("first", "second")
    stock = copy.deepcopy(model)
    dorafx.optimize(model, codegen="eager")
    whole = torch.compile(lambda x: 2 * model(x), backend="dorafx", options={"dorafx.codegen": "eager"})
    torch.testing.assert_close(whole(rows(20)), 2 * stock(rows(20)))
    assert {record.site for record in rewrite_log().rewrites} == LAYERS and not rewrite_log().misses


def test_strict_lets_a_stance_pass() -> None:
    model = two("first", "second")
    dorafx.optimize(model, codegen="eager", strict=True)
    with torch.compiler.set_stance("force_eager"):
        model(rows(20))
    assert set(outside().values()) == {"stance"}


def test_stock_model_beside_is_no_miss() -> None:
    """Nor is a model that was compiled with dorafx and is called as it was."""
    model, other = two("first", "second"), two("first", "second")
    compiled(model, "eager")(rows(20))
    rewrite_log().clear()
    other(rows(20))
    model(rows(20))
    assert not rewrite_log().records


def _closure_of_an_optimizer(model: Any) -> None:
    optimizer = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad], max_iter=1)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = model(rows(20)).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


@torch.compiler.disable
def _evaluation(model: Any) -> None:
    model(rows(20))


@pytest.mark.parametrize(
    "call",
    [_closure_of_an_optimizer, _evaluation, lambda model: torch.jit.trace(model, (rows(20),))],
    ids=["optimizer", "evaluation", "trace"],
)
def test_stock_call_in_a_disabled_function_is_no_miss(call: Any) -> None:
    model = two("first", "second")
    torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True})(rows(20))
    call(model)
    assert not rewrite_log().misses


def test_stock_calls_beside_do_not_hide_what_follows() -> None:
    model = two("first", "second")
    function = torch.compile(model, backend="dorafx", dynamic=False, options={"dorafx.codegen": "eager"})
    function(rows(20))
    for _ in range(40):
        model(rows(20))
    with torch._dynamo.config.patch(recompile_limit=1):
        function(rows(7))
    assert set(outside()) == LAYERS and set(outside().values()) == {"recompile-limit"}


def test_said_once_although_the_model_was_not_known() -> None:
    model = two("first", "second")
    function = compiled(model, "eager")
    with torch.compiler.set_stance("force_eager"):
        for _ in range(2):
            function(rows(20))
            dorafx.optimize(two("first"), codegen="eager")
    assert sorted(record.site for record in rewrite_log().misses) == sorted(LAYERS)


def test_disabled_compiled_model() -> None:
    model = two("first", "second")
    function = compiled(model, "eager")
    function(rows(20))
    torch.compiler.disable(function)(rows(20))
    assert outside() == dict.fromkeys(LAYERS, "compiler-disabled")


def test_restored_and_copied_models_are_stock() -> None:
    model = two("first", "second")
    dorafx.optimize(model, codegen="eager")
    twin = copy.deepcopy(model)
    loaded = pickle.loads(pickle.dumps(model))
    dorafx.restore(model)
    for one in (model, twin, loaded):
        one(rows(20))
    assert not rewrite_log().records


def test_traced_calls_are_no_misses() -> None:
    model = two("first", "second")
    dorafx.optimize(model, codegen="eager")
    with torch.no_grad():
        torch.export.export(model, (rows(20),), strict=False)
        make_fx(model.base_model.model.first.forward)(rows(20))
    assert not outside()


def test_said_again_in_a_cleared_log() -> None:
    model = two("first", "second")
    dorafx.optimize(model, codegen="eager")
    for _ in range(2):
        rewrite_log().clear()
        with torch.compiler.set_stance("force_eager"):
            model(rows(20))
            model(rows(20))
        assert [record.site for record in rewrite_log().misses] == sorted(LAYERS)


def test_served_model_is_not_kept_alive() -> None:
    deleted: list[Any] = []
    model = two("first", "second")
    dorafx.optimize(model, codegen="eager")
    model(rows(20))
    weakref.finalize(model, deleted.append, None)
    torch._dynamo.reset()
    del model
    gc.collect()
    assert deleted


def test_pickle_holds_nothing_of_it() -> None:
    """A DoRA layer is pickled as PEFT's own."""
    model = two("first", "second")
    plain = pickle.dumps(model)
    dorafx.optimize(model, codegen="eager")
    dorafx.restore(model)
    assert pickle.dumps(model) == plain


def test_loop_of_prompts_tokens_and_no_adapter_stays_within_the_limit() -> None:
    """Prompts, tokens with a cache, a prompt alone, and all of it with the adapter disabled, then training: as one graph each."""
    model = peft_model(layers=2)
    function = compiled(model, "eager")

    def decode(prompt: int) -> None:
        out = function(input_ids=torch.arange(1, prompt + 1)[None], use_cache=True)
        for token in range(3):
            out = function(input_ids=torch.tensor([[token + 1]]), past_key_values=out.past_key_values, use_cache=True)
        function(input_ids=torch.ones(1, 1, dtype=torch.long))

    for _ in range(2):
        with torch.no_grad():
            decode(9)
            decode(12)
            with model.disable_adapter():
                decode(9)
        model.train()
        ids = torch.arange(1, 11)[None]
        function(ids, labels=ids).loss.backward()
        model.eval()
    assert not outside()
    before = graph_statistics()
    with torch.no_grad():
        decode(9)
    assert graph_statistics() == before, "nothing is compiled again"


def test_limit_of_the_user_stays() -> None:
    model = two("first", "second")
    dorafx.optimize(model, codegen="eager", scope="modules")
    with torch._dynamo.config.patch(recompile_limit=1):
        model(rows(20))
        with torch.no_grad():
            model(rows(20))
        model(rows(4))
    assert set(outside().values()) == {"recompile-limit"}


@pytest.mark.default_cases("modules")
@pytest.mark.parametrize("scope", ["modules", "model"])
def test_more_variants_than_dynamos_default(scope: str) -> None:
    model = two("first", "second")
    dorafx.optimize(model, codegen="eager", scope=scope, dynamic=False)
    with torch.no_grad():
        for n in range(10, 22):
            model(rows(n))
    assert not outside()


class Printing(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @torch.compiler.disable
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_explain_counts_the_layers() -> None:
    model = two("first", "second")
    model.base_model.model.second = Printing(model.base_model.model.second)
    explanation = dorafx.explain(model, rows(20))
    assert len(explanation.layers) == 2
    assert explanation.layers_outside == ["base_model.model.second.inner"]
    assert [(m.site, m.kind) for m in explanation.misses] == [("base_model.model.second.inner", "compiler-disabled")]
    assert "1 of 2 DoRA layers are in graphs" in str(explanation)


def test_explain_and_verify_leave_the_process_log_alone() -> None:
    model = two("first", "second")
    model.base_model.model.second = Printing(model.base_model.model.second)
    for one in (model, lambda x: model(x)):
        assert [m.kind for m in dorafx.explain(one, rows(20)).misses] == ["compiler-disabled"]
        assert [m.kind for m in dorafx.verify(one, rows(20)).log.misses] == ["compiler-disabled"]
    assert not rewrite_log().records


def test_explain_names_layers_that_computed_nothing() -> None:
    model = two("first", "second")
    model.base_model.model.second.merge()
    explanation = dorafx.explain(model, rows(20))
    assert explanation.layers_outside == ["base_model.model.second"]
    assert "1 layer without a record of its own" in str(explanation)
    assert not explanation.misses


def test_names_are_those_of_the_model_where_its_graph_breaks() -> None:
    model = peft_model(layers=2)

    def announce(*args: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            print("block")

    for block in model.base_model.model.model.layers:
        block.register_forward_pre_hook(announce)
    with torch.no_grad():
        compiled(model, "eager")(torch.arange(1, 10)[None])
    names = {name for name, _ in model.named_modules()}
    assert {record.site for record in rewrite_log().records} <= names
    assert len(rewrite_log().rewrites) == 14
