"""The device's best rates, measured in the same run: the copy bandwidth and the rate of matrix products."""

from __future__ import annotations

import torch

from .clock import Clock


def measure_ceilings(clock: Clock, dtype: torch.dtype, side: int = 0) -> dict[str, tuple[str, list[float]]]:
    """``copy`` in bytes/s, read plus written, of a tensor larger than any cache; ``matmul`` in FLOP/s, of square matrices.

    Args:
        clock: times the calls.
        dtype: of the matrices.
        side: rows of the matrices, which also scales the copied tensor; 0 chooses 8192 on a CUDA device and 2048 on a CPU.
    """
    side = side or (8192 if clock.cuda else 2048)
    a, b = (torch.randn(side, side, dtype=dtype, device=clock.device) for _ in range(2))
    out = torch.empty_like(a)
    matmul = clock.samples(lambda: torch.mm(a, b, out=out))
    length = 16 * side * side
    source = torch.ones(length, dtype=torch.int8, device=clock.device)
    target = torch.empty_like(source)
    copy = clock.samples(lambda: target.copy_(source))
    return {
        "copy": ("B/s", [2 * length / s for s in copy]),
        "matmul": ("FLOP/s", [2 * side**3 / s for s in matmul]),
    }
