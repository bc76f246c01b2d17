"""Writing and reading the file of scales."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from dorafx.errors import DorafxError

from .layers import digest, dora_layers

FILE = "dora_scales.safetensors"
"""The file's name, where a folder is given: beside ``adapter_model.safetensors``."""
_FORMAT = "2"
_PARTS = ("base weight", "lora_A", "lora_B", "magnitude", "scaling", "scale")
"""What the metadata say of each layer."""


def export_scales(
    model: torch.nn.Module, path: str | os.PathLike[str] | None = None, adapter: str | None = None
) -> dict[str, torch.Tensor]:
    """Compute the scale ``g = m / ‖W + s·B·A‖`` of every DoRA layer of an adapter, and write them to a file.

    With ``g`` a DoRA layer is LoRA and a scale by row, ``y = g ⊙ (x·Wᵀ + s·x·Aᵀ·Bᵀ) + b``, and no norm is computed.
    [`dorafx.apply_scales`][] makes a PEFT model compute that; the file is for any other program, too. Nothing of the model is changed.
    Norms are taken in fp64, over blocks of rows. Linear layers, embeddings, convolutions, and quantised base weights, as PEFT has them.

    The file is a safetensors file with one fp32 tensor a layer (fp64 where a tensor of the layer is), named as
    ``model.named_modules()`` names it and shaped as PEFT's magnitude: ``[d_out]``, for a convolution ``[1, d_out, 1, …]``. Its metadata
    hold ``dorafx_scales`` (the format's version), ``adapter``, ``peft_version``, and ``layers``: JSON with the scaling ``s`` and 128-bit
    hashes (XXH3) of base weight, factors, magnitude and scale of each layer, by which a file that is stale or damaged is refused.

    Args:
        model: a PEFT model (from ``get_peft_model`` or ``PeftModel.from_pretrained``), or a module that has PEFT's layers inside.
        path: a file whose name ends in ``.safetensors``, or the folder of the adapter, in which ``dora_scales.safetensors`` is written. A
            folder that is not there is made. None: nothing is written.
        adapter: the adapter's name; the active one by default.

    Returns:
        The scales by module name.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: no such adapter; none is named, and several are active.
        DorafxError: the model has no DoRA, an adapter is merged, or parameters are not in this process; the file cannot be written.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> adapted = get_peft_model(base, LoraConfig(use_dora=True, target_modules=["0"]))
        >>> {name: tuple(g.shape) for name, g in dorafx.export_scales(adapted).items()}
        {'base_model.model.0': (6,)}
    """
    name, layers = dora_layers(model, adapter, "export_scales")
    if path is not None and Path(path).suffix == ".safetensors" and not Path(path).parent.is_dir():
        raise DorafxError(f"export_scales: there is no folder {Path(path).parent} to write {Path(path).name} in")
    scales = {layer.name: layer.scale() for layer in layers}
    if path is not None:
        import peft
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        metadata = {
            "dorafx_scales": _FORMAT,
            "adapter": name,
            "peft_version": str(peft.__version__),
            "layers": json.dumps({x.name: {**x.digests(), "scale": digest(scales[x.name])} for x in layers}),
        }
        file = file_of(path)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file({key: g.cpu().contiguous() for key, g in scales.items()}, file, metadata)
        except (OSError, SafetensorError) as error:
            raise DorafxError(f"export_scales: {file} cannot be written: {error}") from error
    return scales


def file_of(path: str | os.PathLike[str]) -> Path:
    """The file that a path to a file or a folder stands for. What does not exist is a folder, unless it ends in ``.safetensors``."""
    given = Path(path)
    is_file = given.is_file() or (not given.is_dir() and given.suffix == ".safetensors")
    return given if is_file else given / FILE


def read_scales(path: str | os.PathLike[str]) -> tuple[dict[str, torch.Tensor], str, dict[str, dict[str, Any]]]:
    """Scales, the adapter's name, and what they were computed from.

    Raises:
        FileNotFoundError: there is no such file.
        DorafxError: it is no file of scales, or not as it was written.
    """
    from safetensors import SafetensorError, safe_open

    file = file_of(path)
    if not file.is_file():
        raise FileNotFoundError(f"apply_scales: there is no file {file}; dorafx.export_scales(model, path) writes it")
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            scales = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no dictionary)
    except SafetensorError as error:
        raise DorafxError(f"apply_scales: {file} is no safetensors file: {error}") from error
    version = metadata.get("dorafx_scales")
    if version is None:
        raise DorafxError(f"apply_scales: {file} was not written by dorafx.export_scales")
    if version != _FORMAT:
        raise DorafxError(
            f"apply_scales: {file} has format {version}, this dorafx reads {_FORMAT}: export the scales again"
        )
    again = "export the scales again"
    for key in ("adapter", "layers"):
        if key not in metadata:
            raise DorafxError(f"apply_scales: {file} has no {key!r} in its metadata: {again}")
    try:
        layers = json.loads(metadata["layers"])
    except ValueError as error:
        raise DorafxError(f"apply_scales: {file}: 'layers' in its metadata is not JSON ({error}): {again}") from error
    if not isinstance(layers, dict):
        raise DorafxError(f"apply_scales: {file}: 'layers' in its metadata is no JSON object: {again}")
    for name, told in layers.items():
        absent = [part for part in _PARTS if part not in told] if isinstance(told, dict) else list(_PARTS)
        if absent:
            raise DorafxError(f"apply_scales: {file}: {name} has no {absent[0]!r} in the metadata: {again}")
        if name not in scales:
            raise DorafxError(f"apply_scales: {file} has no tensor of {name}: {again}")
        if digest(scales[name]) != told["scale"]:
            raise DorafxError(f"apply_scales: {file} is damaged: the scale of {name} is not what was exported: {again}")
    return scales, metadata["adapter"], layers
