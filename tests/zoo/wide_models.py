"""More architectures than the ten that every run tests: decoders, encoders, encoder-decoders, vision, speech, mixtures of experts,
state spaces, vision-language, and diffusion, tiny and random, from their configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from models import HIDDEN, LABELS, VOCABULARY, Architecture, decoder, pictures, tokens, without

__all__ = ["WIDE"]

WIDE: dict[str, Architecture] = {}


_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def _decoder(name: str, prefix: str, targets: Any = "all-linear", **changes: Any) -> None:
    model, config = getattr(hf, f"{prefix}ForCausalLM"), getattr(hf, f"{prefix}Config")
    WIDE[name] = Architecture(lambda **c: model(config(**decoder(**changes, **c))), tokens, targets)


_decoder("qwen3", "Qwen3", head_dim=8)
_decoder("gemma", "Gemma", head_dim=8)
_decoder("gemma2", "Gemma2", head_dim=8, sliding_window=4)
_decoder("olmo", "Olmo")
_decoder("olmo2", "Olmo2")
_decoder("stablelm", "StableLm")
_decoder("starcoder2", "Starcoder2", residual_dropout=0.0, embedding_dropout=0.0)
_decoder("phi", "Phi", resid_pdrop=0.0, embd_pdrop=0.0)
_decoder("cohere", "Cohere")
_decoder("granite", "Granite")
_decoder("glm", "Glm", head_dim=8)
_decoder("gpt_neox", "GPTNeoX", hidden_dropout=0.0)
_decoder("mixtral", "Mixtral", _PROJECTIONS, num_local_experts=4)  # PEFT adapts stacked experts without DoRA only
_decoder("qwen2_moe", "Qwen2Moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)

_BERT = without(decoder(), "num_key_value_heads", "use_cache", "attention_dropout")
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _named(name: str, make: Callable[..., Any], inputs: Any = tokens, targets: Any = "all-linear") -> None:
    WIDE[name] = Architecture(make, inputs, targets)


_named(
    "roberta",
    lambda **c: hf.RobertaForMaskedLM(hf.RobertaConfig(**_BERT, **_NO_DROPOUT, **c)),
    targets=["query", "key", "value", "dense"],
)
_named(
    "distilbert",
    lambda **c: hf.DistilBertForMaskedLM(
        hf.DistilBertConfig(
            dim=HIDDEN,
            hidden_dim=48,
            n_layers=2,
            n_heads=4,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            **c,
        )
    ),
    targets=["q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2"],
)
_named(
    "bart",
    lambda **c: hf.BartForConditionalGeneration(
        hf.BartConfig(
            d_model=HIDDEN,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            vocab_size=VOCABULARY,
            max_position_embeddings=64,
            dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=2,
            forced_eos_token_id=None,
            use_cache=False,
            **c,
        )
    ),
    targets=["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
)
_named(
    "mamba",
    lambda **c: hf.MambaForCausalLM(
        hf.MambaConfig(
            hidden_size=HIDDEN,
            state_size=4,
            num_hidden_layers=2,
            vocab_size=VOCABULARY,
            use_cache=False,
            time_step_rank=4,
            **c,
        )
    ),
    targets=["in_proj", "x_proj"],
)
_named(
    "dinov2",
    lambda **c: hf.Dinov2ForImageClassification(
        hf.Dinov2Config(
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            mlp_ratio=2,
            image_size=16,
            patch_size=8,
            num_labels=LABELS,
            **_NO_DROPOUT,
            **c,
        )
    ),
    pictures,
)
_named(
    "convnext",
    lambda **c: hf.ConvNextForImageClassification(
        hf.ConvNextConfig(hidden_sizes=[16, HIDDEN], depths=[1, 1], num_stages=2, num_labels=LABELS, **c)
    ),
    pictures,
    ["pwconv1", "pwconv2", "patch_embeddings"],
)
_named(
    "resnet",
    lambda **c: hf.ResNetForImageClassification(
        hf.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, HIDDEN], depths=[1, 1], layer_type="basic", num_labels=LABELS, **c
        )
    ),
    pictures,
    ["convolution"],
)


def spectrogram(seed: int = 1, batch: int = 2) -> dict[str, torch.Tensor]:
    values = torch.randn(batch, 32, 16, generator=torch.Generator().manual_seed(seed))
    return {"input_values": values, "labels": torch.arange(batch) % LABELS}


_named(
    "audio_spectrogram",
    lambda **c: hf.ASTForAudioClassification(
        hf.ASTConfig(
            hidden_size=HIDDEN,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            patch_size=8,
            frequency_stride=8,
            time_stride=8,
            max_length=32,
            num_mel_bins=16,
            num_labels=LABELS,
            **_NO_DROPOUT,
            **c,
        )
    ),
    spectrogram,
    ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "query", "key", "value", "dense", "projection"],
)


def speech(seed: int = 1, batch: int = 2) -> dict[str, torch.Tensor]:
    values = torch.randn(batch, 8, 16, generator=torch.Generator().manual_seed(seed))
    return {"input_features": values, "labels": tokens(seed, batch)["labels"]}


_named(
    "whisper",
    lambda **c: hf.WhisperForConditionalGeneration(
        hf.WhisperConfig(
            d_model=HIDDEN,
            encoder_layers=2,
            decoder_layers=2,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            vocab_size=VOCABULARY,
            num_mel_bins=8,
            max_source_positions=8,
            max_target_positions=32,
            dropout=0.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
            use_cache=False,
            begin_suppress_tokens=None,
            suppress_tokens=None,
            **c,
        )
    ),
    speech,
    ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"],
)


def captioned(seed: int = 1, batch: int = 2) -> dict[str, torch.Tensor]:
    """Text and a picture of four patches, which Qwen2-VL takes flattened and merges two by two."""
    ids = tokens(seed, batch)["input_ids"].clamp(max=VOCABULARY - 4)
    ids[:, 2], ids[:, 3], ids[:, 4] = VOCABULARY - 3, VOCABULARY - 1, VOCABULARY - 2
    values = torch.randn(batch * 4, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(seed))
    return {
        "input_ids": ids,
        "labels": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": values,
        "image_grid_thw": torch.tensor([[1, 2, 2]] * batch),
        "mm_token_type_ids": (ids == VOCABULARY - 1).int(),
    }


def _qwen2_vl(**changes: Any) -> Any:
    text = decoder(rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0})
    vision = {
        "depth": 1,
        "embed_dim": 16,
        "hidden_size": HIDDEN,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": 4,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
    }
    special = {
        "vision_start_token_id": VOCABULARY - 3,
        "vision_end_token_id": VOCABULARY - 2,
        "image_token_id": VOCABULARY - 1,
        "video_token_id": VOCABULARY,
    }
    return hf.Qwen2VLForConditionalGeneration(
        hf.Qwen2VLConfig(text_config=text, vision_config=vision, **special, **changes)
    )


_named(
    "qwen2_vl",
    _qwen2_vl,
    captioned,
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "qkv"],
)


class _Noise(torch.nn.Module):
    """A diffusion model as one that takes tensors by name and gives logits and a loss."""

    def __init__(self, model: Any, condition: str) -> None:
        super().__init__()
        self.model = model
        self.condition = condition

    def forward(self, sample: torch.Tensor, step: torch.Tensor, condition: torch.Tensor) -> Any:
        out = self.model(sample, timestep=step, **{self.condition: condition}).sample
        return hf.modeling_outputs.CausalLMOutput(loss=(out - 0.5).square().mean(), logits=out)


def _unet(**changes: Any) -> Any:
    from diffusers import UNet2DConditionModel

    sizes: dict[str, Any] = {
        "sample_size": 8,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": HIDDEN,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    return _Noise(UNet2DConditionModel(**sizes, **changes), "encoder_hidden_states")


def noisy(seed: int = 1, batch: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 3, 8, 8, generator=generator),
        "step": torch.arange(batch),
        "condition": torch.randn(batch, 5, HIDDEN, generator=generator),
    }


def _dit(**changes: Any) -> Any:
    from diffusers import DiTTransformer2DModel

    sizes: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "in_channels": 3,
        "out_channels": 3,
        "num_layers": 2,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 10,
        "norm_num_groups": 4,
    }
    model = DiTTransformer2DModel(**sizes, **changes)
    for module in model.modules():
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = (
                0.0  # in training it drops labels at random, another draw in each run that is compared
            )
    return _Noise(model, "class_labels")


def labelled(seed: int = 1, batch: int = 2) -> dict[str, torch.Tensor]:
    return {**noisy(seed, batch), "condition": torch.arange(batch) % 10}


_named(
    "unet",
    _unet,
    noisy,
    ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in", "conv_shortcut", "proj_in", "proj_out"],
)
_named("dit", _dit, labelled, ["to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2"])
