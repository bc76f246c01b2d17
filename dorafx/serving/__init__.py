"""DoRA as LoRA and a scale by row: ``g = m / n`` of every layer computed once, kept in a file, and applied where only inference runs."""

from __future__ import annotations

from .apply import apply_scales, remove_scales, scaled_adapters
from .export import export_scales

__all__ = ["apply_scales", "export_scales", "remove_scales", "scaled_adapters"]
