"""The canonical forms, one file each. Importing this package registers them in order of preference."""

from . import convolution, embedding, linear, linear_columns, linear_dropout, linear_weight_delta

__all__ = ["convolution", "embedding", "linear", "linear_columns", "linear_dropout", "linear_weight_delta"]
