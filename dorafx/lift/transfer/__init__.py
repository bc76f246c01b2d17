"""Transfer functions: one module per operator family. Importing them fills ``lifter.TRANSFER``."""

from . import arithmetic, convolutions, einsum, elementwise, indexing, layout, norms, products, quantized

from . import batched, rearranged, narrow  # isort: skip  (the last: they add to what the others do)

__all__ = [
    "arithmetic",
    "batched",
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
