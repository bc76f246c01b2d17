"""Adapters as PEFT saves them: their tensors' names, and what adapter_config.json says of them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from .findings import Finding
from .layer import Layer, Weight
from .stored import Base, Tensors

_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<site>.+)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|alpha|base_layer)(?P<rest>\..+)?"
)
_FACTORS = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
REFUSED_QUANTIZATION = ("aqlm", "awq", "eetq", "gptq")
"""Quantisations for which PEFT has no DoRA (read from PEFT 0.21.2)."""
# Options of LoraConfig that PEFT has no form with DoRA for, and what it says.
_REFUSED = {
    "lora_bias": "lora_bias=True is not supported with DoRA",
    "megatron_config": "DoRA does not support megatron_core",
    "target_parameters": "target_parameters do not work with DoRA",
    "alora_invocation_tokens": "aLoRA (alora_invocation_tokens) cannot be combined with DoRA",
    "arrow_config": "arrow_config cannot be combined with DoRA",
    "use_qalora": "QA-LoRA (use_qalora) cannot be combined with DoRA",
    "use_bdlora": "use_bdlora cannot be combined with DoRA",
    "velora_config": "velora_config cannot be combined with DoRA",
    "monteclora_config": "monteclora_config cannot be combined with DoRA",
    "kasa_config": "kasa_config cannot be combined with DoRA",
}


def layers_of(tensors: Tensors, config: Mapping[str, Any] | None, base: Base) -> tuple[list[Layer], list[Finding]]:
    """The adapter's layers, and what is wrong with it apart from their numbers.

    Args:
        tensors: the adapter's.
        config: its adapter_config.json; None if there is none.
        base: the base.

    Raises:
        ValueError: no tensor of an adapter is there; a configuration that is not one of LoRA.
    """
    settings = dict(config or {})
    if settings.get("peft_type", "LORA") != "LORA":
        raise ValueError(
            f"adapter_config.json: peft_type is {settings['peft_type']!r}, and DoRA is an option of 'LORA'"
        )
    if config is not None and (not isinstance(settings.get("r"), int) or settings["r"] < 1):
        raise ValueError(f"adapter_config.json: r is {settings.get('r')!r}, not a positive number")
    parts, unknown = _by_site(tensors)
    if not parts:
        raise ValueError("the adapter has no tensors named lora_A and lora_B, or lora_down and lora_up")
    findings = list(_of_the_configuration(settings, base)) if config is not None else []
    if unknown:
        findings.append(
            Finding("unknown-tensor", "", f"{len(unknown)} tensors are not of LoRA: {', '.join(unknown[:3])}")
        )
    if config is None and not all("alpha" in names for names in parts.values()):
        what = "there is no adapter_config.json, and no alpha in the file: the scaling is taken as 1"
        findings.append(Finding("assumed-scaling", "", what))
    layers = []
    used: set[str] = set()
    for site, names in parts.items():
        layer, found = _layer(site, names, tensors, settings if config is not None else None, base, used)
        layers.append(layer)
        findings += found
    if config is not None:
        findings += _unused_patterns(settings, used)
        findings += _untouched(settings, set(parts), base)
    return layers, findings


def _by_site(tensors: Tensors) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Layer -> part -> name of the tensor; and the names of other tensors."""
    parts: dict[str, dict[str, str]] = {}
    unknown: list[str] = []
    for name in tensors:
        match = _KEY.fullmatch(name)
        if match is None or "modules_to_save" in name:
            unknown.append(name)
        elif (match["rest"] or "").endswith(".bias"):
            if match["part"] != "base_layer":
                parts.setdefault(match["site"], {})["bias"] = name
        else:
            parts.setdefault(match["site"], {})[match["part"]] = name
    return {site: p for site, p in parts.items() if not p.keys() <= {"alpha", "base_layer"}}, unknown


def scaling_of(settings: Mapping[str, Any], site: str, used: set[str]) -> tuple[int, float]:
    """Rank and scaling of a layer, as PEFT takes them from the configuration.

    Args:
        settings: the configuration.
        site: the layer's name.
        used: receives the patterns that apply.
    """

    def pattern(name: str, otherwise: Any) -> Any:
        for key, value in (settings.get(name) or {}).items():
            if re.match(rf"(.*\.)?({key})$", site):
                used.add(f"{name} {key}")
                return value
        return otherwise

    rank = int(pattern("rank_pattern", settings.get("r", 8)))
    alpha = float(pattern("alpha_pattern", settings.get("lora_alpha", 8)))
    return rank, alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _layer(
    site: str,
    names: Mapping[str, str],
    tensors: Tensors,
    settings: Mapping[str, Any] | None,
    base: Base,
    used: set[str],
) -> tuple[Layer, list[Finding]]:
    read = {part: tensors.read(name) for part, name in names.items() if part not in ("base_layer", "bias")}
    embedding = "lora_embedding_A" in read or "lora_embedding_B" in read
    prefix = "lora_embedding" if embedding else "lora"
    a, b, m = read.get(f"{prefix}_A"), read.get(f"{prefix}_B"), read.get("lora_magnitude_vector")
    findings: list[Finding] = []
    rank = int(a.shape[0]) if a is not None and a.dim() > 1 else int(b.shape[1]) if b is not None and b.dim() > 1 else 0
    scaling = float(read["alpha"]) / max(1, rank) if "alpha" in read else 1.0
    if settings is not None:
        said, scaling = scaling_of(settings, site, used)
        if rank and rank != said:
            findings.append(Finding("rank", site, f"its factors have rank {rank}, the configuration says {said}"))
            scaling = scaling * said / rank
        if scaling == 0:
            findings.append(Finding("scaling", site, "its scaling is 0: the factors have no effect"))
        if m is not None and not settings.get("use_dora"):
            findings.append(Finding("ignored-magnitude", site, "it has a magnitude, and use_dora is not true"))
    if "bias" in names:
        findings.append(Finding("refused", site, "its factor has a bias: lora_bias is not supported with DoRA"))
    module = base.module(site)
    weight: Weight | None = None
    unread, groups = "", 1
    if module is None and "base_layer" not in names:
        findings.append(_absent(site, base))
    else:
        # PEFT saves adapted embeddings with the adapter, and loads them over the base's.
        own = names.get("base_layer")
        found = base.tensors.weight(f"{module}.weight") if own is None else tensors.weight(own)
        if isinstance(found, str):
            unread = found + (f" ({base.quantization})" if base.quantization else "")
        else:
            weight = found
    left, right = (t if t is None or t.dim() < 2 else t.flatten(1) for t in (b, a))
    transposed = embedding or bool((settings or {}).get("fan_in_fan_out"))
    if weight is not None and left is not None and right is not None:
        if len(weight.shape) > 2 and left.dim() == right.dim() == 2:
            transposed = False
            # PEFT's second factor has as many groups as the convolution, and views it with the whole rank.
            if left.shape[1] != right.shape[0] and right.shape[0] % max(1, left.shape[1]) == 0:
                groups = right.shape[0] // left.shape[1]
                left = left.reshape(-1, right.shape[0])
        elif not embedding and left.dim() == right.dim() == 2:
            transposed = _is_transposed(weight.shape, left, right, transposed)
        found_dtypes = {
            "the factors": {t.dtype for t in (a, b) if t is not None},
            "the magnitude": {m.dtype} if m is not None else set(),
        }
        findings += mixed_dtypes(site, weight.dtype, found_dtypes)
    return Layer(site, left, right, m, scaling, weight, transposed, groups, unread=unread), findings


def _is_transposed(shape: tuple[int, ...], left: torch.Tensor, right: torch.Tensor, flag: bool) -> bool:
    """Whether a weight is stored as ``[d_in, d_out]``. PEFT corrects fan_in_fan_out layer by layer, so the flag counts for square ones."""
    straight = (left.shape[0], right.shape[1]) == shape
    reverse = (right.shape[1], left.shape[0]) == shape
    return flag if straight == reverse else reverse


def mixed_dtypes(
    site: str, dtype: torch.dtype, others: Mapping[str, set[torch.dtype]], adapter: str = ""
) -> Iterator[Finding]:
    """A note where an adapter in higher precision than the base's makes PEFT compute in it."""
    wider = {
        what: max(dtypes, key=lambda d: d.itemsize)
        for what, dtypes in others.items()
        if any(d.itemsize > dtype.itemsize for d in dtypes)
    }
    if not wider:
        return
    short = {what: str(d).removeprefix("torch.") for what, d in wider.items()}
    base = str(dtype).removeprefix("torch.")
    what = " and ".join(f"{name} {'are' if name.endswith('s') else 'is'} {d}" for name, d in short.items())
    does = (
        f"PEFT casts the input and a copy of the weight to {short['the factors']} at every forward, and the result back to {base}"
        if "the factors" in short
        else f"m / n is {short['the magnitude']}, so PEFT adds in it, and casts the result back to {base}"
    )
    yield Finding("mixed-dtype", site, f"{what}, the base {base}: {does}", adapter)


def _absent(site: str, base: Base) -> Finding:
    packed = sorted({name[len(site) + 1 :] for name in base.tensors if name.startswith(f"{site}.")} - {"bias"})
    if any(name in ("in_proj_weight", "out_proj.weight") for name in packed):
        return Finding("refused", site, "it is a MultiheadAttention, for which PEFT has no DoRA")
    if packed:
        return Finding(
            "unread", site, f"its norms are not checked: the base has no {site}.weight, but {', '.join(packed[:3])}"
        )
    return Finding("missing-target", site, f"the base has no {site}.weight")


def _of_the_configuration(settings: Mapping[str, Any], base: Base) -> Iterator[Finding]:
    if not settings.get("use_dora"):
        return
    for option, text in _REFUSED.items():
        if settings.get(option):
            yield Finding("refused", "", text)
    if str(settings.get("init_lora_weights")).lower() == "mica":
        yield Finding("refused", "", 'init_lora_weights="mica" cannot be combined with DoRA')
    if base.quantization in REFUSED_QUANTIZATION:
        yield Finding("refused", "", f"the base is quantised by {base.quantization}, for which PEFT has no DoRA")


def _unused_patterns(settings: Mapping[str, Any], used: set[str]) -> Iterator[Finding]:
    for name in ("rank_pattern", "alpha_pattern"):
        for key in settings.get(name) or {}:
            if f"{name} {key}" not in used:
                yield Finding("scaling", "", f"{name} has {key!r}, which applies to no layer of the adapter")


def _untouched(settings: Mapping[str, Any], sites: set[str], base: Base) -> Iterator[Finding]:
    """Targets for which the adapter has no tensors."""
    targets = settings.get("target_modules")
    if not isinstance(targets, list) or any(
        settings.get(k) for k in ("exclude_modules", "layers_to_transform", "layer_replication")
    ):
        return
    adapted = {base.module(site) or site for site in sites}
    for target in targets:
        of_base = {m for m in base.modules if m == target or m.endswith(f".{target}")}
        if not of_base and not any(s == target or s.endswith(f".{target}") for s in sites):
            yield Finding(
                "missing-target", "", f"target_modules has {target!r}, which neither the base nor the adapter has"
            )
        for module in sorted(of_base - adapted):
            yield Finding(
                "untouched-target",
                module,
                f"target_modules has {target!r}, and the adapter has no tensors for this layer",
            )
