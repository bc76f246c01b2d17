"""Fast and never stale: whatever happens to a model between two decoding steps, the next step is that of stock PEFT.

Inputs of one token are decoding steps: their norms are reused. Every test asserts by the counters that reuse was in play,
changes something, and compares with the stock model afterwards.
"""

from __future__ import annotations

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import (
    assert_close,
    compile_eagerly,
    lora_config,
    peft_model,
    peft_perceptron,
    randomise,
    tokens,
)
from peft import set_peft_model_state_dict

import dorafx
from dorafx import rewrite_log
from dorafx.runtime import norm_store

LAYERS = 2  # of the perceptron


@pytest.fixture(autouse=True)
def _empty_store() -> None:
    norm_store().clear()


def one_token(seed: int = 6) -> torch.Tensor:
    return torch.randn((1, 24), generator=torch.Generator().manual_seed(seed))


def prompt() -> torch.Tensor:
    return torch.randn((3, 5, 24), generator=torch.Generator().manual_seed(7))


class Decoder:
    """A stock model and what dorafx compiled of it, called with one token and compared."""

    def __init__(self, model: Any = None, **options: Any) -> None:
        self.model = peft_perceptron() if model is None else model
        self.compiled = compile_eagerly(self.model, **options)

    def step(self, x: torch.Tensor | None = None) -> None:
        x = one_token() if x is None else x
        with torch.no_grad():
            assert_close(self.compiled(x), self.model(x), 1e-5)

    def warm(self) -> Decoder:
        """Two steps: the second reuses every norm."""
        self.step()
        before = counts()
        self.step()
        assert counts() == (before[0], before[1] + LAYERS)
        return self


def counts() -> tuple[int, int]:
    return rewrite_log().norms.computed, rewrite_log().norms.reused


def parameters(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def shift(p: torch.Tensor) -> torch.Tensor:
    return p + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))


# -- what is reused ---------------------------------------------------------------------------------------------------


def test_decoding_reuses_and_prefill_computes() -> None:
    decoder = Decoder().warm()
    assert counts() == (LAYERS, LAYERS)
    decoder.step(prompt())
    decoder.step(prompt())
    assert counts() == (3 * LAYERS, LAYERS)
    decoder.step()
    assert counts() == (3 * LAYERS, 2 * LAYERS), "graphs of one model share the store"


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_one_token_a_sequence_is_decoding(batch: int) -> None:
    decoder = Decoder()
    x = torch.randn(batch, 1, 24)
    decoder.step(x)
    decoder.step(x)
    assert counts() == (LAYERS, LAYERS)


def test_recorded_gradients_compute_every_norm() -> None:
    decoder = Decoder().warm()
    for _ in range(2):
        decoder.compiled(one_token()).sum().backward()
    assert counts() == (3 * LAYERS, LAYERS)
    assert rewrite_log().norms.invalidated == {"a forward recorded gradients": LAYERS}
    decoder.step()
    assert counts() == (4 * LAYERS, LAYERS)


def test_never() -> None:
    decoder = Decoder(**{"dorafx.norm_reuse": "never"})
    decoder.step()
    decoder.step()
    assert counts() == (2 * LAYERS, 0)
    assert len(norm_store()) == 0


class _Marked(torch.nn.Parameter):
    """A subclass, as quantised and sharded parameters are."""


def test_subclasses_are_not_kept() -> None:
    store = norm_store()
    plain = [torch.randn(4, 3), torch.randn(4, 2), torch.randn(2, 3)]
    store.keep("n", plain, torch.randn(4))
    assert len(store) == 1
    store.keep("n", [_Marked(plain[0]), *plain[1:]], torch.randn(4))
    assert len(store) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
def test_any_layout_is_sampled(dtype: torch.dtype) -> None:
    """Whatever strides a tensor has, a change of all of it shows, and none does not; one element will do."""
    for tensor in (
        torch.randn(7, 5).to(dtype),
        torch.randn(7, 5).to(dtype).t(),
        torch.randn(7, 10).to(dtype)[:, ::2],
        torch.randn(3, 1, 4).to(dtype).expand(3, 6, 4)[1:],
        torch.ones(1).to(dtype),
        torch.empty(0, 3).to(dtype),
    ):
        store = norm_store()
        store.clear()
        norm = torch.randn(4)
        store.keep("n", [tensor], norm)
        assert store.kept("n", [tensor]) is norm
        tensor.data.add_(3) if tensor.dim() < 3 else tensor.data[:, 0].add_(3)
        assert (store.kept("n", [tensor]) is None) == bool(tensor.numel())


def test_inference_mode_then_gradients() -> None:
    """Norms made under inference mode are ordinary tensors."""
    decoder = Decoder()
    with torch.inference_mode():
        decoder.compiled(one_token())
    decoder.step()
    assert counts() == (LAYERS, LAYERS)
    decoder.compiled(one_token()).sum().backward()


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_gradient_accumulation_computes_norms_once_a_step(name: str) -> None:
    model = peft_perceptron().train()
    twin = copy.deepcopy(model)
    compiled = compile_eagerly(model, **{"dorafx.norm_reuse": "step"})
    optimizers = [getattr(torch.optim, name)(parameters(m), lr=1e-2) for m in (model, twin)]
    for step in range(3):
        for micro in range(4):
            x = torch.randn((8, 24), generator=torch.Generator().manual_seed(10 * step + micro))
            for call in (compiled, twin):
                call(x).sin().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for ours, stock in zip(parameters(model), parameters(twin)):
        assert_close(ours, stock, 1e-4)
    assert counts() == (3 * LAYERS, 9 * LAYERS)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_does_not_compute_norms_again(use_reentrant: bool) -> None:
    model = peft_model(layers=2).train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.strict": True, "dorafx.codegen": "aot_eager"})
    compiled(input_ids=tokens(), use_cache=False).logits.sum().backward()
    assert {r.norm_placement for r in rewrite_log().rewrites} == {"prologue"}
    assert counts() == (14, 0), "seven layers in each of two blocks, each norm once"


# -- what makes a norm stale ------------------------------------------------------------------------------------------


def _data_copy(model: Any) -> None:
    for p in parameters(model):
        p.data.copy_(shift(p.data))


def _data_replaced(model: Any) -> None:
    for p in parameters(model):
        p.data = shift(p.data)


def _in_place(model: Any) -> None:
    with torch.no_grad():
        for p in parameters(model):
            p.add_(0.25)


def _base_weight(model: Any) -> None:
    weight = model.base_model.model.first.base_layer.weight
    weight.data.copy_(shift(weight.data))


def _load_state_dict(model: Any) -> None:
    model.load_state_dict({k: shift(v) for k, v in model.state_dict().items()})


def _load_assigned(model: Any) -> None:
    model.load_state_dict({k: shift(v) for k, v in model.state_dict().items()}, assign=True)


def _set_peft_state(model: Any) -> None:
    from peft import get_peft_model_state_dict

    set_peft_model_state_dict(model, {k: shift(v) for k, v in get_peft_model_state_dict(model).items()})


def _merge_and_unmerge(model: Any) -> None:
    model.merge_adapter()
    model.unmerge_adapter()


def _to_half_and_back(model: Any) -> None:
    model.to(torch.bfloat16).to(torch.float32)


def _modes_set_directly(model: Any) -> None:
    for module in model.modules():
        module.training = True


def _scaling(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A") and module.lora_A:
            module.scaling["default"] = 0.3


CHANGES: list[Callable[[Any], None]] = [
    _data_copy,
    _data_replaced,
    _in_place,
    _base_weight,
    _load_state_dict,
    _load_assigned,
    _set_peft_state,
    _merge_and_unmerge,
    _to_half_and_back,
    _modes_set_directly,
    _scaling,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_change_between_steps(change: Callable[[Any], None]) -> None:
    decoder = Decoder().warm()
    change(decoder.model)
    decoder.step()
    decoder.step()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "adamw foreach": lambda ps: torch.optim.AdamW(ps, lr=0.1, foreach=True),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.5),
    "sgd fused": lambda ps: torch.optim.SGD(ps, lr=0.5, fused=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_step(name: str) -> None:
    """The gradients come from the stock model, so that only the step itself can tell dorafx."""
    decoder = Decoder().warm()
    optimizer = OPTIMIZERS[name](parameters(decoder.model))
    for _ in range(2):
        decoder.model(one_token(3)).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        decoder.step()
    assert counts() == (3 * LAYERS, LAYERS)


def test_average_swapped_in_and_out_between_prefills() -> None:
    decoder = Decoder()
    averages = [shift(p.data) for p in parameters(decoder.model)]
    for _ in range(4):
        decoder.step(prompt())
        decoder.step()
        for p, average in zip(parameters(decoder.model), averages):
            kept = p.data.clone()
            p.data.copy_(average)
            average.copy_(kept)


def test_adapters_added_switched_combined_deleted() -> None:
    model = peft_perceptron()
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True})

    def check() -> None:
        with torch.no_grad():
            for _ in range(2):
                assert_close(compiled(one_token()), model(one_token()), 1e-5)

    check()
    model.add_adapter("other", lora_config(target_modules=["first", "second"], task_type=None, r=3))
    randomise(model, 5)
    check()
    model.set_adapter("other")
    check()
    model.set_adapter("default")
    check()
    model.delete_adapter("other")
    check()
    assert rewrite_log().norms.reused >= 5 * LAYERS


def test_invalidate() -> None:
    decoder = Decoder().warm()
    assert dorafx.invalidate(decoder.model) == LAYERS
    assert dorafx.invalidate(decoder.model) == 0
    decoder.step()
    assert counts() == (2 * LAYERS, LAYERS)
    assert rewrite_log().norms.invalidated == {"the user invalidated it": LAYERS}
    with pytest.raises(TypeError, match="Module, not dict"):
        dorafx.invalidate({})  # type: ignore[arg-type]


def test_reasons_are_in_the_log() -> None:
    decoder = Decoder().warm()
    _in_place(decoder.model)
    decoder.step()
    assert "2 because a parameter was written" in str(rewrite_log().norms)
    _data_copy(decoder.model)
    decoder.step()
    assert rewrite_log().norms.invalidated["a parameter's data was overwritten"] == LAYERS
    _data_replaced(decoder.model)
    decoder.step()
    assert rewrite_log().norms.invalidated["a parameter's data was replaced"] == LAYERS
    assert "norms: 8 computed, 2 reused" in str(rewrite_log())


# -- sharing and lifetime ---------------------------------------------------------------------------------------------


def test_two_models_share_a_weight() -> None:
    first, second = Decoder(), Decoder(randomise(peft_perceptron(), 9))
    for layer in ("first", "second"):
        getattr(second.model.base_model.model, layer).base_layer.weight = getattr(
            first.model.base_model.model, layer
        ).base_layer.weight
    first.warm()
    second.warm()
    _base_weight(first.model)
    first.step()
    second.step()


def test_the_store_keeps_no_model_alive() -> None:
    decoder = Decoder().warm()
    assert len(norm_store()) == LAYERS
    storages = [weakref.ref(p) for p in decoder.model.parameters()]
    torch._dynamo.reset()
    del decoder
    gc.collect()
    assert not any(r() is not None for r in storages)
    assert len(norm_store()) == 0


def test_threads() -> None:
    decoder = Decoder()
    decoder.warm()
    expected = decoder.model(one_token()).detach()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(50):
                with torch.no_grad():
                    assert_close(decoder.compiled(one_token()), expected, 1e-5)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert counts() == (LAYERS, LAYERS * 201)


def test_generate_reuses_after_the_prefill() -> None:
    model = peft_model(layers=1)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = tokens(2, 12)
    expected = model.generate(input_ids=ids, **settings)
    for scope in ("modules", "model"):
        norm_store().clear()
        rewrite_log().clear()
        dorafx.optimize(model, scope=scope, codegen="eager", strict=True)
        assert torch.equal(model.generate(input_ids=ids, **settings), expected)
        assert counts() == (7, 5 * 7), scope
        dorafx.restore(model)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_after_training_is_fresh(cache: str) -> None:
    model = peft_model(layers=1)
    settings: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "cache_implementation": cache,
    }
    ids = tokens(1, 9)
    dorafx.optimize(model, scope="model", codegen="eager", strict=True)
    optimizer = torch.optim.AdamW(parameters(model), lr=0.05, fused=True)
    for _ in range(2):
        model.train()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        ours = model.generate(input_ids=ids, **settings)
        dorafx.restore(model)
        assert torch.equal(ours, model.generate(input_ids=ids, **settings))
        dorafx.optimize(model, scope="model", codegen="eager", strict=True)
