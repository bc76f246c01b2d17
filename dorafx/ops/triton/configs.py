"""Block sizes, warps and stages of every kernel: decided here and nowhere else.

Every configuration compiles for the architecture whose table has it without spilled registers, for narrow and wide weights, in
any layout, with d_in divided or whole; the tests check that ahead of time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

__all__ = [
    "COMPOSE",
    "COMPOSE_TABLES",
    "LINEAR",
    "LINEAR_TABLES",
    "PROGRAMS_PER_PROCESSOR",
    "QUANTIZED_ROW_NORM",
    "ROW_NORM",
    "ROW_NORM_80",
    "TABLES",
    "ComposeConfig",
    "ComposeConfigs",
    "LinearConfig",
    "RowNormConfig",
    "architecture",
    "compose_config",
    "linear_config",
    "multiprocessors",
    "quantized_config",
    "row_norm_config",
    "splits",
    "table_of",
]

T = TypeVar("T")


@dataclass(frozen=True)
class RowNormConfig:
    """One way to run the row norm: a ``rows x columns`` tile of W, formed from products of depth ``depth``."""

    factor_bytes: int
    """Width of the product's operands: 2 (fp16, bf16) or 4 (fp32)."""
    max_rank: int | None
    """The largest rank it serves; None is any."""
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int

    @property
    def single(self) -> bool:
        """Whether one product covers the whole rank: ``left`` is then loaded once, and W's tiles are prefetched."""
        return self.max_rank is not None


# Small ranks are bound by reading W: few rows a block, many blocks in flight. Large ranks are bound by the tensor cores
# and by reading the factors from L2, which larger tiles do less often. fp32 factors are split into three tf32 products.
ROW_NORM = (
    RowNormConfig(2, 16, 64, 128, 16, 4, 4),
    RowNormConfig(2, 32, 64, 128, 32, 8, 3),
    RowNormConfig(2, 64, 64, 128, 64, 4, 3),
    RowNormConfig(2, 128, 128, 128, 128, 8, 2),
    RowNormConfig(2, None, 128, 128, 64, 8, 3),
    RowNormConfig(4, 16, 64, 64, 16, 4, 3),
    RowNormConfig(4, 32, 64, 64, 32, 4, 3),
    RowNormConfig(4, None, 64, 128, 32, 8, 3),
)

# Tensor cores before Hopper's keep all of a product in registers: with an fp32 weight and transposed factors two of the rows
# above would spill there.
ROW_NORM_80 = (
    *ROW_NORM[:2],
    RowNormConfig(2, 64, 64, 128, 64, 8, 3),
    ROW_NORM[3],
    RowNormConfig(2, None, 128, 128, 64, 8, 2),
    *ROW_NORM[5:],
)


# Of a quantised weight. ``columns`` are bytes of codes; a table of 4-bit values is selections in registers, of which a tile
# needs more than a dense one, so that tiles are smaller.
QUANTIZED_ROW_NORM = (
    RowNormConfig(2, 16, 32, 64, 16, 4, 2),
    RowNormConfig(2, 32, 32, 64, 32, 4, 2),
    RowNormConfig(2, None, 64, 64, 64, 8, 3),
    RowNormConfig(4, 16, 32, 32, 16, 4, 2),
    RowNormConfig(4, None, 64, 32, 32, 8, 3),
)


TABLES: dict[int, tuple[RowNormConfig, ...]] = {80: ROW_NORM_80, 90: ROW_NORM, 100: ROW_NORM}
"""A table for each architecture, by ten times its compute capability; ``dorafx bench --tune`` prints one measured on the
device at hand. None has been measured: all are made by calculation."""


def _newest(tables: Mapping[int, T], found: int) -> T:
    return tables[max((known for known in tables if known <= found), default=min(tables))]


def table_of(found: int) -> tuple[RowNormConfig, ...]:
    """The table of an architecture: its own, that of the newest older one, or else the oldest."""
    return _newest(TABLES, found)


def row_norm_config(factor_bytes: int, rank: int, found: int = 90) -> RowNormConfig:
    """The first configuration of an architecture's table that serves operands of this width and rank."""
    table = table_of(found)
    return next(c for c in table if c.factor_bytes == factor_bytes and (c.max_rank is None or rank <= c.max_rank))


@dataclass(frozen=True)
class ComposeConfig:
    """One way to walk ``[tokens, d_out]``: tiles of ``rows x columns``."""

    rows: int
    columns: int
    num_warps: int


@dataclass(frozen=True)
class ComposeConfigs:
    """The composition's forward and its backward, for wide tensors."""

    forward: ComposeConfig
    backward: ComposeConfig


# 16 bytes a thread and load in half precision. The backward keeps two sums a column in registers besides.
COMPOSE = ComposeConfigs(ComposeConfig(4, 1024, 4), ComposeConfig(4, 512, 4))
COMPOSE_TABLES: dict[int, ComposeConfigs] = {80: COMPOSE, 90: COMPOSE, 100: COMPOSE}
"""As :data:`TABLES`; made by calculation, not by measurement."""

PROGRAMS_PER_PROCESSOR = 8
"""Programs a multiprocessor that the composition's backward is divided into; every one leaves a row of partial sums."""


@functools.cache
def compose_config(columns: int, along_rows: bool = False, found: int = 90) -> ComposeConfigs:
    """The configurations for a width: a tile keeps its size, and takes no more columns than there are.

    Args:
        along_rows: whether tokens are what lies side by side, as in a convolution's activations: tiles are then long
            along these.
    """
    table = _newest(COMPOSE_TABLES, found)
    return ComposeConfigs(*(_fitted(c, columns, along_rows) for c in (table.forward, table.backward)))


def _fitted(config: ComposeConfig, columns: int, along_rows: bool) -> ComposeConfig:
    size = config.rows * config.columns
    widest = min(32 if along_rows else config.columns, 1 << max(columns - 1, 0).bit_length())
    # No fewer columns than a warp reads at once: narrower tiles would be long columns of little use for sums over rows.
    width = max(widest, 16)
    return ComposeConfig(size // width, width, config.num_warps)


@dataclass(frozen=True)
class LinearConfig:
    """One way to run the DoRA linear: ``rows x columns`` of the output (tokens, d_out), products of depth ``depth``."""

    operand_bytes: int
    """Width of the products' operands: 2 (fp16, bf16) or 4 (fp32)."""
    max_tokens: int | None
    """The most tokens it serves; None is any."""
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


LINEAR = (
    LinearConfig(2, 16, 16, 64, 128, 4, 4),
    LinearConfig(2, 64, 64, 64, 64, 4, 4),
    LinearConfig(2, None, 128, 128, 64, 8, 3),
    LinearConfig(4, 16, 16, 64, 64, 4, 3),
    LinearConfig(4, None, 64, 64, 32, 4, 3),
)
LINEAR_TABLES: dict[int, tuple[LinearConfig, ...]] = {80: LINEAR, 90: LINEAR, 100: LINEAR}
"""As :data:`TABLES`; made by calculation, not by measurement."""


def linear_config(operand_bytes: int, tokens: int, found: int = 90) -> LinearConfig:
    """The first configuration of an architecture's table that serves operands of this width and so many tokens."""
    table = _newest(LINEAR_TABLES, found)
    return next(
        c for c in table if c.operand_bytes == operand_bytes and (c.max_tokens is None or tokens <= c.max_tokens)
    )


def quantized_config(factor_bytes: int, rank: int) -> RowNormConfig:
    """The first configuration for quantised weights that serves operands of this width and rank."""
    return next(
        c for c in QUANTIZED_ROW_NORM if c.factor_bytes == factor_bytes and (c.max_rank is None or rank <= c.max_rank)
    )


@functools.cache
def splits(row_blocks: int, column_blocks: int, processors: int) -> int:
    """Into how many parts to divide d_in, so that ``row_blocks x splits`` programs fill the device: the fewest parts
    among those whose last wave is fullest, since every part costs a partial sum."""

    def filled(parts: int) -> float:
        programs = row_blocks * parts
        return programs / (-(-programs // processors) * processors)

    if row_blocks >= 8 * processors:
        return 1
    most = min(column_blocks, max(1, -(-4 * processors // row_blocks)))
    best = max(filled(parts) for parts in range(1, most + 1))
    return next(parts for parts in range(1, most + 1) if filled(parts) >= best - 0.05)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The device's streaming multiprocessors; 1 where kernels are interpreted on CPU tensors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@functools.cache
def architecture(device: torch.device) -> int:
    """Ten times the device's compute capability; 90 where kernels are interpreted on CPU tensors."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
