"""What a rewrite costs and saves, where it is not always a gain: a merged weight ``F.linear(x, m·W'/‖W'‖)``.

The merged program forms ``W' = W + s·B·A`` (the norm in its place costs the same FLOPs), scales it, and runs one product.
The factored one leaves ``W`` as it is and runs two small products more: ``2·T·r·(d_in + d_out)`` FLOPs for ``T`` tokens. It does
without the dense intermediates, and in the backward without the dense gradient of ``W'``: ``2·T·d_in·d_out`` FLOPs, and twice
the FLOPs of the delta to bring it to the factors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

BALANCE = {"cpu": 5.0, "cuda": 184.0}
"""FLOPs of a matrix product that take as long as one byte of memory traffic: matmul rate over copy bandwidth. CPU: two cores,
fp32, the ceilings that ``dorafx bench`` measures (93 GFLOP/s, 19 GB/s). CUDA: the H200 of arXiv:2603.22276, bf16 (790 TFLOP/s,
4.3 TB/s); not measured here."""


@dataclass(frozen=True)
class MergedCost:
    """The factored form against the merged one, for one call.

    Attributes:
        tokens: rows of the output.
        more_flops: what the low-rank products cost, forward and (``trains``) backward.
        fewer_flops: what the dense gradient cost.
        fewer_bytes: traffic of the dense intermediates, written and read.
        balance: see :data:`BALANCE`.
    """

    tokens: int
    more_flops: int
    fewer_flops: int
    fewer_bytes: int
    balance: float

    @property
    def pays(self) -> bool:
        return self.more_flops <= self.fewer_flops + self.balance * self.fewer_bytes

    def __str__(self) -> str:
        return (
            f"at {self.tokens} tokens the factored products cost {self.more_flops:.3g} FLOPs more, "
            f"and save {self.fewer_flops:.3g} FLOPs and {self.fewer_bytes:.3g} bytes of dense intermediates"
        )


def merged_cost(
    tokens: int,
    d_out: int,
    d_in: int,
    rank: int,
    dense_bytes: int,
    trains: bool,
    device: torch.device,
    dense_parts: int = 0,
) -> MergedCost:
    """Compare the two forms.

    Args:
        tokens: rows of the output.
        d_out, d_in, rank: of the layer.
        dense_bytes: bytes of ``[d_out, d_in]`` intermediates that one forward makes.
        trains: whether gradients are recorded through the weight.
        device: decides the balance; an unknown kind counts as a CUDA device.
        dense_parts: summands of the weight that are no low-rank product, each of which takes a dense product of its own.
    """
    low_rank = 2 * tokens * (rank * (d_in + d_out) + dense_parts * d_in * d_out)
    dense_gradient = 2 * tokens * d_in * d_out + 2 * 2 * d_in * d_out * rank
    return MergedCost(
        tokens,
        low_rank * (3 if trains else 1),
        dense_gradient if trains else 0,
        2 * dense_bytes * (2 if trains else 1),
        BALANCE.get(device.type, BALANCE["cuda"]),
    )
