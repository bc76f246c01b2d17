"""How the norm's operators run on DTensors: which placements they accept, and the placement of the result.

A weight that is sharded by rows gives the norms of each shard's rows. A weight that is sharded by columns gives partial norms,
whose squares add up over the shards: DTensor has a placement for a partial 2-norm, and reduces the norm when it is read. Any other
sharding is first redistributed to one of these, so the norm of one shard is never mistaken for that of the whole row.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from dorafx._compat import distributed as _distributed

from .composition import compose_math, delta_math


@functools.cache
def register_sharding_rules() -> None:
    """Tell DTensor about ``row_norm`` and its backward. Called when a graph has its first DTensor, because importing DTensor takes
    time that other programs should not pay for."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.experimental import register_sharding

    whole, rows, columns, added = Replicate(), Shard(0), Shard(1), Partial()
    partial_norm = _distributed.partial_norm()

    @register_sharding(torch.ops.dorafx.row_norm.default)  # type: ignore[untyped-decorator]
    def _row_norm(
        weight: Any, left: Any, right: Any, scale: float, algorithm: str = "auto", factor_dtype: Any = None
    ) -> Any:
        rest = [None, None, None]
        return [
            ([whole], [whole, whole, whole, *rest]),
            ([rows], [rows, rows, whole, *rest]),
            ([partial_norm], [columns, whole, columns, *rest]),
        ]

    @register_sharding(torch.ops.dorafx.row_norm_backward.default)  # type: ignore[untyped-decorator]
    def _row_norm_backward(grad: Any, weight: Any, left: Any, right: Any, n: Any, scale: float, *needs: bool) -> Any:
        def outputs(*placements: Any) -> list[Any]:
            # An output that is not needed is an empty tensor, which has no dimension to shard.
            return [placement if need else whole for placement, need in zip(placements, needs)]

        rest = [None] * (1 + len(needs))
        return [
            (outputs(whole, whole, whole), [whole, whole, whole, whole, whole, *rest]),
            (outputs(rows, rows, added), [rows, rows, rows, whole, rows, *rest]),
            (outputs(columns, added, columns), [whole, columns, whole, columns, whole, *rest]),
        ]


def compose(base: Any, lora: Any, g: Any, bias: Any, scale: float, out_dtype: torch.dtype) -> torch.Tensor:
    """``torch.ops.dorafx.compose`` of DTensors. Its autograd kernel calls operators that DTensor knows. Inference mode has no
    autograd kernels, so there these are called directly: DTensor does not know ``compose`` itself."""
    if torch.is_inference_mode_enabled():
        return compose_math(base, lora, g, bias, scale, out_dtype)
    return torch.ops.dorafx.compose.default(base, lora, g, bias, scale, out_dtype)  # type: ignore[no-any-return]


def compose_delta(result: Any, base: Any, lora: Any, g: Any, scale: float, out_dtype: torch.dtype) -> torch.Tensor:
    """``torch.ops.dorafx.compose_delta`` of DTensors, as :func:`compose`."""
    if torch.is_inference_mode_enabled():
        return delta_math(result, base, lora, g, scale, out_dtype)
    return torch.ops.dorafx.compose_delta.default(result, base, lora, g, scale, out_dtype)  # type: ignore[no-any-return]
