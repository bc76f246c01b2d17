"""Models that share weights, models that die, threads, and HF ``generate()``."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import pytest
import torch
from integration_support import assert_close, peft_model, peft_perceptron, randomise, tokens
from reuse_support import LAYERS, Decoder, counts, one_token, overwrite, parameters

import dorafx
from dorafx import rewrite_log
from dorafx.log import NormCounters
from dorafx.runtime import NormStore, norm_store


def test_two_models_share_a_weight() -> None:
    first, second = Decoder(), Decoder(randomise(peft_perceptron(), 9))
    for layer in ("first", "second"):
        getattr(second.model.base_model.model, layer).base_layer.weight = getattr(
            first.model.base_model.model, layer
        ).base_layer.weight
    first.warm()
    second.warm()
    overwrite(first.model.base_model.model.first.base_layer.weight)
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


def test_entries_of_parameters_that_are_gone_do_not_pile_up() -> None:
    """Their memory may live on, in other parameters."""
    store, memory = NormStore(NormCounters()), [torch.randn(4, 3), torch.randn(4, 2), torch.randn(2, 3)]
    parameters = []
    for step in range(1000):
        parameters = [torch.nn.Parameter(m) for m in memory]
        store.keep(store.observe(f"n{step}", parameters), torch.randn(4))
    assert len(store) <= 200
    assert len(store._entries) <= 200
    assert len(store._readers) <= 600
    assert store.kept("n999", parameters) is not None


def test_the_norm_of_a_tensor_that_is_gone_is_not_another_ones() -> None:
    """Python gives the id of what is gone to what comes next."""
    store = NormStore(NormCounters())
    gone = torch.randn(4, 3)
    store.keep(store.observe("n", [gone]), torch.randn(4))
    assert len(store) == 1
    number = id(gone)
    del gone
    later = [torch.randn(4, 3) for _ in range(100)]
    (same,) = (tensor for tensor in later if id(tensor) == number)
    assert store.invalidate([same]) == 0
    assert store.counters.invalidated == {}


@pytest.mark.parametrize("attribute", [None, True, "itself"], ids=["none", "a flag", "a cycle"])
def test_attributes_keep_no_parameter_alive(attribute: Any) -> None:
    parameter: Any = torch.nn.Parameter(torch.randn(4, 3))
    if attribute is not None:
        parameter.mark = [parameter] if attribute == "itself" else attribute
    memory = weakref.ref(parameter.untyped_storage())
    norm_store().keep(norm_store().observe("n", [parameter]), torch.randn(4))
    assert norm_store().kept("n", [parameter]) is not None
    assert len(norm_store()) == 1
    del parameter
    gc.collect()
    assert memory() is None
    assert len(norm_store()) == 0


@pytest.mark.parametrize("scope", ["modules", "model"])
def test_nobody_refers_to_parameters(scope: str) -> None:
    """After any kind of forward; who refers to one keeps torch from moving a quantised model."""
    model = peft_perceptron()
    dorafx.optimize(model, scope=scope, codegen="eager", strict=True)
    with torch.no_grad():
        model(one_token())
        model(one_token())
    model(one_token()).sum().backward()
    assert not any(weakref.getweakrefs(t) for t in (*model.parameters(), *model.buffers()))
    for p in model.parameters():
        p.grad = None
        torch.utils.swap_tensors(p, torch.nn.Parameter(p.detach() * 1.1, requires_grad=p.requires_grad))
    with torch.no_grad():
        ours = model(one_token())
        dorafx.restore(model)
        assert_close(ours, model(one_token()), 1e-5)


@pytest.mark.parametrize("target", [torch.float64, "cpu"])
def test_a_quantised_model_is_moved_and_cast(target: Any) -> None:
    """torch swaps the tensors of torchao's classes."""
    quantization = pytest.importorskip("torchao.quantization")
    model = peft_perceptron()
    quantization.quantize_(model.base_model.model, quantization.Int8WeightOnlyConfig())
    dorafx.optimize(model, codegen="eager", strict=True)
    with torch.no_grad():
        for _ in range(2):
            model(one_token())
        model.to(target)
        x = one_token().to(target)
        ours = model(x)
        dorafx.restore(model)
        assert_close(ours, model(x), 1e-4)


def test_explain_refers_to_no_parameter() -> None:
    model = peft_perceptron()
    dorafx.explain(model, one_token())
    assert not any(weakref.getweakrefs(p) for p in model.parameters())


def test_parameters_that_are_swapped_when_converted() -> None:
    """torch refuses to swap a tensor that somebody refers to; neither dorafx's graphs nor kept norms do."""
    decoder = Decoder().warm()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        decoder.model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    with torch.no_grad():
        x = one_token().double()
        assert_close(decoder.compiled(x), decoder.model(x), 1e-6)


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


def test_threads_between_changes() -> None:
    """Several threads decode, the parameters change, the threads decode again; what is compared is what each of them saw."""
    decoder = Decoder().warm()
    failures: list[BaseException] = []

    def work(expected: torch.Tensor) -> None:
        try:
            for _ in range(5):
                with torch.no_grad():
                    assert_close(decoder.compiled(one_token()), expected, 1e-5)
        except BaseException as error:
            failures.append(error)

    for round_ in range(4):
        for p in parameters(decoder.model):
            overwrite(p) if round_ % 2 else p.data.mul_(0.9)
        expected = decoder.model(one_token()).detach()
        threads = [threading.Thread(target=work, args=(expected,)) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures
    assert counts()[1] > LAYERS


@pytest.mark.slow
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


@pytest.mark.slow
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
