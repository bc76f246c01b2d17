"""What ``dorafx bench gpu`` measures, in the order of importance, and how long it may take; plain data.

Seconds are estimates for an H200 with 16 cores (with ``quick``, for a CPU with two): a job starts only if its estimate fits into the
remaining budget.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import work
from ..models import Size
from ..norms import PRODUCT
from ..quantized import packed_bytes
from ..shapes import PRESETS, Shape
from ..work import Work

PARTS = {
    "micro": "the row norm and the composition alone, in one process",
    "model": "a model of Qwen3-32B's shape: prefill, training step, gradients, peak memory, with adapters in bf16 and under autocast",
    "decode": "one token with CUDA graphs and a static cache; and Llama-3.1-8B's shape at rank 16",
    "tune": "launch configurations of the row norm",
}
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Sizes:
    """The sizes of all parts."""

    norms: tuple[Shape, ...]
    fp32_norms: tuple[Shape, ...]
    packed_norm: Shape
    activations: tuple[int, int]
    model: Size
    everyday: Size
    loss_tokens: int
    gradients: int


FULL = Sizes(
    norms=(Shape(8192, 8192, 384), Shape(4096, 4096, 16), Shape(8192, 28672, 384), Shape(8192, 8192, 64)),
    fp32_norms=(Shape(8192, 8192, 384), Shape(4096, 4096, 16)),
    packed_norm=Shape(8192, 8192, 384),
    activations=(8192, 8192),
    model=Size(**{**asdict(PRESETS["qwen3-32b"]), "layers": 4, "rank": 384, "tokens": 4096}),
    everyday=Size(**{**asdict(PRESETS["llama-3-8b"]), "layers": 4, "rank": 16, "tokens": 2048}),
    loss_tokens=1024,
    gradients=8,
)
QUICK = Sizes(
    norms=(Shape(64, 64, 24), Shape(32, 32, 4), Shape(64, 96, 24), Shape(64, 64, 8)),
    fp32_norms=(Shape(64, 64, 24), Shape(32, 32, 4)),
    packed_norm=Shape(64, 64, 24),
    activations=(32, 64),
    # With one shape for all linears and one for both models, most compiled code is shared.
    model=Size(hidden=64, intermediate=64, layers=1, rank=8, tokens=32),
    everyday=Size(hidden=64, intermediate=64, layers=1, rank=8, tokens=32),
    loss_tokens=8,
    gradients=2,
)


@dataclass(frozen=True)
class Item:
    """One measurement of the part micro: an implementation in a case."""

    suite: str
    case: str
    name: str
    parameters: dict[str, Any]
    work: dict[str, Work] = field(default_factory=dict)
    compose: str = "auto"
    seconds: float = 1.0
    note: str = ""


@dataclass(frozen=True)
class Entry:
    """One process of a batch: an implementation, and whether the batch is useless without it."""

    name: str
    needed: bool = False


@dataclass(frozen=True)
class Batch:
    """Implementations that compile side by side and are timed one after the other.

    Attributes:
        suite: of the rows.
        measure: name of the measurement in :data:`~dorafx.bench.suites.MEASURES`.
        request: additional fields of the worker's request.
        together, each: seconds until all are compiled, and for timing each.
        beside: whether the rows are compared with dorafx's of an earlier batch.
    """

    part: str
    suite: str
    measure: str
    case: str
    size: Size
    entries: tuple[Entry, ...]
    work: dict[str, Work]
    together: float
    each: float
    request: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    beside: bool = False


@dataclass(frozen=True)
class Plan:
    """The whole plan: the items, which one process measures, and the batches, both in order; and whether to tune."""

    items: list[Item]
    batches: list[Batch]
    tune: bool


def plan_of(parts: Sequence[str], quick: bool, cuda: bool, peers: Mapping[str, Path]) -> Plan:
    """The plan for some parts.

    Args:
        parts: of :data:`PARTS`.
        quick: tiny sizes.
        cuda: whether the device is a CUDA device; on a CPU unsupported features are replaced, and the row's note says by what.
        peers: the available ones of :data:`~dorafx.bench.peers.PEERS`, with their folders.
    """
    sizes = QUICK if quick else FULL
    items = _items(sizes, cuda, peers) if "micro" in parts else []
    batches = [b for b in _batches(sizes, quick, cuda, peers) if b.part in parts]
    return Plan(items, batches, "tune" in parts)


def _items(sizes: Sizes, cuda: bool, peers: Mapping[str, Path]) -> list[Item]:
    """Norms, most important first, each with its comparisons; then the composition, then norms of quantised weights."""
    items: list[Item] = []
    itemsize = DTYPE.itemsize
    others = ("dense", "peft", PRODUCT, "chunked")
    for shape in sizes.norms:
        # axolotl's kernel at a small rank only: see :func:`_batches`.
        small = shape is sizes.norms[1] and cuda and "axolotl" in peers
        for name in ("dorafx", *others, *(("axolotl",) if small else ())):
            metrics = {"time": work.norm_work(shape.d_out, shape.d_in, shape.rank, itemsize)}
            if name == "dorafx":
                metrics |= work.comparison_work(shape.d_out, shape.d_in, shape.rank, itemsize)
            items.append(_norm(shape, name, metrics))
    for shape in sizes.fp32_norms:
        for name in ("dorafx", "dense", PRODUCT):
            metrics = {"time": work.norm_work(shape.d_out, shape.d_in, shape.rank, itemsize, factor_size=4)}
            item = _norm(shape, name, metrics)
            items.append(
                replace(item, case=f"{item.case}, fp32 factors", parameters={**item.parameters, "factors": "float32"})
            )
    tokens, d_out = sizes.activations
    case, parameters = f"{tokens}x{d_out}", {"tokens": tokens, "d_out": d_out}
    metrics = work.compose_work(tokens, d_out, itemsize)
    kernel = "" if cuda else "on a CPU the composition without a kernel"
    way = "triton" if cuda else "auto"
    for name in ("dorafx", "peft", "lora", "peft-inductor"):
        compiled = 1.0 if name == "peft" else 10.0
        items.append(Item("compose", f"{case}, fused by Inductor", name, parameters, metrics, seconds=compiled))
        if name in ("dorafx", "peft"):
            seconds = 10.0 if name == "dorafx" else 1.0
            note = kernel if name == "dorafx" else ""
            items.append(Item("compose", f"{case}, Triton's kernel", name, parameters, metrics, way, seconds, note))
    shape = sizes.packed_norm
    for weights in ("bnb8", "affine"):
        for name in ("dorafx", "dense"):
            packed = packed_bytes(weights, shape.d_out, shape.d_in, itemsize)
            item = _norm(shape, name, {"time": work.norm_work(shape.d_out, shape.d_in, shape.rank, itemsize, packed)})
            items.append(
                replace(item, case=f"{item.case}, {weights}", parameters={**item.parameters, "weights": weights})
            )
    return items


def _norm(shape: Shape, name: str, metrics: dict[str, Work]) -> Item:
    parameters = {"d_out": shape.d_out, "d_in": shape.d_in, "rank": shape.rank}
    seconds = 30.0 if name == "axolotl" else 4.0 if name == "dorafx" else 1.0
    return Item("norm", f"{shape.d_out}x{shape.d_in} r{shape.rank}", name, parameters, metrics, seconds=seconds)


def _batches(sizes: Sizes, quick: bool, cuda: bool, peers: Mapping[str, Path]) -> list[Batch]:
    model, everyday = sizes.model, sizes.everyday
    bf16 = _label(model, quick, "qwen3-32b")
    training: dict[str, Any] = {
        "checkpointing": True, "micro_batches": 2, "gradients": sizes.gradients, "loss_tokens": sizes.loss_tokens,
    }  # fmt: skip
    metrics = work.model_work(model, DTYPE.itemsize, True, 2, sizes.loss_tokens)
    metrics[f"gradients, {sizes.gradients} micro-batches"] = metrics["training step"].times(sizes.gradients / 2)
    everyday_training = {key: training[key] for key in ("checkpointing", "micro_batches", "loss_tokens")}
    # axolotl's kernel unrolls a loop over the rank, so with large ranks it compiles for minutes. It needs a GPU.
    kernel = ("axolotl",) if cuda and "axolotl" in peers else ()
    fork = ("paper",) if "paper" in peers else ()
    graphs = "" if cuda else "on a CPU compiled in the same mode, which has no CUDA graphs there"
    peft: dict[str, Any] = {"measure": "regime", "suite": "model", "part": "model", "size": model, "work": metrics}

    def seconds(together: float, each: float) -> dict[str, Any]:
        return {"together": 20.0, "each": 1.0} if quick else {"together": together, "each": each}

    return [
        Batch(
            **peft, case=f"{bf16}, bf16 adapters", request=training, **seconds(60, 9),
            entries=_entries("dorafx", "lora", "peft", "dense"),
        ),
        Batch(
            **peft, case=f"{bf16}, autocast, fp32 adapters", request={**training, "autocast": True}, **seconds(55, 8),
            entries=_entries("dorafx", "lora", "peft"),
        ),
        Batch(
            part="decode", suite="decode", measure="decode", case=f"{bf16}, CUDA graphs", size=model,
            work=work.decode_work(model, DTYPE.itemsize), request={"mode": "reduce-overhead"}, note=graphs,
            entries=_entries("dorafx", "lora", "merged", "peft"), **seconds(50, 4),
        ),
        Batch(
            part="decode", suite="overhead", measure="overhead", case=_label(everyday, quick, "llama-3-8b"), size=everyday,
            request=everyday_training, entries=_entries("dorafx", "lora", "peft", *kernel), **seconds(50, 4),
            work={
                **work.decode_work(everyday, DTYPE.itemsize),
                "training step": work.model_work(everyday, DTYPE.itemsize, True, 2, sizes.loss_tokens)["training step"],
            },
        ),
        # Those that take longest to compile, if there is time left.
        Batch(
            **peft, case=f"{bf16}, bf16 adapters", request=training, beside=True, **seconds(80, 9),
            entries=tuple(Entry(name) for name in (*fork, "chunked", "peft-inductor")),
        ),
    ]  # fmt: skip


def _entries(*names: str) -> tuple[Entry, ...]:
    """The first two are needed: without them there is no ratio."""
    return tuple(Entry(name, index < 2) for index, name in enumerate(names))


def _label(size: Size, quick: bool, preset: str) -> str:
    name = f"hidden {size.hidden}" if quick else preset
    return f"{name}, {size.layers} layers, r{size.rank}, {size.tokens} tokens"
