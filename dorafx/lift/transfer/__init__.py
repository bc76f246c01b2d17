"""Transfer functions: one module per operator family. Importing a module registers its functions. The order of imports does not matter:
if an operator has several functions, they are tried in the order of :class:`dorafx.lift.lifter.Reading`."""

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
    weight_batches,
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
    "weight_batches",
]
