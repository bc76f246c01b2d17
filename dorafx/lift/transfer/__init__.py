"""Transfer functions: one module per operator family. Importing them fills ``lifter.TRANSFER``."""

from . import arithmetic, convolutions, einsum, elementwise, indexing, layout, norms, products, quantized

__all__ = [
    "arithmetic",
    "convolutions",
    "einsum",
    "elementwise",
    "indexing",
    "layout",
    "norms",
    "products",
    "quantized",
]
