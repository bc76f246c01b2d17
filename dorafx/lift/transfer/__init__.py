"""Transfer functions: one module per operator family. Importing them fills ``lifter.TRANSFER``."""

from . import arithmetic, einsum, elementwise, indexing, layout, norms, products

__all__ = ["arithmetic", "einsum", "elementwise", "indexing", "layout", "norms", "products"]
