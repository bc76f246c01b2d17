"""Shapes of real models' linear layers, from the dimensions in their published configurations, and shapes given by hand."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One weight ``[d_out, d_in]``; ``rank`` 0 leaves the rank to the caller, ``label`` names the layers it belongs to."""

    d_out: int
    d_in: int
    rank: int = 0
    label: str = ""


@dataclass(frozen=True)
class Preset:
    """The sizes of a Llama-like architecture."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int

    def linears(self) -> dict[str, tuple[int, int]]:
        """``[d_out, d_in]`` of every linear of a decoder layer, by its name in transformers."""
        query, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "q_proj": (query, self.hidden),
            "k_proj": (keys, self.hidden),
            "v_proj": (keys, self.hidden),
            "o_proj": (self.hidden, query),
            "gate_proj": (self.intermediate, self.hidden),
            "up_proj": (self.intermediate, self.hidden),
            "down_proj": (self.hidden, self.intermediate),
        }

    def shapes(self) -> list[Shape]:
        """The distinct shapes among :meth:`linears`, each with the names of its layers."""
        names: dict[tuple[int, int], list[str]] = {}
        for name, shape in self.linears().items():
            names.setdefault(shape, []).append(name.removesuffix("_proj"))
        return [Shape(*shape, label="/".join(layers)) for shape, layers in names.items()]


PRESETS = {
    "llama-3-8b": Preset(4096, 14336, 32, 8, 128, 32),
    "qwen3-32b": Preset(5120, 25600, 64, 8, 128, 64),
    "mistral-small-24b": Preset(5120, 32768, 32, 8, 128, 40),
    "gemma3-27b": Preset(5376, 21504, 32, 16, 128, 62),
}
"""From the published ``config.json`` of each model (Gemma's from its ``text_config``)."""

_SIZE = re.compile(r"(\d+)x(\d+)(?::(\d+))?")


def parse_shape(text: str) -> Shape:
    """``D_OUTxD_IN`` or ``D_OUTxD_IN:RANK``.

    Raises:
        ValueError: anything else; the message names what is allowed.
    """
    match = _SIZE.fullmatch(text.lower())
    if match is None or not all(int(group) for group in match.groups() if group):
        raise ValueError(
            f"--shapes: {text!r} is not one of {', '.join(PRESETS)}, nor of the form D_OUTxD_IN or D_OUTxD_IN:RANK"
        )
    return Shape(int(match[1]), int(match[2]), int(match[3] or 0))
