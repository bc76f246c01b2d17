"""Transfer functions: one module per operator family. Importing them fills ``lifter.TRANSFER``."""

from . import arithmetic, convolutions, einsum, elementwise, indexing, layout, norms, products, quantized

from . import rearranged  # isort: skip  (the last: it adds to what the others do)

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
    "rearranged",
]
