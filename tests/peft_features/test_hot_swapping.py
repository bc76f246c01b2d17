"""Hot swapping: other weights under an adapter's name, in a compiled model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hot_swapping import adapter, loaded, swap
from integration_support import assert_close, peft_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_features import STARTS, Twin, Way, feature, output

from dorafx import rewrite_log

SECTION = "Hot swapping"
UNET = {
    "sample_size": 8,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "cross_attention_dim": 16,
    "attention_head_dim": 4,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}


@feature(
    SECTION,
    "`hotswap_adapter`",
    "PEFT refuses",
    "PEFT 0.21.2 raises a KeyError for every DoRA adapter, with and without dorafx. "
    "`hotswap_adapter_from_state_dict` works.",
)
def test_the_upper_half(way: Way, tmp_path: Path) -> None:
    one, two = adapter(tmp_path, 1), adapter(tmp_path, 2)
    twin = Twin(way, lambda: loaded(one)).warm()
    twin.refused(lambda model, _: hotswap_adapter(model, two, "default", torch_device="cpu"))
    twin.check()


@feature(
    SECTION,
    "`hotswap_adapter_from_state_dict`",
    "works",
    "The new adapter is used from the first step on. Nothing is recompiled.",
    inductor=True,
)
def test_counts_at_the_first_step(way: Way, tmp_path: Path) -> None:
    adapters = [adapter(tmp_path, seed) for seed in (1, 2)]
    twin = Twin(way, lambda: loaded(adapters[0], trainable=True)).warm()
    with twin.without_recompilation():
        for k, start in enumerate(STARTS):
            twin.do(lambda model, k=k: swap(model, adapters[(k + 1) % 2]))
            twin.check(start)


@feature(
    SECTION,
    "`prepare_model_for_compiled_hotswap`",
    "works",
    "Call it before `optimize` or `torch.compile`. Adapters of any rank up to `target_rank` and any alpha are "
    "then swapped without a recompilation.",
    inductor=True,
)
def test_prepared(way: Way, tmp_path: Path) -> None:
    _prepared(way, [adapter(tmp_path, s, r=r, lora_alpha=a) for s, r, a in ((1, 2, 8), (2, 8, 8), (3, 4, 32))])


@feature(
    SECTION,
    "The same with `use_rslora`, `rank_pattern`, `alpha_pattern`",
    "works",
    "As above.",
)
def test_prepared_with_patterns(way: Way, tmp_path: Path) -> None:
    rslora = {"use_rslora": True, "rank_pattern": {"first": 3}, "alpha_pattern": {"second": 5}}
    _prepared(way, [adapter(tmp_path, s, r=r, lora_alpha=8, **rslora) for s, r in ((1, 2), (2, 8))])


def _prepared(way: Way, adapters: list[str]) -> None:
    def build() -> Any:
        model = loaded(adapters[0])
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        return model

    twin = Twin(way, build).warm()
    assert isinstance(twin.model.base_model.model.first.scaling["default"], torch.Tensor)
    with twin.without_recompilation():
        for k in range(4):
            twin.do(lambda model, k=k: swap(model, adapters[(k + 1) % len(adapters)]))
            twin.check(STARTS[k])
    assert _host_reads(lambda: twin.call(torch.randn(1, 1, 24))) == 0


def _host_reads(call: Any) -> int:
    with torch.no_grad(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        call()
    return sum(event.name == "aten::_local_scalar_dense" for event in seen.events())


@feature(
    SECTION,
    "`prepare_model_for_compiled_hotswap` after compiling",
    "works",
    "One recompilation: the scalings become tensors, and the factors are padded. On a model whose whole forward is compiled in place "
    '(`scope="model"`, `Module.compile`, `torch.compile`) PEFT refuses it, unless `check_compiled="ignore"`.',
)
def test_prepared_too_late(way: Way, tmp_path: Path) -> None:
    adapters = [adapter(tmp_path, s, r=r, lora_alpha=a) for s, r, a in ((1, 2, 8), (2, 8, 8))]
    twin = Twin(way, lambda: loaded(adapters[0])).warm()
    twin.do(lambda model: prepare_model_for_compiled_hotswap(model, target_rank=8))
    twin.check()
    with twin.without_recompilation():
        twin.do(lambda model: swap(model, adapters[1]))
        twin.check("prompt")


@feature(
    SECTION,
    "Another alpha or rank, unprepared",
    "works",
    "A recompilation for a new scaling; a smaller rank is padded; a larger one replaces the parameters' memory.",
)
def test_unprepared(way: Way, tmp_path: Path) -> None:
    one = adapter(tmp_path, 1)
    others = [adapter(tmp_path, s, r=r, lora_alpha=a) for s, r, a in ((2, 4, 3), (3, 2, 6), (4, 8, 6), (5, 4, 6))]
    twin = Twin(way, lambda: loaded(one)).warm()
    for k, other in enumerate(others):
        refused = twin.refused(lambda model, _, other=other: swap(model, other))
        assert refused is None
        twin.check(STARTS[k])


@feature(
    SECTION,
    "An adapter with fewer targets",
    "parity with an upstream bug",
    "PEFT fills the magnitude of the other layers with zeros, so these give zeros, and not the base model's "
    "output. On a CPU a note in the log names the layers. Swap only adapters with the same targets.",
)
def test_fewer_targets(way: Way, tmp_path: Path) -> None:
    both, first = adapter(tmp_path, 1), adapter(tmp_path, 2, target_modules=["first"])
    twin = Twin(way, lambda: loaded(both)).warm()
    assert not any("magnitude" in note for note in rewrite_log().notes)
    twin.do(lambda model: swap(model, first))
    twin.check("prompt")
    layer = twin.model.base_model.model.second
    assert not layer.lora_magnitude_vector.default.weight.any()
    left = twin.stock.base_model.model.second(torch.randn(2, 24)) - layer.base_layer.bias
    assert left.abs().max() < 1e-6, "what the page says of PEFT"
    (note,) = [note for note in rewrite_log().notes if "magnitude" in note]
    assert note.startswith("base_model.model.second: the magnitude is zero everywhere"), note
    twin.do(lambda model: swap(model, both))
    twin.check()


@pytest.mark.triton
@feature(
    SECTION,
    "On a GPU",
    "works",
    "Kernels compare the contents, so that a swap is seen though no version counter moves and the host reads nothing. Tested in Triton's "
    "interpreter. Without Triton, or for DTensors: `dorafx.invalidate(model)` after a swap.",
    codegens=("eager",),
)
def test_on_a_device(way: Way) -> None:
    interpreter = pytest.importorskip("interpreter", reason="needs Triton")
    file = str(Path(__file__).with_name("swapped_on_a_device.py"))
    interpreter.interpreted("-n", "0", "-k", way.how, file)


@feature(SECTION, "A merged adapter", "PEFT refuses", "`unmerge_adapter()` first: a ValueError says so.")
def test_merged(way: Way, tmp_path: Path) -> None:
    one, two = adapter(tmp_path, 1), adapter(tmp_path, 2)
    twin = Twin(way, lambda: loaded(one)).warm()
    twin.do(lambda model: model.merge_adapter())
    error = twin.refused(lambda model, _: swap(model, two))
    assert isinstance(error, ValueError)
    twin.check()
    twin.do(lambda model: model.unmerge_adapter())
    twin.do(lambda model: swap(model, two))
    twin.check()


@feature(
    SECTION,
    "In inference mode",
    "works",
    "Also where the swap itself is made inside `torch.inference_mode()`.",
)
def test_in_inference_mode(way: Way, tmp_path: Path) -> None:
    adapters = [adapter(tmp_path, seed) for seed in (1, 2)]
    twin = Twin(way, lambda: loaded(adapters[0]))
    for k in range(3):
        with torch.inference_mode():
            for length in (1, 8, 1):
                expected = output(twin.stock, twin.stock, 1, length)
                assert_close(output(twin.call, twin.model, 1, length), expected, twin.tolerance)
            twin.do(lambda model, k=k: swap(model, adapters[k % 2]))
    twin.check()


@feature(
    SECTION,
    "Between the tokens of `generate()`",
    "works",
    "A language model with its cache: the next token is that of the new adapter.",
)
def test_between_tokens(way: Way, tmp_path: Path) -> None:
    def build() -> Any:
        return peft_model("llama", 2)

    def saved(seed: int) -> str:
        return adapter(tmp_path, seed, build())

    adapters = [saved(seed) for seed in (1, 2)]
    twin = Twin(way, build)

    def generated(model: Any, call: Any) -> list[torch.Tensor]:
        past, outputs = None, []
        ids = torch.randint(1, 60, (1, 9), generator=torch.Generator().manual_seed(2))
        with torch.no_grad():
            for step in range(8):
                if step % 3 == 2:
                    swap(model, adapters[step // 3 % 2])
                chunk = ids[:, :2] if step == 0 else ids[:, step + 1 : step + 2]
                out = call(input_ids=chunk, past_key_values=past, use_cache=True)
                past = out.past_key_values
                outputs.append(out.logits)
        return outputs

    for _ in range(2):
        (expected, actual) = [generated(model, call) for model, call in twin.pairs()]
        for step, (one, other) in enumerate(zip(expected, actual)):
            assert_close(other, one, 2e-5, f"step {step}")
    assert math.isfinite(expected[-1].sum())


@feature(
    SECTION,
    "diffusers: `enable_lora_hotswap`, `load_lora_adapter(hotswap=True)`",
    "PEFT refuses",
    "diffusers 0.42.1 raises a KeyError for DoRA adapters, with and without dorafx: it leaves the magnitudes' "
    "names as they are in a file, and then takes the adapter away.",
)
def test_diffusers(way: Way) -> None:
    def build() -> Any:
        torch.manual_seed(0)
        model = UNet2DConditionModel(**UNET).eval()
        model.enable_lora_hotswap(target_rank=8)
        model.load_lora_adapter(weights(model, 1), prefix=None, adapter_name="default")
        return model

    def weights(model: Any, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        state = {}
        for name in ("to_q", "to_v"):
            where = f"down_blocks.0.attentions.0.transformer_blocks.0.attn1.{name}"
            state[f"{where}.lora_A.weight"] = torch.randn(4, 8, generator=generator) * 0.3
            state[f"{where}.lora_B.weight"] = torch.randn(8, 4, generator=generator) * 0.3
            state[f"{where}.lora_magnitude_vector"] = torch.rand(8, generator=generator) + 0.5
        return state

    def images(call: Any) -> torch.Tensor:
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            y: torch.Tensor = call(x, torch.tensor([1, 2]), torch.ones(2, 5, 16)).sample
        return y

    stock, model = build(), build()
    twin = Twin.__new__(Twin)
    twin.way, twin.options, twin.stock, twin.model, twin.tolerance = way, {}, stock, model, 2e-5
    twin.call = twin.switched_on(model)
    assert_close(images(twin.call), images(stock), 2e-5)
    twin.rewritten()
    error = twin.refused(
        lambda m, _: m.load_lora_adapter(weights(m, 2), prefix=None, adapter_name="default", hotswap=True)
    )
    assert isinstance(error, KeyError), error
    assert_close(images(twin.call), images(stock), 2e-5)
