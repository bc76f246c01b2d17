"""The canonical forms, one file each. Importing this package registers them in order of preference."""

from . import linear, linear_dropout

__all__ = ["linear", "linear_dropout"]
