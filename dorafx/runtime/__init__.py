"""What runs with a rewritten graph: the prologue that computes its norms, and the store that keeps them."""

from .prologue import with_prologue, zero_rows
from .store import NormStore, norm_store
from .zero_magnitudes import ZeroMagnitudes

__all__ = ["NormStore", "ZeroMagnitudes", "norm_store", "with_prologue", "zero_rows"]
