"""Adapters that come, go, are switched, scaled and combined in a compiled model."""

from __future__ import annotations

import copy
import gc
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_support import assert_close, lora_config, peft_model, randomise
from peft import PeftModel, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.helpers import DoraCaching, disable_input_dtype_casting, rescale_adapter_scale
from peft_features import STARTS, Layers, Twin, Way, adapted, add, config, feature, layers, lora_layers, output, perturb

from dorafx import rewrite_log

SECTION = "Adapters"


def _two(**changes: Any) -> Any:
    model = adapted(**changes)
    add(model, "other")
    return model.eval()


@feature(
    SECTION,
    "`add_adapter`, `set_adapter`, `delete_adapter` after compiling",
    "works",
    "The first switch to an adapter of another rank recompiles; a switch back does not.",
)
def test_added_switched_deleted(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    twin.do(lambda m: add(m, "other"))
    for k, name in enumerate(("default", "other", "default")):
        twin.do(lambda m, name=name: m.set_adapter(name))
        twin.check(STARTS[k])
    with twin.without_recompilation():
        for name in ("other", "default"):
            twin.do(lambda m, name=name: m.set_adapter(name))
            twin.check()
    twin.do(lambda m: m.delete_adapter("other"))
    twin.check()
    twin.rewritten()


@feature(
    SECTION,
    "Deleted and added again under the same name",
    "works",
    "The new weights are used from the first step on, also with another rank, or where the old memory is reused.",
)
def test_again_under_the_same_name(way: Way) -> None:
    twin = Twin(way, _two)
    twin.do(lambda m: m.set_adapter("other"))
    twin.warm()
    for k, rank in enumerate((3, 3, 5)):

        def again(m: Any, k: int = k, rank: int = rank) -> None:
            m.set_adapter("default")
            m.delete_adapter("other")
            gc.collect()
            add(m, "other", 20 + k, r=rank)
            m.set_adapter("other")
            m.eval()

        twin.do(again)
        twin.check(STARTS[k])
    twin.rewritten()


@feature(
    SECTION,
    "The adapter in use deleted",
    "works",
    "PEFT activates the next adapter.",
)
def test_deleted_in_use(way: Way) -> None:
    twin = Twin(way, _two)
    twin.do(lambda m: m.set_adapter("other"))
    twin.warm()
    twin.do(lambda m: m.delete_adapter("other"))
    twin.check()
    twin.do(lambda m: m.set_adapter("default"))
    twin.check()


@feature(
    SECTION,
    "`load_adapter`, `save_pretrained`",
    "works",
    "After compiling, beside the first adapter or in its place. Saved files have stock PEFT's names and values.",
)
def test_loaded_and_saved(way: Way, tmp_path: Path) -> None:
    saved = adapted(r=3)
    perturb(saved, seed=8)
    saved.save_pretrained(tmp_path / "other")
    twin = Twin(way, adapted).warm()
    twin.do(lambda m: m.load_adapter(tmp_path / "other", "other"))
    twin.check()
    twin.do(lambda m: m.set_adapter("other"))
    twin.check("prompt")
    # Renamed: PEFT has no call for that but saving and loading.
    twin.do(lambda m: m.load_adapter(tmp_path / "other", "renamed", is_trainable=True))
    twin.do(lambda m: m.set_adapter("renamed"))
    twin.do(lambda m: m.delete_adapter("other"))
    twin.check()
    states = [get_peft_model_state_dict(m, adapter_name="renamed") for m, _ in twin.pairs()]
    torch.testing.assert_close(states[1], states[0], rtol=0, atol=0)
    twin.model.save_pretrained(tmp_path / "ours", selected_adapters=["default"])
    again = PeftModel.from_pretrained(layers(), tmp_path / "ours").eval()
    twin.do(lambda m: m.set_adapter("default"))
    assert_close(output(again, again, 3, 5).detach(), output(twin.stock, twin.stock, 3, 5).detach(), 1e-6)


@feature(
    SECTION,
    "`set_peft_model_state_dict` into an adapter in use",
    "works",
    "The weights are used from the first step on.",
)
def test_state_set(way: Way) -> None:
    source = adapted()
    twin = Twin(way, adapted).warm()
    for k, start in enumerate(STARTS):
        perturb(source, seed=30 + k)
        twin.do(lambda m: set_peft_model_state_dict(m, get_peft_model_state_dict(source)))
        twin.check(start)


@feature(
    SECTION,
    "An adapter with more targets than the first, after `optimize`",
    "works",
    "Layers that had no adapter when `optimize` was called run as stock PEFT in their first call, where nothing around them was compiled, and "
    "are compiled from the second on; the log has both.",
)
def test_more_targets(way: Way) -> None:
    twin = Twin(way, lambda: adapted(target_modules=["first"])).warm()

    def more(m: Any) -> None:
        add(m, "more", target_modules=["first", "second"])
        m.set_adapter("more")
        m.eval()

    twin.do(more)
    twin.outputs(1, 1)
    twin.check()
    told = [record.site for record in rewrite_log().misses if record.kind == "added-later"]
    assert told == ["base_model.model.second"] * (way.how == "optimize")
    assert "base_model.model.second" in {record.site for record in rewrite_log().rewrites}
    twin.rewritten("added-later")


@feature(
    SECTION,
    "`inject_adapter_in_model` after compiling",
    "works",
    'Compile the model with `torch.compile` or `optimize(scope="model")`: there is no adapter layer yet to compile on its own.',
)
def test_injected(way: Way) -> None:
    twin = Twin(way, layers, {"scope": "model"} if way.how == "optimize" else {})
    twin.outputs(1, 1)

    def inject(m: Any) -> None:
        inject_adapter_in_model(config(), m)
        randomise(m).eval()

    twin.do(inject)
    twin.warm()


@feature(
    SECTION,
    "`set_adapter` for each request, from threads",
    "works",
    "Put one lock around a switch and its forward, as with stock PEFT: the active adapter is a state of the model.",
)
def test_requests_from_threads(way: Way) -> None:
    twin = Twin(way, _two)
    wanted: dict[str, torch.Tensor] = {}
    for name in ("default", "other"):
        twin.do(lambda m, name=name: m.set_adapter(name, inference_mode=True))
        twin.outputs(1, 1)
        with torch.no_grad():
            wanted[name] = output(twin.stock, twin.stock, 1, 1)
    lock, wrong = threading.Lock(), []

    def serve(name: str) -> None:
        try:
            for _ in range(20):
                with lock, torch.no_grad():
                    twin.model.set_adapter(name, inference_mode=True)
                    assert_close(output(twin.call, twin.model, 1, 1), wanted[name], 1e-5, name)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(name,)) for name in ("default", "other", "default")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@feature(
    SECTION,
    "Forwards from threads, one adapter",
    "works",
    "Several lengths at once, first calls included.",
)
def test_forwards_from_threads(way: Way) -> None:
    twin = Twin(way, adapted)
    shapes = [(1, 1), (1, 5), (2, 9), (1, 1)]
    with torch.no_grad():
        wanted = [output(twin.stock, twin.stock, *shape) for shape in shapes]
    wrong = []

    def run(i: int) -> None:
        try:
            for k in range(8):
                with torch.no_grad():
                    place = (i + k) % len(shapes)
                    assert_close(output(twin.call, twin.model, *shapes[place]), wanted[place], 2e-5)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong
    twin.check()


@feature(
    SECTION,
    "`disable_adapter()`",
    "works",
    "Runs the base model; afterwards the kept norms are reused. PEFT 0.21 leaves a frozen adapter trainable after it "
    "(with and without dorafx): forwards outside of `no_grad` record gradients then.",
    inductor=True,
)
def test_disabled(way: Way, tmp_path: Path) -> None:
    adapted().save_pretrained(tmp_path)
    twin = Twin(way, lambda: PeftModel.from_pretrained(layers(), tmp_path).eval()).warm()
    with twin.stock.disable_adapter(), twin.model.disable_adapter():
        twin.check()
    for start in STARTS:
        twin.token()  # the first time in a graph of its own, as the adapter is trainable now
        computed = rewrite_log().norms.computed
        with twin.stock.disable_adapter(), twin.model.disable_adapter():
            twin.token()
            twin.prompt()
            twin.prefill()
            assert_close(output(twin.call, twin.model, 1, 1), output(layers(), twin.model, 1, 1), 1e-6)
        twin.same_state()
        twin.token()
        assert rewrite_log().norms.computed == computed
        with twin.stock.disable_adapter(), twin.model.disable_adapter():
            twin.check()
        twin.same_state()
        twin.check(start)
    twin.rewritten()


@feature(
    SECTION,
    "The base model as reference in a training loop (DPO)",
    "works",
    "`disable_adapter()` under `no_grad` in each step. Nothing is recompiled after the second step.",
)
def test_reference_by_disabling(way: Way) -> None:
    twin = Twin(way, adapted)
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], 1e-2) for m, _ in twin.pairs()]
    for step in range(5):
        with torch._dynamo.config.patch(error_on_recompile=step > 1):
            losses = []
            for (model, call), optimizer in zip(twin.pairs(), optimizers):
                model.train()
                policy = output(call, model, 3, 5)
                with torch.no_grad(), model.disable_adapter():
                    reference = output(call, model, 3, 5)
                loss = -torch.nn.functional.logsigmoid(policy - reference).mean()
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
            assert_close(losses[1], losses[0], 1e-4)
    twin.check()


@feature(
    SECTION,
    "`add_weighted_adapter`",
    "works",
    "`linear`, `cat`, `svd`, `ties`, `dare_linear`; also repeated under the same name with other weights.",
)
def test_weighted(way: Way) -> None:
    def both() -> Any:
        model = adapted()
        add(model, "other", r=4)
        return model.eval()

    twin = Twin(way, both).warm()
    for kind, more in (
        ("linear", {}),
        ("cat", {}),
        ("svd", {}),
        ("ties", {"density": 0.5}),
        ("dare_linear", {"density": 0.7}),
    ):
        for weights in ([0.7, 0.3], [0.2, 1.4]):

            def mixed(m: Any, kind: str = kind, weights: list[float] = weights, more: dict[str, Any] = more) -> None:
                m.add_weighted_adapter(["default", "other"], weights, "mixed", combination_type=kind, **more)
                m.set_adapter("mixed")

            twin.do(mixed)
            twin.outputs(1, 1)
            twin.outputs(3, 5)

            def gone(m: Any) -> None:
                m.set_adapter("default")
                m.delete_adapter("mixed")

            twin.do(gone)
            twin.outputs(1, 1)
    twin.check()


@feature(
    SECTION,
    "Two adapters active at once",
    "works",
    "`model.base_model.set_adapter([…])`. Each has its norm; PEFT applies the second to the result of the first.",
)
def test_two_active(way: Way) -> None:
    twin = Twin(way, _two)
    for names in (["default", "other"], "default", ["other", "default"], "other", ["default", "other"]):
        twin.do(lambda m, names=names: m.base_model.set_adapter(names))
        twin.outputs(1, 1)
        twin.training()
    twin.warm()


@feature(
    SECTION,
    "`set_scale`, `scale_layer`, `unscale_layer`, `rescale_adapter_scale`",
    "works",
    "The first strength is a constant of the graph; from the second on it is an input. Twenty strengths compile "
    "no more than three.",
)
def test_scales(way: Way) -> None:
    twin = Twin(way, adapted).warm()

    def scaled(m: Any, how: str, value: float) -> None:
        for layer in lora_layers(m):
            if how == "set_scale":
                layer.set_scale("default", value)
            else:
                getattr(layer, how)(value)

    def at_each(values: list[float]) -> None:
        for value in values:
            twin.do(lambda m, value=value: scaled(m, "set_scale", value))
            twin.outputs(1, 1)
            twin.outputs(3, 5)

    at_each([0.3, 0.7, 1.9])
    with twin.without_recompilation():
        at_each([0.1 * k + 0.03 for k in range(1, 12)])
        twin.do(lambda m: scaled(m, "scale_layer", 0.37))
        twin.outputs(1, 1)
        twin.do(lambda m: scaled(m, "unscale_layer", 0.37))
        twin.outputs(1, 1)
        for value in (0.25, 1.75):
            with rescale_adapter_scale(twin.stock, value), rescale_adapter_scale(twin.model, value):
                twin.outputs(1, 1)
            twin.outputs(1, 1)
    twin.do(lambda m: scaled(m, "set_scale", 0.0))
    twin.outputs(1, 1)
    twin.check()


@feature(
    SECTION,
    "`adapter_names=[…]` that name a DoRA adapter",
    "PEFT refuses",
    "A ValueError of PEFT's: mixed batches take LoRA adapters only. A forward that it refused leaves its hooks in the layers, so that "
    "stock PEFT, too, fails in the next one: make the model anew, or remove the hooks.",
)
def test_mixed_batch_of_dora(way: Way) -> None:
    twin = Twin(way, adapted)
    x = torch.randn(3, 24)
    error = twin.refused(lambda m, call: call(x, adapter_names=["default"] * 3))
    assert isinstance(error, ValueError) and "DoRA" in str(error)
    after = twin.refused(lambda m, call: call(x[:1]))
    assert after is not None, "what the page says of PEFT"
    for m, _ in twin.pairs():
        for module in m.modules():
            module._forward_pre_hooks.clear()
    twin.check()
    assert rewrite_log().rewrites and not rewrite_log().misses


@feature(
    SECTION,
    "`adapter_names=[…]` of LoRA adapters, beside a DoRA adapter",
    "works",
    "Such a batch runs as stock PEFT; the batches before and after it run compiled.",
)
def test_mixed_batch_of_lora(way: Way) -> None:
    def build() -> Any:
        model = adapted()
        for k, name in enumerate(("one", "two")):
            add(model, name, 40 + k, use_dora=False)
        return model.eval()

    twin = Twin(way, build).warm()
    x = torch.randn(4, 24)
    for names in (["one", "__base__", "two", "one"], ["two"] * 4, ["__base__"] * 4):
        with torch.no_grad():
            for _ in range(2):
                assert_close(twin.call(x, adapter_names=names), twin.stock(x, adapter_names=names), 1e-5, str(names))
        twin.token()
    twin.do(lambda m: m.set_adapter("one"))
    twin.outputs(3, 5)
    twin.do(lambda m: m.set_adapter("default"))
    twin.check()


@feature(
    SECTION,
    "`peft.helpers.DoraCaching`",
    "works",
    "Not needed: dorafx keeps norms itself, and less memory than PEFT's cache, which also holds the dense product. While it is on PEFT's "
    "cached norms are used, and those are stale after a write to a parameter in evaluation mode, as in stock PEFT.",
)
def test_caching(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    for _ in range(2):
        with DoraCaching():
            for _ in range(3):
                twin.outputs(1, 1)
                twin.outputs(3, 5)
            twin.training()
            twin.outputs(1, 1)
        twin.do(lambda m: perturb(m, seed=9))
        twin.do(lambda m: m.train())
        twin.do(lambda m: m.eval())
        twin.check()


@feature(
    SECTION,
    "`disable_input_dtype_casting`, `autocast_adapter_dtype=False`",
    "works",
    "A half-precision base with adapters in fp32 (PEFT's default) or in the base's dtype.",
)
def test_dtypes(way: Way) -> None:
    from peft import get_peft_model

    for autocast in (True, False):

        def build(autocast: bool = autocast) -> Any:
            model = get_peft_model(layers().to(torch.bfloat16), config(), autocast_adapter_dtype=autocast)
            return randomise(model).eval()

        twin = Twin(way, build, tolerance=3e-2)
        assert twin.model.base_model.model.first.lora_A["default"].weight.dtype == (
            torch.float32 if autocast else torch.bfloat16
        )
        x = torch.randn(3, 5, 24, dtype=torch.bfloat16)

        def compare(x: torch.Tensor = x, twin: Twin = twin) -> None:
            def both() -> None:
                expected, actual = (call(x) for _, call in twin.pairs())
                assert_close(actual, expected, 3e-2)

            error = twin.refused(lambda m, call: call(x))
            if error is None:
                both()

        compare()
        with disable_input_dtype_casting(twin.stock), disable_input_dtype_casting(twin.model):
            compare()
        compare()
        twin.rewritten()


@feature(
    SECTION,
    "`cast_adapter_dtype` after compiling",
    "works",
    "The parameters are new objects: one recompilation, and no outdated norm.",
)
def test_cast_later(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    twin.do(lambda m: m.to(torch.bfloat16))
    twin.do(lambda m: m.base_model._cast_adapter_dtype(adapter_name="default", autocast_adapter_dtype=True))
    x = torch.randn(3, 5, 24, dtype=torch.bfloat16)
    for shape in ((3, 5), (1, 1), (1, 1)):
        expected, actual = (call(x[: shape[0], : shape[1]]).detach() for _, call in twin.pairs())
        assert_close(actual, expected, 3e-2)
    twin.do(lambda m: m.float())
    twin.check()


@feature(
    SECTION,
    "`copy.deepcopy` of a compiled model, two copies with other weights",
    "works",
    "A copy of an optimized model is not compiled; `optimize` it by itself. The two share a norm only where "
    "contents are equal.",
)
def test_copies(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    twin.model = copy.deepcopy(twin.model)
    twin.call = twin.switched_on(twin.model)
    twin.do(lambda m: perturb(m, seed=12))
    twin.check()


@pytest.mark.slow
@feature(
    SECTION,
    "A language model whose adapters are switched while it decodes",
    "works",
    "A cache of transformers filled by one adapter is read by the other, as in stock PEFT.",
)
def test_language_model(way: Way) -> None:
    def build() -> Any:
        model = peft_model("llama", 2)
        model.add_adapter("other", lora_config(r=2))
        perturb(model, "other", 5)
        return model.eval()

    twin = Twin(way, build)
    ids = torch.randint(1, 60, (1, 12), generator=torch.Generator().manual_seed(2))

    def decoded(model: Any, call: Any) -> torch.Tensor:
        past, outputs = None, []
        with torch.no_grad():
            for step in range(7):
                model.set_adapter(("default", "other")[step // 2 % 2], inference_mode=True)
                chunk = ids[:, :4] if step == 0 else ids[:, step + 3 : step + 4]
                out = call(input_ids=chunk, past_key_values=past, use_cache=True)
                past = out.past_key_values
                outputs.append(out.logits)
        return torch.cat(outputs, 1)

    for _ in range(2):
        expected, actual = (decoded(m, call) for m, call in twin.pairs())
        assert_close(actual, expected, 2e-5)
    twin.do(lambda m: m.set_adapter("default"))
    twin.check()


def test_the_base_model_is_what_the_tests_say() -> None:
    """Both layers have one shape, so that one compilation serves both."""
    model = adapted()
    assert sum(isinstance(m, Layers) for m in model.modules()) == 1
    assert len({layer.base_layer.weight.shape for layer in lora_layers(model)}) == 1
    with pytest.raises(AssertionError):
        assert_close(output(model, model, 1, 1), output(layers(), model, 1, 1), 1e-2)
