"""``dorafx.check``: the adapter layers of a model in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dorafx._compat.distributed import placements
from dorafx._compat.tensors import is_wrapper

from .findings import CheckReport, Finding
from .layer import Layer, Weight, examine
from .peft_files import mixed_dtypes

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check(model: torch.nn.Module) -> CheckReport:
    """Look over every DoRA adapter of a model before it is trained or served: rows whose norm is zero or beyond the dtype, magnitudes
    that are frozen, untrained, of the wrong length, negative, zero or not finite, and dtypes that make PEFT compute in another one.

    Nothing is changed, and the model is not called. The norms are computed on the weights' devices, a block of rows at a time; a
    quantised weight is dequantised whole, one layer after the other. What cannot be read (tensors without data, sharded over devices, merged
    adapters) is a warning, and counts as unchecked. ``dorafx check ADAPTER --base DIR`` does the same on files.

    Args:
        model: with PEFT's adapter layers, or others that have a ``lora_magnitude_vector`` as these have.

    Returns:
        The report; ``print()`` it. It is true if there is no error and no warning.

    Raises:
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: it has no adapter layer with a magnitude.

    Examples:
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(64, 96))
        >>> _ = base[0].weight.data[94:].zero_()  # rows of padding
        >>> model = get_peft_model(base, LoraConfig(target_modules=["0"], use_dora=True))
        >>> report = dorafx.check(model)
        >>> report.clean, [(f.kind, f.rows) for f in report.problems]
        (False, [('zero-norm', (94, 95))])
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"check takes an nn.Module, not {type(model).__name__}")
    report = CheckReport()
    for site, module in model.named_modules():
        for adapter in _adapters(module):
            layer, findings = _layer(site, module, adapter, model.training)
            found, checked = examine(layer)
            report.findings += [*findings, *found]
            report.layers += 1
            report.checked += checked
    if not report.layers:
        raise ValueError(
            "check needs adapter layers with a lora_magnitude_vector, and the model has none: is use_dora true?"
        )
    return report


def _adapters(module: torch.nn.Module) -> Iterator[str]:
    """The names of a layer's DoRA adapters: those with a magnitude, and those that say that they are."""
    magnitudes = getattr(module, "lora_magnitude_vector", None)
    if not isinstance(magnitudes, (torch.nn.ModuleDict, torch.nn.ParameterDict)):
        return
    names = dict.fromkeys(magnitudes.keys())
    said = getattr(module, "use_dora", None)
    if isinstance(said, dict):
        names.update(dict.fromkeys(name for name, on in said.items() if on))
    yield from names


def _layer(site: str, module: Any, adapter: str, training: bool) -> tuple[Layer, list[Finding]]:
    magnitude = _entry(module, "lora_magnitude_vector", adapter)
    embedding = _entry(module, "lora_embedding_A", adapter) is not None
    prefix = "lora_embedding" if embedding else "lora"
    a, b = _entry(module, f"{prefix}_A", adapter), _entry(module, f"{prefix}_B", adapter)
    findings: list[Finding] = []
    trained = any(t is not None and t.requires_grad for t in (a, b))
    if training and trained and magnitude is not None and not magnitude.requires_grad:
        what = "its magnitude has requires_grad=False, and its factors are trained"
        findings.append(Finding("frozen-magnitude", site, what, adapter))
    if getattr(_sub(module, "lora_B", adapter), "bias", None) is not None:
        findings.append(
            Finding("refused", site, "its factor has a bias: lora_bias is not supported with DoRA", adapter)
        )
    tensor, unread = _base_weight(module, [t for t in (a, b, magnitude) if t is not None])
    left, right = (None if t is None or t.dim() < 2 else t.detach().flatten(1) for t in (b, a))
    weight, transposed, groups = None, False, 1
    if tensor is not None:
        weight = Weight.of(tensor.detach())
        transposed = tensor.dim() == 2 and (embedding or bool(getattr(module, "fan_in_fan_out", False)))
        if tensor.dim() > 2 and left is not None and right is not None and 0 < left.shape[1] != right.shape[0]:
            groups = max(1, right.shape[0] // max(1, left.shape[1]))
            left = left.reshape(-1, right.shape[0])
        others = {
            "the factors": {t.dtype for t in (a, b) if t is not None},
            "the magnitude": {magnitude.dtype} if magnitude is not None else set(),
        }
        findings += mixed_dtypes(site, tensor.dtype, others, adapter)
    scalings = getattr(module, "scaling", {})
    scaling = float(scalings.get(adapter, 1.0)) if isinstance(scalings, dict) else 1.0
    if scaling == 0:
        findings.append(Finding("scaling", site, "its scaling is 0: the factors have no effect", adapter))
    layer = Layer(site, left, right, magnitude, scaling, weight, transposed, groups, unread=unread, adapter=adapter)
    if tensor is not None and a is not None and a.dtype in _FLOATS:
        # PEFT casts a linear layer's weight and input to the factor's dtype, and adds the weights of others as they are.
        linear = tensor.dim() == 2 and not embedding
        layer.dtype = a.dtype if linear else torch.promote_types(tensor.dtype, a.dtype)
    layer.no_data = bool(unread) and not all(_has_data(t) for t in (a, b, magnitude) if t is not None)
    return layer, findings


def _has_data(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and placements(tensor) is None and bool(tensor.numel())


def _sub(module: Any, name: str, adapter: str) -> Any:
    group = getattr(module, name, None)
    return group[adapter] if group is not None and adapter in group else None


def _entry(module: Any, name: str, adapter: str) -> torch.Tensor | None:
    """An adapter's tensor in a dictionary of modules or parameters."""
    value = _sub(module, name, adapter)
    value = getattr(value, "weight", value)
    return value if isinstance(value, torch.Tensor) else None


def _base_weight(module: Any, others: list[torch.Tensor]) -> tuple[torch.Tensor | None, str]:
    """The base weight in floating point; None with the reason where there is none to read."""
    get = getattr(module, "get_base_layer", None)
    base = get() if callable(get) else getattr(module, "base_layer", module)
    weight = getattr(base, "weight", None)
    if getattr(module, "merged_adapters", None):
        return None, "an adapter is merged into the base weight; unmerge it first"
    if any(t.device.type == "meta" for t in (*others, *([weight] if isinstance(weight, torch.Tensor) else []))):
        return None, "its tensors have no data (device meta, or offloaded)"
    if any(placements(t) is not None for t in (*others, *([weight] if isinstance(weight, torch.Tensor) else []))):
        return None, "its tensors are sharded over devices; check the model before it is sharded"
    if isinstance(weight, torch.Tensor) and weight.dtype in _FLOATS and not is_wrapper(weight):
        if not weight.numel():
            return None, "its weight is partitioned (FSDP, ZeRO-3); check the model before it is"
        if getattr(weight, "quant_state", None) is None:
            return weight, ""
    try:
        from peft.utils.integrations import dequantize_module_weight

        with torch.no_grad():
            dense = dequantize_module_weight(base)
    except Exception as error:
        kind = type(base).__name__
        return (
            None,
            f"the weight of a {kind} cannot be read ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})",
        )
    if not isinstance(dense, torch.Tensor) or dense.dtype not in _FLOATS or dense.dim() < 2:
        return None, f"the weight of a {type(base).__name__} cannot be read as a matrix"
    return dense, ""
