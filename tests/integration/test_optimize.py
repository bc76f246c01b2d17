"""``dorafx.optimize``: in place, invisible but for the speed, and undone by ``dorafx.restore``."""

from __future__ import annotations

import copy
import itertools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_support import (
    VOCABULARY,
    Perceptron,
    assert_close,
    assert_same_run,
    base_model,
    call,
    dora_sites,
    graphs_in_log,
    lora_config,
    peft_model,
    peft_perceptron,
    randomise,
    rewritten_sites,
    run,
    tokens,
)
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import CompileConfig, Trainer, TrainingArguments

import dorafx
from dorafx import DorafxError, rewrite_log


def _optimize(model: Any, **changes: Any) -> Any:
    return dorafx.optimize(model, **{"codegen": "eager", "strict": True, **changes})


# -- in place ---------------------------------------------------------------------------------------------------------


def test_norm_and_compose_reach_the_plan() -> None:
    model = _optimize(peft_perceptron(), norm="factored", compose="triton")
    model(torch.randn(3, 24))
    assert {r.norm_algorithm for r in rewrite_log().rewrites} == {"factored"}
    assert {r.decision for r in rewrite_log().rewrites} == {"composed without a kernel: the output is float32 on cpu"}
    for wrong in ({"norm": "dense"}, {"compose": "fused"}):
        with pytest.raises(ValueError, match=f"dorafx.{next(iter(wrong))}: .* is not one of 'auto'"):
            dorafx.optimize(peft_perceptron(), **wrong)


@pytest.mark.default_cases("True-model", "False-modules", "False-auto")
@pytest.mark.parametrize("scope", ["auto", "modules", "model"])
@pytest.mark.parametrize("train", [False, True])
def test_same_object_same_result(scope: str, train: bool) -> None:
    model = peft_model(layers=2, lora_dropout=0.1).train(train)
    kind, keys = type(model), list(model.state_dict())
    names, training = [n for n, _ in model.named_modules()], [m.training for m in model.modules()]
    expected = run(model, lambda: call(model, model))
    assert _optimize(model, scope=scope) is model
    assert type(model) is kind
    assert_same_run(run(model, lambda: call(model, model)), expected)
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_modules()] == names
    assert [m.training for m in model.modules()] == training
    # A graph that serves several modules is compiled again where their inputs differ in requires_grad.
    assert set(rewritten_sites()) == set(dora_sites(model))
    assert not rewrite_log().misses


def test_layers_of_one_shape_share_their_graph() -> None:
    """Compile time must not grow with depth: three layers have the graphs of one."""
    counts = []
    for layers in (1, 3):
        torch._dynamo.reset()
        rewrite_log().clear()
        model = _optimize(peft_model(layers=layers), scope="modules")
        with torch.no_grad():
            call(model, model)
        assert rewritten_sites() == dora_sites(model)
        counts.append(graphs_in_log())
    assert counts[0] == counts[1]


def test_whole_model_is_one_graph() -> None:
    model = _optimize(peft_model(layers=2), scope="model")
    call(model, model)
    assert graphs_in_log() == 1
    assert rewritten_sites() == dora_sites(model)


def test_more_shapes_than_dynamo_recompiles() -> None:
    """Dynamo gives up on a code object after eight graphs; a model may have more shapes of layers than that."""
    torch.manual_seed(0)
    widths = [8 + 2 * i for i in range(11)]
    stack = nn.Sequential(*(nn.Linear(a, b) for a, b in itertools.pairwise(widths)))
    model = randomise(get_peft_model(stack, lora_config(target_modules=[str(i) for i in range(10)], task_type=None)))
    x = torch.randn(3, 8)
    expected = model(x)
    _optimize(model)
    assert_close(model(x), expected, 1e-5)
    assert rewritten_sites() == dora_sites(model)
    assert len(dora_sites(model)) == 10


@pytest.mark.parametrize("scope", ["modules", "model"])
def test_hooks_are_kept(scope: str) -> None:
    model = peft_perceptron()
    layer, seen = model.base_model.model.first, []
    layer.register_forward_hook(lambda module, args, output: seen.append("layer"))
    model.register_forward_hook(lambda module, args, output: seen.append("model"))
    layer.register_forward_hook(lambda module, args, output: output * 2)
    expected = call(model, model)
    assert seen == ["layer", "model"]
    dorafx.optimize(model, codegen="eager", scope=scope)
    assert_close(call(model, model), expected, 1e-5)
    assert seen == ["layer", "model"] * 2
    late = layer.register_forward_hook(lambda module, args, output: output + 1)
    changed = call(model, model)
    late.remove()
    assert (changed - expected).abs().max() > 1e-3
    assert_close(call(model, model), expected, 1e-5)


def test_training_mode_follows_the_model() -> None:
    model = peft_perceptron(lora_dropout=0.5)
    evaluated = call(model, model)
    _optimize(model)
    for train in (True, False, True):
        model.train(train)
        assert all(m.training == train for m in model.modules())
        torch.manual_seed(1)
        assert ((call(model, model) - evaluated).abs().max() > 1e-3) == train


@pytest.mark.parametrize("scope", ["modules", "model"])
def test_adapters_may_change_afterwards(scope: str) -> None:

    model = peft_perceptron()
    _optimize(model, scope=scope)
    call(model, model)
    model.add_adapter("second", lora_config(r=6, target_modules=["first", "second"], task_type=None))
    randomise(model, seed=4)
    for change in (lambda: model.set_adapter("second"), model.base_model.disable_adapter_layers):
        change()
        optimized = run(model, lambda: call(model, model))
        dorafx.restore(model)
        assert_same_run(optimized, run(model, lambda: call(model, model)))
        _optimize(model, scope=scope)


# -- what users do with a model ---------------------------------------------------------------------------------------


def test_save_pretrained_and_reload(tmp_path: Path) -> None:
    model = peft_model()
    expected = call(model, model)
    _optimize(model)
    call(model, model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path).eval()
    assert torch.equal(call(again, again), expected)
    _optimize(again)
    assert_close(call(again, again), expected, 1e-5)


def test_state_dict_goes_in_and_out() -> None:
    model, other = peft_perceptron(), randomise(peft_perceptron(), seed=9)
    expected = call(other, other)
    _optimize(model)
    call(model, model)
    assert model.load_state_dict(other.state_dict()).missing_keys == []
    assert_close(call(model, model), expected, 1e-5)


@pytest.mark.default_cases("auto-dynamic")
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("scope", ["auto", "model"])
def test_generate(cache: str, scope: str) -> None:
    model = peft_model(layers=2)
    settings: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "use_cache": True,
        "return_dict_in_generate": True,
        "output_logits": True,
        # The static cache would have transformers compile the decode step itself: that is another program.
        **({"cache_implementation": "static", "disable_compile": True} if cache == "static" else {}),
    }
    expected = model.generate(input_ids=tokens(), **settings)
    dorafx.optimize(model, codegen="eager", scope=scope)
    actual = model.generate(input_ids=tokens(), **settings)
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, stock in zip(actual.logits, expected.logits, strict=True):
        assert_close(ours, stock, 1e-5)
    assert not rewrite_log().misses
    if scope == "auto":
        # PEFT's generate calls the model inside of it, so what compiles only the outer forward has no part in it.
        assert set(rewritten_sites()) == set(dora_sites(model))


def test_generate_that_compiles_its_decoding_step_with_dorafx() -> None:
    """The prompt goes through the layers compiled in place, the other tokens through a graph that reuses their norms."""
    model = peft_model()
    settings = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "cache_implementation": "static"}
    expected = model.generate(input_ids=tokens(), disable_compile=True, **settings)
    dorafx.optimize(model, codegen="eager", strict=True)
    options = {"dorafx.codegen": "eager", "dorafx.strict": True}
    config = CompileConfig(backend="dorafx", mode=None, fullgraph=True, options=options)
    config._compile_all_devices = True  # without it, on GPUs alone
    assert torch.equal(model.generate(input_ids=tokens(), compile_config=config, **settings), expected)
    sites = len(dora_sites(model))
    assert len(rewrite_log().rewrites) == 2 * sites and not rewrite_log().misses
    assert (rewrite_log().norms.computed, rewrite_log().norms.reused) == (sites, 3 * sites)


@pytest.mark.slow
def test_generate_longer_compiles_nothing_more() -> None:
    model = _optimize(peft_model())
    model.generate(input_ids=tokens(length=5), max_new_tokens=4, do_sample=False)
    rewrite_log().clear()
    model.generate(input_ids=tokens(length=9), max_new_tokens=12, do_sample=False)
    assert graphs_in_log() <= len(
        {tuple(p.shape for p in model.get_submodule(n).parameters()) for n in dora_sites(model)}
    )
    rewrite_log().clear()
    model.generate(input_ids=tokens(length=11), max_new_tokens=7, do_sample=False)
    assert not rewrite_log().records


class Sentences(torch.utils.data.Dataset):
    """Eight short sequences of random tokens."""

    def __init__(self) -> None:
        self.ids = torch.randint(1, VOCABULARY, (8, 9), generator=torch.Generator().manual_seed(2))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def _train(model: Any, folder: Path, **settings: Any) -> list[float]:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=5,
        logging_steps=1,
        learning_rate=5e-3,
        report_to="none",
        save_strategy="no",
        use_cpu=True,
        seed=0,
        disable_tqdm=True,
        **settings,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Sentences())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trainer(checkpointing: bool, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"gradient_checkpointing": checkpointing}
    if checkpointing:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    stock = peft_model(lora_dropout=0.1)
    expected = _train(stock, tmp_path / "stock", **settings)
    model = _optimize(peft_model(lora_dropout=0.1))
    losses = _train(model, tmp_path / "ours", **settings)
    assert len(losses) == 5
    assert losses == pytest.approx(expected, abs=1e-5)
    assert expected[0] - expected[-1] != pytest.approx(0, abs=1e-4), "nothing was trained"
    for (name, ours), theirs in zip(model.state_dict().items(), stock.state_dict().values(), strict=True):
        assert_close(ours, theirs, 1e-3, name)
    assert set(rewritten_sites()) == set(dora_sites(model))
    assert not rewrite_log().misses


def test_ten_steps_with_adamw() -> None:
    def losses(model: Any) -> list[float]:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        torch.manual_seed(5)
        found = []
        for step in range(10):
            ids = tokens(seed=step)
            loss = model(input_ids=ids, labels=ids).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(loss.item())
        return found

    expected = losses(peft_model(lora_dropout=0.1).train())
    assert losses(_optimize(peft_model(lora_dropout=0.1).train())) == pytest.approx(expected, abs=1e-5)


# -- copies -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["modules", "model"])
@pytest.mark.parametrize("used", [False, True])
def test_deepcopy(scope: str, used: bool) -> None:
    """A copy is a model of its own: training one leaves the other alone."""
    model = peft_perceptron()
    expected = call(model, model).detach()
    _optimize(model, scope=scope)
    if used:
        call(model, model)
    twin = copy.deepcopy(model)
    assert_close(call(twin, twin), expected, 1e-5)
    # Compiled code is not copied, as with Module.compile; the copy can be optimized like any other model.
    _optimize(twin, scope=scope)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert_close(call(model, model), expected, 1e-5)
    changed = call(twin, twin)
    assert (changed - expected).abs().max() > 1e-2, "the copy computes with the original's parameters"
    dorafx.restore(twin)
    assert_close(call(twin, twin), changed, 1e-5)


@pytest.mark.parametrize("scope", ["modules", "model"])
def test_pickle(scope: str) -> None:
    model = peft_perceptron()
    expected = call(model, model)
    _optimize(model, scope=scope)
    call(model, model)
    pickled = pickle.dumps(model)
    assert b"dorafx" not in pickled.replace(b"_dorafx_restore", b"")  # it is loaded where dorafx is not installed
    loaded = pickle.loads(pickled)
    assert_close(call(loaded, loaded), expected, 1e-5)
    # Compiled code is not pickled, as with Module.compile; the loaded model can be optimized like any other.
    rewrite_log().clear()
    _optimize(loaded, scope=scope)
    assert_close(call(loaded, loaded), expected, 1e-5)


# -- undone -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["modules", "model"])
def test_restore(scope: str) -> None:
    model = peft_perceptron()
    attributes = {n: dict(m.__dict__) for n, m in model.named_modules()}
    expected = call(model, model)
    _optimize(model, scope=scope)
    call(model, model)
    assert dorafx.restore(model) is model
    rewrite_log().clear()
    torch._dynamo.reset()
    assert torch.equal(call(model, model), expected)
    assert not rewrite_log().records
    assert {n: m.__dict__.keys() for n, m in model.named_modules()} == {n: a.keys() for n, a in attributes.items()}
    assert dorafx.restore(model) is model
    _optimize(model, scope=scope)
    assert_close(call(model, model), expected, 1e-5)
    assert rewrite_log().rewrites


def test_restore_of_a_model_that_was_compiled_before() -> None:
    model = peft_perceptron()
    expected = call(model, model)
    calls = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        calls.append(gm)
        return gm.forward

    model.compile(backend=backend)
    _optimize(model, scope="model")
    assert_close(call(model, model), expected, 1e-5)
    assert not calls
    dorafx.restore(model)
    assert_close(call(model, model), expected, 1e-5)
    assert calls


def test_optimize_twice() -> None:
    model = _optimize(peft_perceptron())
    with pytest.raises(DorafxError, match="restore"):
        _optimize(model)
    dorafx.restore(model)
    _optimize(model)


# -- wrong calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"scope": "layers"}, ["layers", "auto", "model", "modules"]),
        ({"codegen": ""}, ["codegen", "inductor", "eager"]),
        ({"codegen": 3}, ["codegen", "inductor", "eager"]),
        ({"strict": "no"}, ["strict", "no"]),
    ],
    ids=str,
)
def test_wrong_values(wrong: dict[str, Any], named: list[str]) -> None:
    model = peft_perceptron()
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is looked at below)
        dorafx.optimize(model, **wrong)
    for word in named:
        assert word in str(caught.value)
    # The failed call left nothing behind.
    _optimize(model)


def test_wrong_type() -> None:
    with pytest.raises(TypeError, match="function"):
        dorafx.optimize(lambda x: x)  # type: ignore[type-var]


# -- models without DoRA ----------------------------------------------------------------------------------------------


def test_model_without_dora() -> None:
    torch.manual_seed(0)
    model = Perceptron().train()
    x = torch.randn(3, 24)
    expected = run(model, lambda: model(x))
    _optimize(model)
    assert_same_run(run(model, lambda: model(x)), expected, 1e-6)
    assert not rewrite_log().records
    dorafx.restore(model)
    assert_same_run(run(model, lambda: model(x)), expected, 0)
    with pytest.raises(ValueError, match='scope="model"'):
        _optimize(model, scope="modules")


def test_plain_lora() -> None:
    model = peft_perceptron(use_dora=False).train()
    expected = run(model, lambda: call(model, model))
    _optimize(model)
    assert_same_run(run(model, lambda: call(model, model)), expected, 1e-6)
    assert not rewrite_log().records


def test_dora_beside_plain_lora() -> None:
    """Only the adapter with a magnitude is DoRA; both are computed right."""

    model = peft_perceptron()
    model.add_adapter("plain", lora_config(use_dora=False, target_modules=["first"], task_type=None))
    model.base_model.set_adapter(["default", "plain"])
    randomise(model, seed=3).train()
    expected = run(model, lambda: call(model, model))
    _optimize(model)
    assert_same_run(run(model, lambda: call(model, model)), expected)
    assert rewritten_sites() == dora_sites(model)


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
def test_transforms_of_torch_func(codegen: str) -> None:
    """Under them Dynamo leaves the model as it is, as it does after ``module.compile()``."""
    model, x = peft_perceptron(), torch.randn(4, 24)
    transforms: list[Any] = [
        lambda: torch.vmap(model)(x),
        lambda: torch.func.jacrev(lambda v: model(v).sum())(x[0]),
        lambda: torch.func.grad(lambda v: model(v).sum())(x),
    ]
    expected = [transform() for transform in transforms]
    dorafx.optimize(model, codegen=codegen)
    model(x)
    for transform, value in zip(transforms, expected):
        torch.testing.assert_close(transform(), value)
