"""``dorafx.optimize(scope="blocks")``: the blocks that a model repeats, each of them compiled once for all of its kind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from integration_support import (
    VOCABULARY,
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
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import DynamicCache, T5Config, T5ForConditionalGeneration

import dorafx
from dorafx import rewrite_log
from dorafx.scope import module_groups, repeated_blocks, resolve_scope

CODEGENS = ["eager", "inductor"]


def _optimize(model: Any, codegen: str = "eager", **changes: Any) -> Any:
    return dorafx.optimize(model, **{"codegen": codegen, "scope": "blocks", "strict": True, **changes})


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in repeated_blocks(model)]


# -- which modules are blocks -----------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block of two linear layers, with a number like the layers of transformers."""

    def __init__(self, width: int, number: int = 0) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stages(nn.Module):
    """Lists of blocks inside of a list of stages, and a head that is no block."""

    def __init__(self, widths: tuple[int, ...] = (8, 8), depth: int = 3) -> None:
        super().__init__()
        self.stages = nn.ModuleList(nn.Sequential(*(Block(w, i) for i in range(depth))) for w in widths)
        self.head = nn.Linear(widths[-1], 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.stages:
            x = stage(x)
        return self.head(x)


def _adapted(model: nn.Module, targets: list[str], **changes: Any) -> Any:
    return randomise(get_peft_model(model, lora_config(target_modules=targets, task_type=None, **changes))).eval()


def test_decoder_layers_are_blocks() -> None:
    layers = "base_model.model.model.layers"
    assert _names(peft_model(layers=3)) == [f"{layers}.{i}" for i in range(3)]
    # A single one is known by its class, which transformers' model names.
    assert _names(peft_model(layers=1)) == [f"{layers}.0"]
    assert _names(peft_model(layers=3, target_modules=["q_proj"], layers_to_transform=[0, 2])) == [
        f"{layers}.0",
        f"{layers}.2",
    ]


def test_elements_of_a_list_are_blocks_where_their_class_is_repeated() -> None:
    model = _adapted(Stages(depth=2), ["up", "down", "head"])
    base = "base_model.model.stages"
    # The stages are lists themselves, so the blocks are what these hold.
    assert _names(model) == [f"{base}.{s}.{b}" for s in range(2) for b in range(2)]
    single = _adapted(Stages((8,), depth=1), ["up", "down"])
    assert _names(single) == []


def test_the_classes_that_a_model_names_are_its_blocks() -> None:
    model = Stages(depth=1)
    model._repeated_blocks = ["Block"]
    assert len(_names(_adapted(model, ["up"]))) == 2
    other = Stages(depth=3)
    other._repeated_blocks = ["Linear"]  # only these, so the blocks are not; and an adapter layer is no block
    assert _names(_adapted(other, ["up"])) == []


def test_the_outermost_blocks_are_taken() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(Block(8) for _ in range(2))

    model = nn.ModuleList(Experts() for _ in range(2))
    assert [name.split(".")[-1] for name in _names(_adapted(model, ["up"]))] == ["0", "1"]


def test_a_module_that_is_in_two_places_is_one_block() -> None:
    model = Stages(depth=2)
    model.stages[1] = model.stages[0]
    assert len(_names(_adapted(model, ["up"]))) == 2


def test_blocks_are_grouped_by_what_a_graph_depends_on() -> None:
    def groups(model: Any) -> list[int]:
        return [len(members) for members in module_groups(repeated_blocks(model))]

    assert groups(peft_model(layers=4)) == [4]
    assert groups(peft_model(layers=4, rank_pattern={r"layers\.1\.self_attn\.q_proj": 2})) == [3, 1]
    assert groups(_adapted(Stages((8, 16), depth=2), ["up"])) == [2, 2]
    model = peft_model(layers=4)
    model.base_model.model.model.layers[2].self_attn.is_causal = False
    assert groups(model) == [3, 1]


def test_what_auto_is() -> None:
    assert resolve_scope(peft_model(layers=2), "auto") == "blocks"
    assert resolve_scope(peft_perceptron(), "auto") == "modules"
    assert resolve_scope(nn.Linear(3, 3), "auto") == "model"
    for kinds, scope in ((8, "blocks"), (9, "modules")):
        widths = tuple(8 * (k + 1) for k in range(kinds))
        assert resolve_scope(_adapted(Stages(widths, depth=2), ["up"]), "auto") == scope


def test_a_model_without_blocks_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r'scope="blocks" needs adapter layers inside of repeated blocks .* scope="modules"'
    ):
        dorafx.optimize(peft_perceptron(), scope="blocks")
    with pytest.raises(ValueError, match=r'scope="blocks" needs adapter layers with a lora_magnitude_vector'):
        dorafx.optimize(nn.Linear(3, 3), scope="blocks")


# -- the same results -------------------------------------------------------------------------------------------------


@pytest.mark.default_cases("False-eager", "True-inductor")
@pytest.mark.parametrize("codegen", CODEGENS)
@pytest.mark.parametrize("train", [False, True])
def test_same_result_and_one_graph_for_all_layers(train: bool, codegen: str) -> None:
    counts = []

    def forward(model: Any) -> torch.Tensor:
        return model(input_ids=tokens(), use_cache=False).logits

    for layers in (1, 3):
        torch._dynamo.reset()
        rewrite_log().clear()
        model = peft_model(layers=layers, lora_dropout=0.1 if codegen == "eager" else 0.0).train(train)
        expected = run(model, partial(forward, model))
        _optimize(model, codegen)
        assert_same_run(run(model, partial(forward, model)), expected, 1e-4)
        assert set(rewritten_sites()) == set(dora_sites(model))
        counts.append(graphs_in_log())
        dorafx.restore(model)
        assert_same_run(run(model, partial(forward, model)), expected)
    # The first layer's input requires no gradient, the others' does.
    assert counts[0] == 1
    assert counts[1] <= 2


@pytest.mark.default_cases("True-eager")
@pytest.mark.parametrize("codegen", CODEGENS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, codegen: str) -> None:
    model = peft_model(layers=2).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    expected = run(model, lambda: call(model, model))
    _optimize(model, codegen)
    assert_same_run(run(model, lambda: call(model, model)), expected, 1e-4)
    assert set(rewritten_sites()) == set(dora_sites(model))


def test_adapters_outside_of_blocks_are_compiled_by_themselves() -> None:
    model = _adapted(Stages(depth=2), ["up", "down", "head"])
    x = torch.randn(5, 8)
    expected = run(model, lambda: model(x))
    _optimize(model)
    assert_same_run(run(model, lambda: model(x)), expected)
    assert set(rewritten_sites()) == set(dora_sites(model))
    assert "base_model.model.head" in rewritten_sites()


def test_adapters_of_a_block_without_a_graph_are_compiled_by_themselves() -> None:
    """A block that Dynamo has given up on (here it is told to) runs as it is, with its adapter layers compiled."""
    model = _adapted(Stages(depth=2), ["up", "down"])
    for stage in model.base_model.model.stages:
        for block in stage:
            block.forward = torch.compiler.disable(block.forward, recursive=False)
    x = torch.randn(5, 8)
    expected = run(model, lambda: model(x))
    _optimize(model)
    assert_same_run(run(model, lambda: model(x)), expected)
    assert set(rewritten_sites()) == set(dora_sites(model))


def test_a_diffusion_transformer() -> None:
    """Two kinds of blocks, which its class names."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=2, num_single_layers=3, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    model.add_adapter(LoraConfig(r=4, use_dora=True, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    randomise(model).eval()
    assert [len(members) for members in module_groups(repeated_blocks(model))] == [2, 3]
    inputs = {
        "hidden_states": torch.randn(1, 8, 4),
        "encoder_hidden_states": torch.randn(1, 6, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(8, 3),
        "txt_ids": torch.zeros(6, 3),
    }
    expected = run(model, lambda: model(**inputs).sample)
    _optimize(model)
    assert_same_run(run(model, lambda: model(**inputs).sample), expected)
    assert set(rewritten_sites()) == set(dora_sites(model))
    # Each kind without gradients of its input, as the first of them has it, and with.
    assert graphs_in_log() <= 4


# -- caches of keys and values ----------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    "max_new_tokens": 6,
    "do_sample": False,
    "use_cache": True,
    "return_dict_in_generate": True,
    "output_logits": True,
    "eos_token_id": None,
}


def _compare_generations(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.sequences, expected.sequences)
    for ours, stock in zip(actual.logits, expected.logits, strict=True):
        assert_close(ours, stock, 1e-4)


@pytest.mark.default_cases("dynamic-inductor")
@pytest.mark.parametrize("codegen", CODEGENS)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_with_more_layers_than_dynamo_recompiles(cache: str, codegen: str) -> None:
    """Each layer fills another layer of the cache, which grows: all share their graphs nevertheless, and their names are whole."""
    model = peft_model(layers=12)
    settings = dict(SETTINGS)
    if cache == "static":
        settings |= {"cache_implementation": "static", "disable_compile": True}
    expected = model.generate(input_ids=tokens(), **settings)
    _optimize(model, codegen)
    counters.clear()
    _compare_generations(model.generate(input_ids=tokens(), **settings), expected)
    assert set(rewritten_sites()) == set(dora_sites(model))
    assert not rewrite_log().misses
    before = graphs_in_log()
    assert before <= 8
    _compare_generations(model.generate(input_ids=tokens(), **settings), expected)
    assert graphs_in_log() == before


@pytest.mark.default_cases("eager")
@pytest.mark.parametrize("codegen", CODEGENS)
def test_the_callers_cache_is_filled_and_returned(codegen: str) -> None:
    model = peft_model(layers=3)
    stock_cache, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    twin = copy.deepcopy(model)
    _optimize(model, codegen)
    with torch.no_grad():
        for k in range(3):
            expected = twin(input_ids=tokens(length=4, seed=k), past_key_values=stock_cache)
            actual = model(input_ids=tokens(length=4, seed=k), past_key_values=cache)
            assert_close(actual.logits, expected.logits, 1e-4)
            assert actual.past_key_values is cache
    assert type(cache) is DynamicCache
    assert cache.get_seq_length() == 12
    for ours, stock in zip(cache.layers, stock_cache.layers, strict=True):
        assert_close(ours.keys, stock.keys, 1e-4)
        assert_close(ours.values, stock.values, 1e-4)


def test_training_with_a_cache() -> None:
    model = peft_model(layers=3).train()

    def forward() -> torch.Tensor:
        return model(input_ids=tokens(), use_cache=True).logits

    expected = run(model, forward)
    _optimize(model)
    assert_same_run(run(model, forward), expected)
    assert set(rewritten_sites()) == set(dora_sites(model))


class Named(DynamicCache):
    """A cache of the user's own, with a static method and an attribute that it counts in."""

    calls = 0

    @staticmethod
    def named(number: int) -> str:
        return f"layer {number}"

    def update(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        assert self.named(3) == "layer 3"
        return super().update(*args, **kwargs)


def test_a_cache_of_a_class_of_the_users_own() -> None:
    model = peft_model(layers=3)
    expected = call(model, model)
    _optimize(model)
    cache = Named(config=model.config)
    with torch.no_grad():
        assert_close(model(input_ids=tokens(), past_key_values=cache).logits, expected, 1e-5)
    assert cache.calls == 3
    assert cache.get_seq_length() == tokens().shape[1]


def test_a_compilation_of_the_whole_model_traces_its_blocks() -> None:
    """The user's own ``torch.compile`` of an optimized model, also where a hook makes it trace the blocks' compiled calls. Strict options
    would have it raise: what another backend compiles is not rewritten."""
    model = peft_model(layers=2)
    model.base_model.model.model.layers[0].register_forward_hook(lambda module, args, output: output * 2)
    expected = call(model, model)
    _optimize(model, strict=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(call(compiled, model), expected, 1e-5)


class Returning(nn.Module):
    """A block that returns the cache that it was given, as transformers' did for long."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, cache: Any, in_a_tuple: bool) -> Any:
        cache.update(x[None], x[None], 0)
        return (self.up(x), cache) if in_a_tuple else cache


@pytest.mark.parametrize("in_a_tuple", [False, True])
def test_a_block_returns_the_callers_cache(in_a_tuple: bool) -> None:
    model = _adapted(nn.ModuleList(Returning() for _ in range(2)), ["up"])
    _optimize(model)
    cache = DynamicCache()
    result = model.base_model.model[0](torch.randn(1, 3, 8), cache, in_a_tuple)
    assert (result[1] if in_a_tuple else result) is cache
    assert cache.get_seq_length() == 3


def test_a_cache_of_caches() -> None:
    """Of an encoder and a decoder: the decoder's blocks run as they are, with their adapter layers compiled."""
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, decoder_start_token_id=0
    )
    lora = LoraConfig(r=4, use_dora=True, target_modules=["q", "v", "wi", "wo"], task_type="SEQ_2_SEQ_LM")
    model = randomise(get_peft_model(T5ForConditionalGeneration(config), lora)).eval()
    expected = model.generate(input_ids=tokens(), **SETTINGS)
    _optimize(model)
    _compare_generations(model.generate(input_ids=tokens(), **SETTINGS), expected)
    assert set(rewritten_sites()) == set(dora_sites(model))


# -- what users do with a model ---------------------------------------------------------------------------------------


@pytest.mark.default_cases("eager")
@pytest.mark.parametrize("codegen", CODEGENS)
def test_hidden_states_and_attentions(codegen: str) -> None:
    model = peft_model(layers=3)
    model.set_attn_implementation("eager")

    def outputs() -> Any:
        with torch.no_grad():
            return model(input_ids=tokens(), output_hidden_states=True, output_attentions=True)

    expected = outputs()
    _optimize(model, codegen)
    for _ in range(2):
        actual = outputs()
        for name in ("hidden_states", "attentions"):
            assert len(actual[name]) == len(expected[name]) > 0
            for ours, stock in zip(actual[name], expected[name]):
                assert_close(ours, stock, 1e-4)


def test_hooks_of_blocks_run() -> None:
    model = peft_model(layers=2)
    blocks = model.base_model.model.model.layers
    seen: list[str] = []
    blocks[0].register_forward_hook(lambda module, args, output: seen.append("first"))
    blocks[1].mlp.register_forward_hook(lambda module, args, output: output * 2)
    expected = call(model, model)
    assert seen == ["first"]
    _optimize(model)
    assert_close(call(model, model), expected, 1e-5)
    assert seen == ["first"] * 2
    late = blocks[1].register_forward_pre_hook(lambda module, args: seen.append("late"))
    assert_close(call(model, model), expected, 1e-5)
    assert seen == ["first"] * 2 + ["first", "late"]
    late.remove()
    assert_close(call(model, model), expected, 1e-5)
    assert seen == ["first"] * 2 + ["first", "late", "first"]


def _second_adapter(model: Any) -> None:
    model.add_adapter("second", lora_config(r=6))
    randomise(model, seed=4)
    model.set_adapter("second")


@pytest.mark.default_cases("adapter-eager", "disabled-eager", "fewer layers-eager")
@pytest.mark.parametrize("codegen", CODEGENS)
@pytest.mark.parametrize(
    "change",
    [
        _second_adapter,
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: randomise(model, seed=5),
        lambda model: model.train(),
        lambda model: model.to(torch.bfloat16),
        lambda model: model.merge_adapter(),
        lambda model: model.base_model.model.model.layers.__delitem__(1),
        lambda model: model.base_model.model.set_attn_implementation("eager"),
    ],
    ids=["adapter", "disabled", "values", "training", "bf16", "merged", "fewer layers", "attention"],
)
def test_the_model_may_change_afterwards(change: Callable[[Any], Any], codegen: str) -> None:
    model = peft_model(layers=3)
    _optimize(model, codegen, strict=False)
    run(model, lambda: call(model, model))
    change(model)
    optimized = run(model, lambda: call(model, model))
    dorafx.restore(model)
    tolerance = 8e-2 if next(model.parameters()).dtype == torch.bfloat16 else 1e-4
    assert_same_run(optimized, run(model, lambda: call(model, model)), tolerance)


def test_copies_and_state() -> None:
    model = peft_model(layers=2)
    keys = list(model.state_dict())
    expected = call(model, model).detach()
    _optimize(model)
    call(model, model)
    assert list(model.state_dict()) == keys
    twin = copy.deepcopy(model)
    assert_close(call(twin, twin), expected, 1e-5)
    dorafx.restore(model)
    assert not any("_compiled_call_impl" in vars(module) for module in model.modules())


def test_batches_of_any_length_share_a_graph() -> None:
    model = peft_model(layers=3)
    twin = copy.deepcopy(model)
    _optimize(model)
    with torch.no_grad():
        graphs = []
        for length in (9, 12, 15, 20, 33):
            ids = tokens(length=length)
            for cache in (False, True):
                settings = {"input_ids": ids, "use_cache": cache}
                assert_close(model(**settings).logits, twin(**settings).logits, 1e-5)
            graphs.append(graphs_in_log())
    assert graphs[1] == graphs[-1], "the second length makes lengths variable"


def test_another_model_has_graphs_of_its_own() -> None:
    """A user's own torch.compile of the same classes is neither served by these graphs nor counted with them."""
    model = peft_model(layers=2)
    _optimize(model)
    call(model, model)
    other = base_model("llama", layers=2)
    expected = call(other, other)
    compiled = torch.compile(other, backend="eager")
    assert_close(call(compiled, other), expected, 1e-5)
    assert not torch._dynamo.config.allow_unspec_int_on_nn_module
