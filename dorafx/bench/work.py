"""The least work that a computation needs, for its share of the hardware's limit: FLOPs, and bytes that must move.

For DoRA with its norms computed already (the same work as plain LoRA), without attention's products and without any implementation's
temporary tensors. It is a lower bound, and so is the share that the table prints.
"""

from __future__ import annotations

from dataclasses import dataclass

from .models import VOCABULARY, Size
from .shapes import Preset


@dataclass(frozen=True)
class Work:
    """FLOPs of matrix products, and bytes read and written."""

    flops: float
    bytes: float

    def times(self, factor: float) -> Work:
        return Work(factor * self.flops, factor * self.bytes)


def norm_work(
    d_out: int, d_in: int, rank: int, itemsize: int, packed: float | None = None, factor_size: int = 0
) -> Work:
    """The product ``B·A`` once, every operand read once, the norms written in fp32. A quantised weight has ``packed`` bytes; elements of
    the factors have ``factor_size`` bytes, by default ``itemsize``."""
    weight = itemsize * d_out * d_in if packed is None else packed
    factors = (factor_size or itemsize) * rank * (d_out + d_in)
    return Work(2.0 * d_out * d_in * rank, weight + factors + 4.0 * d_out)


def comparison_work(d_out: int, d_in: int, rank: int, itemsize: int) -> dict[str, Work]:
    """Contents that did not change: every operand read once; or, in decoding, the factors and a 128th of the weight."""
    factors = itemsize * rank * (d_out + d_in)
    return {
        "all compared": Work(0, factors + itemsize * d_out * d_in),
        "compared in decoding": Work(0, factors + itemsize * d_out * d_in / 128),
    }


def compose_work(tokens: int, d_out: int, itemsize: int) -> dict[str, Work]:
    """Forward: two ``[tokens, d_out]`` tensors read, one written. With the backward: one more saved, and in the backward two read and
    two written."""
    tensor = float(tokens * d_out * itemsize)
    return {"forward": Work(0, 3 * tensor), "forward + backward": Work(0, 8 * tensor)}


def layer_work(tokens: int, d_out: int, d_in: int, rank: int, itemsize: int) -> dict[str, Work]:
    """One linear: the forward; the training step has the gradients of ``x`` and of the factors too (the weight is frozen)."""
    base, low = 2.0 * tokens * d_out * d_in, 2.0 * tokens * rank * (d_out + d_in)
    weights = itemsize * (d_out * d_in + rank * (d_out + d_in))
    activations = itemsize * tokens * (d_out + d_in)
    return {
        "forward": Work(base + low, weights + activations),
        "training step": Work(2 * base + 3 * low, 2 * weights + 3 * activations),
    }


def _layers(size: Size) -> list[tuple[int, int]]:
    preset = Preset(size.hidden, size.intermediate, size.heads, size.kv_heads, size.head_dim, size.layers)
    return [shape for shape in preset.linears().values() for _ in range(size.layers)]


MICRO_BATCHES = 4
"""Of a training step that accumulates gradients, which is measured beside that of one batch."""


def model_work(
    size: Size, itemsize: int, checkpointing: bool, micro_batches: int, loss_tokens: int = 0
) -> dict[str, Work]:
    """All linears of a model and its head, which is computed for ``loss_tokens`` tokens (0: all). Checkpointing computes the decoder's
    forward twice."""
    forward = step = weights = 0.0
    for d_out, d_in in _layers(size):
        work = layer_work(size.tokens, d_out, d_in, size.rank, itemsize)
        forward += work["forward"].flops
        step += work["training step"].flops + (work["forward"].flops if checkpointing else 0)
        weights += itemsize * (d_out * d_in + size.rank * (d_out + d_in))
    head = 2.0 * (loss_tokens or size.tokens) * VOCABULARY * size.hidden
    weights += itemsize * VOCABULARY * size.hidden
    prefill, training = Work(forward + head, weights), step + 2 * head
    return {
        "prefill": prefill,
        "first prefill": prefill,
        "training step": Work(micro_batches * training, micro_batches * 2 * weights),
        f"step of {MICRO_BATCHES} micro-batches": Work(MICRO_BATCHES * training, MICRO_BATCHES * 2 * weights),
    }


def decode_work(size: Size, itemsize: int) -> dict[str, Work]:
    """One token: every weight and the filled key-value cache read once."""
    one_token = Size(**{**vars(size), "tokens": 1})
    work = model_work(one_token, itemsize, False, 1)["prefill"]
    cache = 2.0 * size.layers * size.kv_heads * size.head_dim * size.tokens * itemsize
    return {"one token": Work(work.flops, work.bytes + cache)}
