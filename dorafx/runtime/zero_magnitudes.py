"""A note in the log on layers whose magnitude is zero everywhere, so that they give nothing but their bias.

No training leads there. PEFT's hot swapping does: where the new adapter lacks a layer that the old one had, it fills all that the old one
had there with zeros, the magnitude too. A layer of LoRA is the base layer then, one of DoRA is zero.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from dorafx._compat.tensors import fake_mode_of
from dorafx.log import rewrite_log
from dorafx.rewriter import HoistedNorm
from dorafx.scope import adapter_layer
from dorafx.selection import joined

from .watch import is_read

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_WHAT = (
    "the magnitude is zero everywhere, so the layer gives zeros, and not what its base layer gives. PEFT's hot swapping leaves that where the "
    "new adapter has no such layer: swap adapters of the same targets"
)


class ZeroMagnitudes:
    """Looks at the magnitudes of a graph's layers where norms have just been computed, which takes much longer.

    Args:
        norms: the graph's.
        members: names of the modules that the graph serves.
        named: the name of a parameter; empty where it is unknown.
    """

    def __init__(
        self, norms: Sequence[HoistedNorm], members: Sequence[str] = ("",), named: Callable[[Any], str] | None = None
    ) -> None:
        self._norms = norms
        self._members = members
        self._named = named
        self._noted: set[tuple[int, int]] = set()

    def look(self, args: Sequence[Any], places: Iterable[int]) -> None:
        """Note those that are zero, each layer once.

        Args:
            args: the graph's inputs.
            places: of the norms that were computed.
        """
        for place in places:
            position = self._norms[place].magnitude
            if position is None:
                continue
            magnitude = args[position]
            # The host waits for no device. Whatever is no plain tensor may be anywhere.
            if type(magnitude) not in _PLAIN or not is_read(magnitude) or fake_mode_of(magnitude) is not None:
                continue
            layer = place, magnitude.data_ptr()
            if layer in self._noted or not _is_zero(magnitude):
                continue
            self._noted.add(layer)
            note = f"{self._name(magnitude, self._norms[place].site)}: {_WHAT}"
            if note not in rewrite_log().notes:  # by another graph of the same layer
                rewrite_log().add_note(note)

    def _name(self, magnitude: torch.Tensor, site: str) -> str:
        name = self._named(magnitude) if self._named is not None else ""
        if name:
            return adapter_layer(name)
        names = [adapter_layer(joined(member, site)) or "(function)" for member in self._members]
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"


def _is_zero(tensor: torch.Tensor) -> bool:
    """Whether all bytes of a tensor on the CPU are zero. No operator of torch is called, which a mode or a profiler would see."""
    size = tensor.numel() * tensor.element_size()
    if not size or not tensor.is_contiguous():
        return False
    start = tensor.data_ptr()
    # Of nearly all magnitudes the first element says it.
    return not any(ctypes.string_at(start, tensor.element_size())) and not ctypes.string_at(start, size).strip(b"\0")
