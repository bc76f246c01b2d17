"""The canonical forms, one file each. Importing this package registers them in order of preference."""

from . import embedding, linear, linear_columns, linear_dropout

__all__ = ["embedding", "linear", "linear_columns", "linear_dropout"]
