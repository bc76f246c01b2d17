"""Saved adapters of the two layers, and swapping one into a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils.hotswap import check_hotswap_configs_compatible, hotswap_adapter_from_state_dict
from peft_features import adapted, layers, perturb
from safetensors.torch import load_file


def adapter(folder: Path, seed: int, model: Any = None, **lora: Any) -> str:
    """Save an adapter with weights of its own; returns its folder."""
    path = folder / f"adapter{seed}"
    model = adapted(**lora) if model is None else model
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_A" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    perturb(model, seed=seed)
    model.save_pretrained(path)
    return str(path)


def loaded(path: str, trainable: bool = False) -> Any:
    """The base model with a saved adapter."""
    return PeftModel.from_pretrained(layers(), path, is_trainable=trainable).eval()


def swap(model: Any, path: str, name: str = "default") -> None:
    """What ``hotswap_adapter`` does, with the names of magnitudes as PEFT's modules have them (PEFT 0.21.2 leaves out ``.weight``)."""
    config = PeftConfig.from_pretrained(path)
    check_hotswap_configs_compatible(model.peft_config[name], config)
    weights = {}
    for key, value in load_file(f"{path}/adapter_model.safetensors").items():
        if key.endswith("lora_magnitude_vector"):
            weights[f"{key}.{name}.weight"] = value
        else:
            weights[key.replace(".weight", f".{name}.weight")] = value
    hotswap_adapter_from_state_dict(model, weights, name, config)
