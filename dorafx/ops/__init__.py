"""The operators that rewritten graphs call: ``torch.ops.dorafx.row_norm``, ``compose`` and ``compose_delta``.

Importing this package registers them.
"""

from . import register  # noqa: F401
from .norm import row_norm

__all__ = ["row_norm"]
