"""Adapters as PEFT saves them: their tensors' names, and what adapter_config.json says of them."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
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
# Models of transformers in which these layers are its Conv1D, whose weight is [d_in, d_out] (read from transformers 5.23.0).
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
_CONV1D_LAYERS = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
_UNKNOWN_AXES = (
    "its weight is square, and neither its shape nor a config.json of the base says whether it is stored transposed "
    "(transformers' Conv1D)"
)
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
    if config is not None:
        _check_settings(settings)
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
    unknown_base = _unknown_base(settings)
    for site, names in parts.items():
        layer, found = _layer(site, names, tensors, settings if config is not None else None, base, used, unknown_base)
        layers.append(layer)
        findings += found
    layers = _with_axes(layers, settings, base)
    if config is not None:
        findings += _unused_patterns(settings, used)
        findings += _untouched(settings, set(parts), base)
    return layers, findings


def _check_settings(settings: Mapping[str, Any]) -> None:
    """Raises:
    ValueError: a rank, an alpha or a pattern of them that PEFT could not use."""

    def check(what: str, value: Any, is_rank: bool) -> None:
        number = isinstance(value, int if is_rank else (int, float)) and not isinstance(value, bool)
        if not number or (is_rank and value < 1) or not math.isfinite(value):
            raise ValueError(
                f"adapter_config.json: {what} is {value!r}, not a {'positive whole' if is_rank else 'finite'} number"
            )

    check("r", settings.get("r", 8), True)
    check("lora_alpha", settings.get("lora_alpha", 8), False)
    for name in ("rank_pattern", "alpha_pattern"):
        patterns = settings.get(name) or {}
        if not isinstance(patterns, dict):
            raise ValueError(
                f"adapter_config.json: {name} is a {type(patterns).__name__}, not an object of patterns to numbers"
            )
        for key, value in patterns.items():
            check(f"{name}[{key!r}]", value, name == "rank_pattern")
            try:
                re.compile(_pattern(key))
            except re.error as error:
                at = "" if error.pos is None else f" at position {max(0, error.pos - len(_pattern('')) + 2)}"
                raise ValueError(
                    f"adapter_config.json: {name} has {key!r}, which is no regular expression ({error.msg}{at})"
                ) from None


def _pattern(key: str) -> str:
    """The expression that PEFT makes of a pattern."""
    return rf"(.*\.)?({key})$"


def _unknown_base(settings: Mapping[str, Any]) -> str:
    """Why the weights on which PEFT builds the layers are not those of the files; empty if they are."""
    if settings.get("layer_replication"):
        return "layer_replication builds another model of the base's layers"
    init = settings.get("init_lora_weights")
    # EVA and orthogonal factors leave the base as it is; so does LoRA-GA when an adapter is loaded.
    if isinstance(init, str) and (init.startswith(("pissa", "corda")) or init.lower() in ("olora", "loftq")):
        return f"init_lora_weights={init!r} makes PEFT change the base weight when it loads the adapter"
    return ""


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
            if re.match(_pattern(key), site):
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
    unknown_base: str = "",
) -> tuple[Layer, list[Finding]]:
    read = {part: tensors.read(name) for part, name in names.items() if part not in ("base_layer", "bias")}
    embedding = "lora_embedding_A" in read or "lora_embedding_B" in read
    prefix = "lora_embedding" if embedding else "lora"
    a, b, m = read.get(f"{prefix}_A"), read.get(f"{prefix}_B"), read.get("lora_magnitude_vector")
    findings: list[Finding] = []
    rank = int(a.shape[0]) if a is not None and a.dim() > 1 else int(b.shape[1]) if b is not None and b.dim() > 1 else 0
    scaling = tensors.number(names["alpha"]) / max(1, rank) if "alpha" in read else 1.0
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
    unread, groups = unknown_base, 1
    if settings is not None and settings.get("layer_replication"):
        pass  # the layers have other numbers than in the base
    elif module is None and "base_layer" not in names:
        findings.append(_absent(site, base))
    else:
        # PEFT saves adapted embeddings with the adapter, and loads them over the base's.
        own = names.get("base_layer")
        found = base.tensors.weight(f"{module}.weight") if own is None else tensors.weight(own)
        if isinstance(found, str):
            unread = unread or found + (f" ({base.quantization})" if base.quantization else "")
        else:
            weight = found
    left, right = (t if t is None or t.dim() < 2 else t.flatten(1) for t in (b, a))
    transposed = embedding
    if weight is not None and left is not None and right is not None:
        if len(weight.shape) > 2 and left.dim() == right.dim() == 2:
            transposed = False
            # PEFT's second factor has as many groups as the convolution, and views it with the whole rank.
            if 0 < left.shape[1] != right.shape[0] and right.shape[0] % max(1, left.shape[1]) == 0:
                groups = right.shape[0] // left.shape[1]
                left = left.reshape(-1, right.shape[0])
        found_dtypes = {
            "the factors": {t.dtype for t in (a, b) if t is not None},
            "the magnitude": {m.dtype} if m is not None else set(),
        }
        findings += mixed_dtypes(site, weight.dtype, found_dtypes)
    layer = Layer(site, left, right, m, scaling, weight, transposed, groups, unread=unread)
    if weight is not None:
        layer.dtype = functools.reduce(torch.promote_types, (t.dtype for t in (a, b) if t is not None), weight.dtype)
    return layer, findings


def _is_transposed(shape: tuple[int, ...], left: torch.Tensor, right: torch.Tensor) -> bool | None:
    """Whether a weight is stored as ``[d_in, d_out]``; None where its shape does not tell."""
    straight = (left.shape[0], right.shape[1]) == shape
    reverse = (right.shape[1], left.shape[0]) == shape
    return None if straight == reverse else reverse


def _with_axes(layers: list[Layer], settings: Mapping[str, Any], base: Base) -> list[Layer]:
    """The layers with :attr:`Layer.transposed` as the base stores them.

    fan_in_fan_out is not asked where something better is known: PEFT sets it right for each layer that it makes, so what it saves is that
    of the last one.
    """
    told: dict[str, set[bool]] = {}
    matrices = {}
    for layer in layers:
        if layer.weight is None or layer.left is None or layer.right is None or len(layer.weight.shape) != 2:
            continue
        if layer.transposed or not layer.left.dim() == layer.right.dim() == 2:
            continue
        matrices[layer.site] = _is_transposed(layer.weight.shape, layer.left, layer.right)
        if matrices[layer.site] is not None:
            told.setdefault(layer.site.rsplit(".", 1)[-1], set()).add(bool(matrices[layer.site]))
    of_conv1d = bool(base.model_types & _CONV1D_MODELS)
    any_reverse = any(True in found for found in told.values())

    def axes(layer: Layer) -> Layer:
        if layer.site not in matrices:
            return layer
        assert layer.left is not None and layer.right is not None and layer.weight is not None
        leaf = layer.site.rsplit(".", 1)[-1]
        known = matrices[layer.site]
        if known is None and layer.left.shape[0] != layer.right.shape[1]:
            known = False  # it fits neither way, which is said later
        if known is None and len(told.get(leaf, ())) == 1:
            (known,) = told[leaf]
        if known is None and base.model_types:
            known = of_conv1d and leaf in _CONV1D_LAYERS
        if known is None and leaf not in _CONV1D_LAYERS and not any_reverse and not settings.get("fan_in_fan_out"):
            known = False
        if known is None:
            return replace(layer, unread=layer.unread or _UNKNOWN_AXES)
        return replace(layer, transposed=known)

    return [axes(layer) for layer in layers]


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
