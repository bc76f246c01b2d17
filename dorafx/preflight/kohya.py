"""Adapters as kohya's sd-scripts and LyCORIS save them: ``lora_down``, ``lora_up``, ``alpha``, ``dora_scale``."""

from __future__ import annotations

import re

import torch

from .findings import Finding
from .layer import Layer, Weight
from .stored import Base, Tensors

_KEY = re.compile(
    r"(?P<site>.+)\.(?P<part>lora_down|lora_up|lora_mid|alpha|dora_scale|hada_\w+|lokr_\w+|oft_\w+|diff\w*|scalar)(?:\.weight)?"
)
# How a module's name begins, and the folders of a pipeline that it may be in.
_PREFIXES = {
    "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
    "lora_te_": ("text_encoder",),
    "lora_prior_unet_": ("prior",),
    "lycoris_": (),
}


def is_kohya(tensors: Tensors) -> bool:
    """Whether tensors have the names that sd-scripts and LyCORIS give them."""
    return any(name.endswith((".dora_scale", ".lora_down.weight")) for name in tensors)


def layers_of(tensors: Tensors, base: Base) -> tuple[list[Layer], list[Finding]]:
    """The adapter's layers, and what is wrong with it apart from their numbers."""
    parts: dict[str, dict[str, str]] = {}
    unknown = []
    for name in tensors:
        match = _KEY.fullmatch(name)
        if match is None:
            unknown.append(name)
        else:
            parts.setdefault(match["site"], {})[match["part"]] = name
    findings = []
    if unknown:
        findings.append(
            Finding("unknown-tensor", "", f"{len(unknown)} tensors are not of LoRA: {', '.join(unknown[:3])}")
        )
    flat: dict[str, list[str]] = {}
    for module in base.modules:
        name = module.replace(".", "_")
        pieces = name.split("_")
        for start in range(len(pieces)):
            flat.setdefault("_".join(pieces[start:]), []).append(module)
    layers = []
    dora = any("dora_scale" in p for p in parts.values())
    for site, names in parts.items():
        layer, found = _layer(site, names, tensors, base, flat)
        if dora and layer.magnitude is None and not layer.unread:
            continue  # another layer of the same file may be plain LoRA
        layers.append(layer)
        findings += found
    return layers, findings


def _module(site: str, base: Base, flat: dict[str, list[str]]) -> str | None:
    """The base's module of a name in which dots are underscores; None where there is none, or more than one."""
    prefix = next((p for p in _PREFIXES if site.startswith(p)), "")
    name = site[len(prefix) :]
    candidates = flat.get(name, [])
    within = [m for m in candidates if m.split(".", 1)[0] in _PREFIXES.get(prefix, ())]
    if len(within) == 1:
        return within[0]
    exact = [m for m in candidates if m.replace(".", "_") == name]
    candidates = exact if len(exact) == 1 else candidates
    return candidates[0] if len(candidates) == 1 else base.module(site)


def _layer(
    site: str, names: dict[str, str], tensors: Tensors, base: Base, flat: dict[str, list[str]]
) -> tuple[Layer, list[Finding]]:
    findings: list[Finding] = []
    others = sorted(set(names) - {"lora_down", "lora_up", "alpha", "dora_scale"})
    read = {part: tensors.read(name) for part, name in names.items() if part not in others}
    a, b, m = read.get("lora_down"), read.get("lora_up"), read.get("dora_scale")
    left, right = (None if factor is None or factor.dim() < 2 else factor.flatten(1) for factor in (b, a))
    rank = int(right.shape[0]) if right is not None else 0
    scaling = tensors.number(names["alpha"]) / max(1, rank) if "alpha" in read else 1.0
    if scaling == 0:
        findings.append(Finding("scaling", site, "its alpha is 0: the factors have no effect"))
    weight: Weight | None = None
    unread = f"it has {', '.join(others)}, a delta that is no product of two factors" if others else ""
    module = _module(site, base, flat)
    if module is None:
        what = "the base has no weight of this name, or more than one; the base must have the layout that the adapter was trained on"
        findings.append(Finding("missing-target", site, what))
    else:
        found = base.tensors.weight(f"{module}.weight")
        if isinstance(found, str):
            unread = unread or found
        else:
            weight = found
    by_input = m is not None and _is_by_input(m, left, right, weight)
    if by_input and weight is not None and len(weight.shape) > 2 and any(n != 1 for n in weight.shape[2:]):
        unread = unread or "a magnitude by input of a convolution whose kernel is wider than one"
    layer = Layer(module or site, left, right, m, scaling, weight, by_input=by_input, epsilon=True, unread=unread)
    return layer, findings


def _is_by_input(m: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None, weight: Weight | None) -> bool:
    """Whether a magnitude is ``[1, d_in, …]``. One of ``[d_out, 1, …]`` is by output; one without axes of length one is told by its length."""
    sizes = tuple(m.shape)
    if len(sizes) > 1 and sizes[0] == 1 and sizes[1] != 1:
        return True
    if len(sizes) > 1:
        return False
    d_out = int(left.shape[0]) if left is not None else 0
    d_in = (
        weight.shape[1]
        if weight is not None and len(weight.shape) > 1
        else int(right.shape[1])
        if right is not None
        else 0
    )
    return m.numel() == d_in != d_out
