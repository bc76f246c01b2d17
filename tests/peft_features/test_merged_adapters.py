"""Adapters merged into the base weights, unmerged, and taken away, in a compiled model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integration_support import assert_close, peft_model
from peft_features import Twin, Way, adapted, add, feature, in_fp64, output, perturb

from dorafx import rewrite_log

SECTION = "Merging"


def _two() -> Any:
    model = adapted()
    add(model, "other")
    return model.eval()


def _same_weights(twin: Twin) -> None:
    """To the bit: PEFT's own code changed both."""
    for (name, expected), (_, actual) in zip(twin.stock.named_parameters(), twin.model.named_parameters()):
        assert torch.equal(actual, expected), name


@feature(
    SECTION,
    "`merge_adapter`, `unmerge_adapter`",
    "works",
    "Merged, a layer is a plain linear layer; unmerged, its weight is what it was up to rounding, in other memory. One compilation for each "
    "of the two states.",
)
def test_merged_and_unmerged(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    for cycle in range(3):
        twin.do(lambda m, safe=cycle == 1: m.merge_adapter(safe_merge=safe))
        twin.check("prompt")
        twin.do(lambda m: m.unmerge_adapter())
        twin.check("token")
        _same_weights(twin)
    twin.rewritten()


@feature(
    SECTION,
    "50 cycles of merging",
    "works",
    "The weights are stock PEFT's to the bit, in fp32 and in bf16; nothing is recompiled after the first cycle.",
)
def test_fifty_cycles(way: Way) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        twin = Twin(way, lambda dtype=dtype: adapted().to(dtype), tolerance=2e-5 if dtype == torch.float32 else 3e-2)
        x = torch.randn(1, 24, dtype=dtype)
        for cycle in range(50):
            with torch._dynamo.config.patch(error_on_recompile=cycle > 1), torch.no_grad():
                twin.do(lambda m: m.merge_adapter())
                if cycle % 7 < 2:
                    assert_close(twin.call(x), twin.stock(x), twin.tolerance)
                twin.do(lambda m: m.unmerge_adapter())
                if cycle % 7 < 2 or cycle == 49:
                    assert_close(twin.call(x), twin.stock(x), twin.tolerance)
        _same_weights(twin)


@feature(
    SECTION,
    "Two adapters merged, one after the other or together",
    "works",
    "As stock PEFT merges them; `unmerge_adapter` takes both out again.",
)
def test_two_merged(way: Way) -> None:
    twin = Twin(way, _two).warm()
    for names in (["default", "other"], ["other"], ["other", "default"]):
        twin.do(lambda m, names=names: m.merge_adapter(names))
        twin.outputs(1, 1)
        twin.outputs(3, 5)
        twin.do(lambda m: m.unmerge_adapter())
        twin.outputs(1, 1)
    twin.do(lambda m: m.merge_adapter(["default"]))
    twin.do(lambda m: m.merge_adapter(["other"]))
    twin.outputs(1, 1)
    twin.do(lambda m: m.unmerge_adapter())
    _same_weights(twin)
    twin.check()


@feature(
    SECTION,
    "Weights written, or adapters switched, while merged",
    "works",
    "After `unmerge_adapter` the parameters' current values are used.",
)
def test_written_while_merged(way: Way) -> None:
    twin = Twin(way, _two).warm()
    for seed, name in ((31, "default"), (32, "other")):
        twin.do(lambda m: m.merge_adapter())
        twin.outputs(1, 1)
        twin.do(lambda m, seed=seed: perturb(m, "default", seed))
        twin.outputs(1, 1)
        twin.do(lambda m, name=name: m.set_adapter(name))
        twin.outputs(1, 1)
        twin.do(lambda m: m.unmerge_adapter())
        twin.check()
        twin.do(lambda m: m.set_adapter("default"))


@feature(
    SECTION,
    "`merge_and_unload`",
    "works",
    "Returns the base model with merged weights, not compiled.",
)
def test_merged_and_unloaded(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    expected, actual = twin.do(lambda m: m.merge_and_unload(safe_merge=True))
    assert type(actual) is type(expected)
    assert list(actual.state_dict()) == list(expected.state_dict())
    for shape in ((1, 1), (3, 5), (1, 1)):
        assert_close(output(actual, actual, *shape), output(expected, expected, *shape), 1e-5)
    torch.testing.assert_close(actual.state_dict(), expected.state_dict(), rtol=0, atol=0)


@feature(
    SECTION,
    "`unload`",
    "works",
    "Returns the base model with its original weights.",
)
def test_unloaded(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    expected, actual = twin.do(lambda m: m.unload())
    assert list(actual.state_dict()) == list(expected.state_dict())
    for shape in ((1, 1), (3, 5)):
        assert_close(output(actual, actual, *shape), output(expected, expected, *shape), 1e-6)


@pytest.mark.slow
@feature(
    SECTION,
    "`merge_and_unload` of a language model, then another adapter on it",
    "works",
    "Blocks that `optimize` compiled stay compiled. Call `restore` before `merge_and_unload` to end that.",
)
def test_language_model_merged_and_adapted_again(way: Way) -> None:
    from integration_support import lora_config, randomise
    from peft import get_peft_model

    twin = Twin(way, lambda: peft_model("llama", 2)).warm()
    twin.stock, twin.model = twin.do(lambda m: m.merge_and_unload())
    if way.how == "backend":
        twin.call = twin.switched_on(twin.model)
    else:
        twin.call = twin.model
    twin.outputs(1, 1)
    twin.outputs(3, 5)
    twin.stock, twin.model = twin.do(lambda m: randomise(get_peft_model(m, lora_config(r=2))).eval())
    if way.how == "backend":
        twin.call = twin.switched_on(twin.model)
    else:
        twin.call = twin.model
    twin.check()


@feature(
    SECTION,
    "Merged tied embeddings and head",
    "parity with an upstream bug",
    "Where both are adapted, PEFT merges their one weight twice: merged, the model gives other results than "
    "before, and NaN after `unmerge_adapter`. Compared with stock PEFT in fp64, as in fp32 its own rounding shows there.",
)
def test_tied_and_merged(way: Way) -> None:
    from integration_support import lora_config, randomise
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def build() -> Any:
        torch.manual_seed(0)
        base = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=4,
                vocab_size=61,
                pad_token_id=0,
                tie_word_embeddings=True,
            )
        )
        targets = ["embed_tokens", "lm_head", "q_proj"]
        model = randomise(get_peft_model(base, lora_config(target_modules=targets))).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_embedding" in name:
                    p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(7)))
        return model

    twin = Twin(way, build)
    exact = in_fp64(twin.stock)

    def compare(tolerance: float = 3e-6) -> None:
        for shape in ((1, 1), (3, 5), (1, 1)):
            with torch.no_grad():
                expected = output(exact, exact, *shape)
                actual = output(twin.call, twin.model, *shape)
            assert_close(actual.double(), expected, tolerance, str(shape))

    compare()
    twin.rewritten()
    for m in (exact, twin.stock, twin.model):
        m.merge_adapter()
    compare(1e-5)
    for m in (exact, twin.stock, twin.model):
        m.unmerge_adapter()
    with torch.no_grad():
        for call, model in ((exact, exact), (twin.call, twin.model)):
            assert output(call, model, 3, 5).isnan().any(), "what the page says of PEFT"
    assert not rewrite_log().misses
