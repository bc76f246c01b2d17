"""Transfer functions: one module per operator family. Importing them fills ``lifter.TRANSFER``."""

from . import arithmetic, layout, norms, products

__all__ = ["arithmetic", "layout", "norms", "products"]
