"""Transfer functions: one module per operator family. Importing them registers them, in any order: an operator that several know is
read in the order of :class:`dorafx.lift.lifter.Reading`."""

from . import (
    arithmetic,
    batched,
    blocks,
    convolutions,
    einsum,
    elementwise,
    indexing,
    layout,
    narrow,
    norms,
    products,
    quantized,
    rearranged,
)

__all__ = [
    "arithmetic",
    "batched",
    "blocks",
    "convolutions",
    "einsum",
    "elementwise",
    "indexing",
    "layout",
    "narrow",
    "norms",
    "products",
    "quantized",
    "rearranged",
]
