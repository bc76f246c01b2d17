"""``dorafx check ADAPTER --base DIR``: the adapter's files beside the base's, without a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

from . import kohya, peft_files
from .findings import CheckReport, Finding
from .layer import Layer, examine
from .stored import Base, read_json, tensors_of

_NAMES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")


def check_files(adapter: Path, base: Path | None = None, dtype: torch.dtype | None = None) -> CheckReport:
    """Check a DoRA adapter on disk against its base. A block of rows of one weight is in memory at a time; the adapter is read whole.

    Args:
        adapter: the folder that PEFT saves; or a safetensors file, of PEFT, diffusers, kohya's sd-scripts or LyCORIS.
        base: the base model's folder, with safetensors files; or one such file. By default what adapter_config.json names, if it is a folder.
        dtype: in which the layers will compute. By default the wider one of the base weight's and the factors', in which PEFT takes norms;
            for files of other programs the weight's.

    Raises:
        ValueError: something is absent, cannot be read, or is no DoRA adapter; the message names it.
        DorafxError: the package safetensors is not installed.
    """
    file, config_path = _adapter_files(adapter)
    config = read_json(config_path) if config_path is not None else None
    if base is None:
        named = config.get("base_model_name_or_path") if config is not None else None
        if not (isinstance(named, str) and named and Path(named).is_dir()):
            what = (
                f"{named!r}, which adapter_config.json names, is no folder here"
                if named
                else "is not named by the adapter"
            )
            raise ValueError(f"the base model {what}: give its folder with --base (nothing is downloaded)")
        base = Path(named)
    with contextlib.ExitStack() as stack:
        tensors, weights = tensors_of(file, stack), Base(base, stack)
        if kohya.is_kohya(tensors):
            layers, findings = kohya.layers_of(tensors, weights)
        else:
            layers, findings = peft_files.layers_of(tensors, config, weights)
        if not any(layer.magnitude is not None for layer in layers) and not (config or {}).get("use_dora"):
            raise ValueError(f"{adapter} is no DoRA adapter: it has no magnitudes, and its use_dora is not true")
        return _report(layers, findings, dtype)


def _report(layers: Iterable[Layer], findings: list[Finding], dtype: torch.dtype | None) -> CheckReport:
    report = CheckReport(list(findings))
    for layer in layers:
        found, checked = examine(layer if dtype is None else replace(layer, dtype=dtype))
        report.findings += found
        report.layers += 1
        report.checked += checked
    return report


def _adapter_files(adapter: Path) -> tuple[Path, Path | None]:
    """The tensors' file, and the configuration's if there is one."""
    if adapter.is_file():
        beside = adapter.parent / "adapter_config.json"
        return adapter, beside if beside.is_file() and adapter.name == _NAMES[0] else None
    if not adapter.is_dir():
        raise ValueError(f"there is no adapter {str(adapter)!r}: give a folder that PEFT saved, or a safetensors file")
    config = adapter / "adapter_config.json"
    files = [adapter / name for name in _NAMES if (adapter / name).is_file()]
    if not files and not config.is_file():
        files = sorted(adapter.glob("*.safetensors"))
        inner = sorted(p.parent.name for p in adapter.glob("*/adapter_config.json"))
        if inner:
            raise ValueError(f"{adapter} holds adapters in folders of their own: check {', '.join(inner)} one by one")
        if len(files) > 1:
            raise ValueError(f"{adapter} has {len(files)} safetensors files and no adapter_config.json: give one file")
    if not files:
        if (adapter / "adapter_model.bin").is_file():
            raise ValueError(f"{adapter}: adapter_model.bin is not read; save the adapter as safetensors")
        raise ValueError(f"there is no {_NAMES[0]} in {adapter}")
    return files[0], config if config.is_file() else None
