"""diffusers: repeated blocks compiled by ``compile_repeated_blocks(backend="dorafx")``, with an adapter that PEFT loaded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from integration_support import assert_close, assert_same_run, dora_sites, randomise, run
from peft import LoraConfig

import dorafx
from dorafx import rewrite_log

diffusers = pytest.importorskip("diffusers")
OPTIONS = {"dorafx.codegen": "eager", "dorafx.strict": True}


def flux() -> tuple[Any, dict[str, Any]]:
    """A transformer with blocks of two kinds, and the inputs of a step."""
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
        "pooled_projections": torch.randn(2, 32, generator=generator),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.randint(0, 4, (16, 3), generator=generator).float(),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, inputs


def stable_diffusion() -> tuple[Any, dict[str, Any]]:
    """One kind of block, of which the last differs from the others."""
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=64,
        out_channels=4,
    )
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8, generator=generator),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
        "pooled_projections": torch.randn(2, 64, generator=generator),
        "timestep": torch.tensor([3, 7]),
    }
    return model, inputs


def unet() -> tuple[Any, dict[str, Any]]:
    """Transformer blocks inside of blocks of convolutions."""
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
    )
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "sample": torch.randn(2, 4, 8, 8, generator=generator),
        "timestep": torch.tensor([3, 7]),
        "encoder_hidden_states": torch.randn(2, 5, 32, generator=generator),
    }
    return model, inputs


TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "proj_out"]


def adapted(make: Any, **lora: Any) -> tuple[Any, dict[str, Any]]:
    """With an adapter added as pipelines add them: into the model, without a wrapper of PEFT."""
    torch.manual_seed(0)
    model, inputs = make()
    model.add_adapter(LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=TARGETS, **lora))
    return randomise(model).eval(), inputs


def sites_in_blocks(model: Any) -> list[str]:
    """Of each adapter layer inside of a repeated block, the name inside of the block."""
    blocks = [n for n, m in model.named_modules() if type(m).__name__ in model._repeated_blocks]
    return [s.removeprefix(f"{block}.") for s in dora_sites(model) for block in blocks if s.startswith(f"{block}.")]


@pytest.mark.default_cases("False-flux")
@pytest.mark.parametrize("make", [flux, unet])
@pytest.mark.parametrize("train", [False, True])
def test_repeated_blocks(make: Any, train: bool) -> None:
    model, inputs = adapted(make)
    model.train(train)
    expected = run(model, lambda: model(**inputs).sample)
    model.compile_repeated_blocks(backend="dorafx", fullgraph=True, options=OPTIONS)
    found = run(model, lambda: model(**inputs).sample)
    assert_same_run(found, expected)
    inside = sites_in_blocks(model)
    assert len(inside) >= 12 and not rewrite_log().misses
    # A block does not know its place in the model: each graph serves all blocks of its kind.
    assert {r.site for r in rewrite_log().rewrites} == set(inside)


@pytest.mark.default_cases("stable_diffusion")
@pytest.mark.parametrize("make", [flux, stable_diffusion])
def test_optimize_compiles_the_same_blocks_and_the_rest(make: Any) -> None:
    """In place, with the names of the modules; and the adapter layers outside of the blocks."""
    model, inputs = adapted(make)
    expected = run(model, lambda: model(**inputs).sample)
    dorafx.optimize(model, codegen="eager", strict=True)
    assert_same_run(run(model, lambda: model(**inputs).sample), expected)
    assert {r.site for r in rewrite_log().rewrites} == set(dora_sites(model)) and not rewrite_log().misses


def base_of(model: Any, make: Any) -> Any:
    """A model without the adapter, of the same base weights."""
    plain, _ = make()
    base = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if "lora_" not in k}
    plain.load_state_dict(base)
    return plain.eval()


@torch.no_grad()
def test_an_adapter_that_diffusers_loads(tmp_path: Any) -> None:
    """Saved and loaded by the methods that a pipeline's ``load_lora_weights`` calls; then switched off."""
    model, inputs = adapted(flux)
    expected = model(**inputs).sample
    model.save_lora_adapter(tmp_path, safe_serialization=True)
    again = base_of(model, flux)
    plain = again(**inputs).sample
    again.load_lora_adapter(tmp_path, prefix=None, adapter_name="style", use_safetensors=True)
    again.eval()
    again.compile_repeated_blocks(backend="dorafx", fullgraph=True, options=OPTIONS)
    assert_close(again(**inputs).sample, expected, 1e-5)
    assert (expected - plain).abs().max() > 1e-2
    assert rewrite_log().rewrites and not rewrite_log().misses
    again.disable_adapters()
    assert_close(again(**inputs).sample, plain, 1e-5)
