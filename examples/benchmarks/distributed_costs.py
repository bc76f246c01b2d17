"""What fine-tuning with DoRA costs on 1, 8 and 64 GPUs in memory and communication: by calculation, not by measurement.

The formulas are the functions below; ``examples/guide/distributed.md`` holds what this script prints.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from dorafx.bench.shapes import PRESETS, Preset

GB = 1e9
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Model:
    """A decoder with untied embeddings, in bf16, with a DoRA adapter of one rank on every linear layer of its blocks."""

    name: str
    blocks: Preset
    vocabulary: int
    rank: int

    @property
    def of_block(self) -> int:
        """Weights of the linear layers of a block: Σ d_out·d_in."""
        return sum(d_out * d_in for d_out, d_in in self.blocks.linears().values())

    @property
    def frozen(self) -> int:
        """Parameters that are not trained: blocks, embeddings and output layer. Norms' weights are too few to count."""
        return self.blocks.layers * self.of_block + 2 * self.vocabulary * self.blocks.hidden

    @property
    def trained(self) -> int:
        """Parameters of adapters: Σ r·(d_in + d_out) + d_out."""
        shapes = self.blocks.linears().values()
        return self.blocks.layers * sum(self.rank * (d_in + d_out) + d_out for d_out, d_in in shapes)

    @property
    def rows(self) -> int:
        """Rows of all norms: Σ d_out."""
        return self.blocks.layers * sum(d_out for d_out, _ in self.blocks.linears().values())

    @property
    def largest(self) -> int:
        """Elements of the largest weight, which stock PEFT forms a product of the size of."""
        return max(d_out * d_in for d_out, d_in in self.blocks.linears().values())


@dataclass(frozen=True)
class Layout:
    """How many GPUs, and what they share.

    Attributes:
        shards: over how many GPUs FSDP2 shards every parameter.
        tensor: over how many GPUs DTensor shards the weights of each block.
        copies: how many groups of ``shards · tensor`` GPUs compute gradients of batches of their own (DDP).
    """

    name: str
    shards: int = 1
    tensor: int = 1
    copies: int = 1

    @property
    def gpus(self) -> int:
        return self.shards * self.tensor * self.copies


# -- bytes on one GPU -------------------------------------------------------------------------------------------------


def frozen_bytes(model: Model, layout: Layout) -> float:
    """bf16 weights, each GPU's share."""
    return BF16 * model.frozen / (layout.shards * layout.tensor)


def trained_bytes(model: Model, layout: Layout) -> float:
    """fp32 adapters, their gradients, and AdamW's two moments: 16 bytes a parameter. Tensor parallelism shards about half of the
    factors (B where columns of x·Wᵀ are split, A where rows are); here none is counted as sharded by it, which is an upper bound."""
    return 4 * FP32 * model.trained / layout.shards


def gathered_bytes(model: Model, layout: Layout) -> float:
    """What FSDP2 gathers: the block in use and the next, in bf16."""
    return 0.0 if layout.shards == 1 else 2 * BF16 * model.of_block / layout.tensor


def norm_bytes(model: Model, layout: Layout) -> float:
    """The norms themselves, fp32 (with DTensor, a GPU's rows of column-wise layers only; counted whole: an upper bound)."""
    return FP32 * model.rows


def buffer_bytes(model: Model, layout: Layout) -> float:
    """An upper bound of the buffer in which a norm is formed: less than an eighth of the weight. (The Triton kernel has none.)"""
    return BF16 * model.largest / 8 / layout.tensor


def stock_bytes(model: Model, layout: Layout) -> float:
    """What stock PEFT holds at once for its largest norm, beside the weight: B·A, s·B·A and the sum, in bf16. (Before, it holds
    B·A in fp32, as the adapters are, and an identity matrix.)"""
    return 3 * BF16 * model.largest / layout.tensor


# -- bytes that one GPU sends in one training step (as many arrive) -------------------------------------------------------


def ring(gpus: int) -> float:
    """The share of a tensor that each GPU sends when it is gathered, or reduced and scattered, around a ring."""
    return (gpus - 1) / gpus


def gather_bytes(model: Model, layout: Layout) -> float:
    """FSDP2: all parameters in bf16, gathered in the forward and again in the backward."""
    return 2 * ring(layout.shards) * BF16 * (model.frozen / layout.tensor + model.trained)


def gradient_bytes(model: Model, layout: Layout) -> float:
    """Gradients of adapters in fp32: scattered over FSDP2's shards; all-reduced (twice a ring) over DDP's copies. Nothing of the
    frozen weights."""
    return FP32 * model.trained * (ring(layout.shards) + 2 * ring(layout.copies) / layout.shards)


def activation_bytes(model: Model, layout: Layout, tokens: int) -> float:
    """Tensor parallelism: an all-reduce (twice a ring) of ``[tokens, hidden]`` in bf16 behind attention and behind the MLP, in
    the forward, in its recomputation (checkpointing) and, of gradients, in the backward: six a block."""
    return 6 * model.blocks.layers * 2 * ring(layout.tensor) * BF16 * tokens * model.blocks.hidden


def norm_reduction_bytes(model: Model, layout: Layout) -> float:
    """Tensor parallelism: squared norms of row-wise layers (o_proj, down_proj) in fp32, all-reduced once a forward."""
    return 2 * ring(layout.tensor) * FP32 * model.blocks.layers * 2 * model.blocks.hidden


MODELS = (
    ("8B", PRESETS["llama-3-8b"], 128256),
    ("32B", PRESETS["qwen3-32b"], 151936),
    ("70B", Preset(8192, 28672, 64, 8, 128, 80), 128256),
)
LAYOUTS = (
    Layout("1"),
    Layout("8, DDP", copies=8),
    Layout("8, FSDP2", shards=8),
    Layout("64, FSDP2", shards=64),
    Layout("64, TP 8 × FSDP2 8", shards=8, tensor=8),
)


def gigabytes(value: float) -> str:
    return "0" if value == 0 else f"{value / GB:.3g}" if value < 100 * GB else f"{value / GB:.0f}"


def tables(rank: int, tokens: int) -> str:
    """Two Markdown tables."""
    memory = [
        f"Memory of one GPU in GB, rank {rank}, without activations:",
        "",
        "| model | GPUs | weights | adapters, gradients, AdamW | gathered blocks | norms | buffer of a norm | sum | stock PEFT instead of the buffer |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    traffic = [
        f"Sent by one GPU in a training step in GB, rank {rank}, {tokens} tokens a GPU (a group of 8 with TP), checkpointing:",
        "",
        "| model | GPUs | weights gathered | gradients | activations (TP) | norms (TP) | sum |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, blocks, vocabulary in MODELS:
        model = Model(name, blocks, vocabulary, rank)
        for layout in LAYOUTS:
            parts = [f(model, layout) for f in (frozen_bytes, trained_bytes, gathered_bytes, norm_bytes, buffer_bytes)]
            cells = [*parts, sum(parts), stock_bytes(model, layout)]
            memory.append(f"| {' | '.join([name, layout.name, *map(gigabytes, cells)])} |")
            sent = [
                gather_bytes(model, layout),
                gradient_bytes(model, layout),
                activation_bytes(model, layout, tokens),
                norm_reduction_bytes(model, layout),
            ]
            traffic.append(f"| {' | '.join([name, layout.name, *map(gigabytes, [*sent, sum(sent)])])} |")
    return "\n".join([*memory, "", *traffic])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192)
    arguments = parser.parse_args()
    print(tables(arguments.rank, arguments.tokens))


if __name__ == "__main__":
    main()
