"""Block sizes, warps and stages of every kernel: decided here and nowhere else.

Every configuration compiles without spilled registers for the architectures that have it in their table: for narrow and wide
weights, in any layout, with d_in divided or whole. The tests check that ahead of time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Gpu:
    """The properties of a GPU on which the configurations depend.

    Attributes:
        architecture: ten times its compute capability.
        processors: its streaming multiprocessors.
        block_bytes: shared memory that one program may have.
        processor_bytes: shared memory of a multiprocessor; each resident program takes 1 KiB more than it requests.
    """

    architecture: int
    processors: int
    block_bytes: int
    processor_bytes: int


@dataclass(frozen=True)
class Problem:
    """The properties of a row norm on which block sizes depend.

    Attributes:
        rank: of the factors.
        operand_bytes: of an element of the product's operands.
        factor_bytes: of an element of the wider factor, as it is loaded.
        weight_bytes: of an element of W; for a quantised W, see :func:`code_bytes`.
        scattered: whether no dimension of W is contiguous in memory.
    """

    rank: int
    operand_bytes: int
    factor_bytes: int
    weight_bytes: int
    scattered: bool = False


def code_bytes(format: str, scale: int, zero: int = 0) -> int:
    """How many bytes an element of a quantised W counts for, rounded up: its code, the scale of its group (two 4-bit codes share one;
    bitsandbytes' 8-bit codes have one a row), and its zero point. At least 3, because values that are not dequantised yet take more
    registers than half precision.

    Args:
        scale, zero: bytes of a scale and of a zero point.
    """
    if format == "bnb8":
        return 3
    return max(3, -(-(1 + scale) // 2) if format in ("nf4", "fp4") else 1 + scale + zero)


WIDEST_CONVERTED_RANK = 64
"""Up to this rank, factors that are wider than the product's operands are converted tile by tile. Above it they are converted before
the launch: every block of rows would load all of ``right`` in the wider dtype, and the kernels for such ranks have no registers to
spare."""


_BARRIERS = 256
"""Bytes of shared memory beside the tiles."""


@dataclass(frozen=True)
class RowNormConfig:
    """One way to run the row norm: a ``rows x columns`` tile of W, formed from products of depth ``depth``."""

    factor_bytes: int
    """Width of the product's operands: 2 (fp16, bf16) or 4 (fp32)."""
    max_rank: int | None
    """The largest rank that it serves, with ``left`` resident in shared memory; None: any rank, both factors are streamed."""
    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int
    """Tiles in flight. With one, and a resident ``left``, the next tile of ``right`` is loaded to registers while this one is
    multiplied."""
    programs: int = 1
    """How many programs a multiprocessor has registers for, with a weight in half precision."""
    weight_bytes: int = 8
    """The widest element of W that it serves; see :func:`code_bytes` for a quantised W."""
    scattered: bool = True
    """Whether it serves a W of which no dimension is contiguous in memory: that takes a register for each element."""

    def chunks(self, rank: int) -> int:
        """The number of chunks of the rank in which ``left`` is resident; 0 if it is not resident."""
        return 0 if self.max_rank is None else -(-rank // self.depth)

    def shared_bytes(self, problem: Problem, architecture: int) -> int:
        """Shared memory of a program, in bytes: no less than the compiler takes."""
        return self._tiles_bytes(problem, architecture) + _BARRIERS

    def _tiles_bytes(self, problem: Problem, architecture: int) -> int:
        depth = self.depth * (self.chunks(problem.rank) or 1)
        # An fp32 operand is split into two tf32 numbers.
        parts = problem.operand_bytes if problem.operand_bytes == 2 else 2 * problem.operand_bytes
        left, right = parts * depth * self.rows, problem.factor_bytes * depth * self.columns
        block = problem.weight_bytes * self.rows * self.columns
        if self.max_rank is not None and self.num_stages == 1:
            return left + right + block
        stages = self.num_stages - 1
        if problem.factor_bytes == problem.operand_bytes == 2:
            # From Hopper on, the tensor cores read their operands from shared memory while the next tile is loaded.
            buffers, converted = self.num_stages if 90 <= architecture < 120 else stages, 0
        else:
            buffers, converted = stages, parts * depth * self.columns
            if self.max_rank is None:  # Triton 3.8 also writes a streamed ``left`` back, before it is split
                converted += problem.operand_bytes * depth * self.rows
        if self.max_rank is None:
            return max(buffers * problem.factor_bytes * depth * (self.rows + self.columns) + converted, block)
        return left + buffers * right + stages * block + converted

    def programs_on(self, gpu: Gpu, problem: Problem) -> int:
        """Programs that a multiprocessor has at a time."""
        shared = self.shared_bytes(problem, gpu.architecture) + 1024
        return max(1, min(self.programs, gpu.processor_bytes // shared))


# Small ranks are bound by reading W: small tiles, many in flight. From rank 65 on, reading ``right`` from L2 costs as much, and every
# block of rows reads it once: so the blocks have more rows, and ``left`` is read once for each. Above 128 the next tile goes through
# registers, so that shared memory has room for ``left`` of 128 rows. Products of fp32 factors are three tf32 products.
# Of several entries for a rank, the first that serves the weight and fits into the GPU's shared memory is used.
HOPPER = (
    RowNormConfig(2, 16, 64, 64, 16, 8, 4, programs=4),
    RowNormConfig(2, 64, 128, 64, 32, 8, 4, programs=2),
    RowNormConfig(2, 128, 128, 64, 64, 8, 3, programs=2),
    RowNormConfig(2, 384, 128, 64, 64, 8, 1, scattered=False),
    RowNormConfig(2, 512, 128, 64, 64, 8, 1, weight_bytes=2, scattered=False),
    RowNormConfig(2, None, 128, 128, 64, 8, 3, weight_bytes=2, scattered=False),
    RowNormConfig(2, None, 64, 128, 64, 8, 3),
    RowNormConfig(4, 16, 64, 64, 16, 4, 4, programs=3),
    RowNormConfig(4, 64, 64, 64, 32, 8, 3),
    RowNormConfig(4, None, 128, 64, 32, 8, 3, scattered=False),
    RowNormConfig(4, None, 64, 64, 32, 8, 3),
)

# Products are in the tensor cores' own memory, but the tile of W is in registers, which suffice up to rank 384.
BLACKWELL = tuple(row for row in HOPPER if row.max_rank != 512)

# Tensor cores before Hopper keep the whole product in registers. Entries for 99 KiB of shared memory follow those for 163 KiB.
AMPERE = (
    RowNormConfig(2, 16, 64, 64, 16, 8, 4, programs=4),
    RowNormConfig(2, 64, 64, 64, 32, 8, 4, programs=2),
    RowNormConfig(2, 64, 64, 64, 32, 8, 3),
    RowNormConfig(2, 128, 128, 64, 64, 8, 3),
    RowNormConfig(2, 128, 64, 64, 64, 8, 3),
    RowNormConfig(2, 384, 128, 64, 64, 8, 1, weight_bytes=2, scattered=False),
    RowNormConfig(2, None, 64, 128, 64, 8, 3),
    RowNormConfig(4, 16, 64, 64, 16, 8, 3, programs=2),
    RowNormConfig(4, 32, 64, 64, 32, 8, 3),
    RowNormConfig(4, None, 64, 64, 32, 8, 3, weight_bytes=2),
    RowNormConfig(4, None, 64, 32, 32, 8, 3),
)

# The same tensor cores, with 99 KiB of shared memory; scattered weights and fp32 products spill registers earlier.
BLACKWELL_CONSUMER = (
    *AMPERE[:5],
    RowNormConfig(2, None, 64, 128, 64, 8, 3, scattered=False),
    RowNormConfig(2, None, 64, 64, 64, 8, 3),
    *AMPERE[7:9],
    AMPERE[-1],
)

TABLES: dict[int, tuple[RowNormConfig, ...]] = {80: AMPERE, 90: HOPPER, 100: BLACKWELL, 120: BLACKWELL_CONSUMER}
"""A table for each architecture, by ten times its compute capability. All are calculated, none is measured yet; ``dorafx bench
--tune`` prints a table measured on the present device."""


def _newest(tables: Mapping[int, T], architecture: int) -> T:
    return tables[max((known for known in tables if known <= architecture), default=min(tables))]


def table_of(architecture: int) -> tuple[RowNormConfig, ...]:
    """The table of an architecture, or of the newest older one that has a table, or else the oldest table."""
    return _newest(TABLES, architecture)


def row_norm_config(problem: Problem, gpu: Gpu) -> RowNormConfig:
    """The first configuration of the architecture's table that serves the problem and fits into the GPU's shared memory; if none
    fits, the one that needs least."""

    def shared(config: RowNormConfig) -> int:
        return config.shared_bytes(problem, gpu.architecture)

    serving = [c for c in table_of(gpu.architecture) if _serves(c, problem)]
    return next((c for c in serving if shared(c) <= gpu.block_bytes), min(serving, key=shared))


def _serves(config: RowNormConfig, problem: Problem) -> bool:
    return (
        config.factor_bytes == problem.operand_bytes
        and config.weight_bytes >= problem.weight_bytes
        and (config.scattered or not problem.scattered)
        and (config.max_rank is None or problem.rank <= config.max_rank)
    )


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


# Each thread loads 16 bytes at a time in half precision. The backward also keeps two sums for each column in registers.
COMPOSE = ComposeConfigs(ComposeConfig(4, 1024, 4), ComposeConfig(4, 512, 4))
COMPOSE_TABLES: dict[int, ComposeConfigs] = {80: COMPOSE, 90: COMPOSE, 100: COMPOSE}
"""As :data:`TABLES`; calculated, not measured."""

PROGRAMS_PER_PROCESSOR = 8
"""Into how many programs for each multiprocessor the composition's backward is divided; each writes a row of partial sums."""


@functools.cache
def compose_config(columns: int, along_rows: bool = False, architecture: int = 90) -> ComposeConfigs:
    """The configurations for a width: a tile keeps its size, and takes no more columns than there are.

    Args:
        along_rows: whether tokens are contiguous in memory, as in a convolution's activations; tiles are then longer along them.
    """
    table = _newest(COMPOSE_TABLES, architecture)
    return ComposeConfigs(*(_fitted(c, columns, along_rows) for c in (table.forward, table.backward)))


def _fitted(config: ComposeConfig, columns: int, along_rows: bool) -> ComposeConfig:
    size = config.rows * config.columns
    widest = min(32 if along_rows else config.columns, 1 << max(columns - 1, 0).bit_length())
    # At least as many columns as a warp reads at once; narrower tiles would be long columns, which are bad for sums over rows.
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
"""As :data:`TABLES`; calculated, not measured."""


def linear_config(operand_bytes: int, tokens: int, architecture: int = 90) -> LinearConfig:
    """The first configuration of an architecture's table that serves operands of this width and so many tokens."""
    table = _newest(LINEAR_TABLES, architecture)
    return next(
        c for c in table if c.operand_bytes == operand_bytes and (c.max_tokens is None or tokens <= c.max_tokens)
    )


@functools.cache
def splits(row_blocks: int, column_blocks: int, residents: int) -> int:
    """Into how many parts to divide d_in, so that ``row_blocks x splits`` programs fill the device.

    Args:
        row_blocks: blocks of rows, of all norms of a launch.
        column_blocks: tiles along d_in.
        residents: programs that the device runs at a time: multiprocessors times the programs that each has.

    Returns:
        The fewest parts that take the least time, counted in tiles one after another. Up to 5 % more time counts as equal, since
        every part costs a partial sum.
    """

    def tiles(parts: int) -> int:
        part = -(-column_blocks // parts)
        programs = row_blocks * -(-column_blocks // part)
        return -(-programs // residents) * part

    if row_blocks >= 8 * residents:
        return 1
    most = min(column_blocks, max(1, -(-4 * residents // row_blocks)))
    best = min(tiles(parts) for parts in range(1, most + 1))
    return next(parts for parts in range(1, most + 1) if tiles(parts) <= 1.05 * best)


def division(
    config: RowNormConfig, problem: Problem, gpu: Gpu, shape: Sequence[int], norms: int = 1, parts: int | None = None
) -> tuple[int, int, int]:
    """How a launch is divided into programs.

    Args:
        shape: of the weight, ``[d_out, d_in]``.
        norms: how many norms are launched together.
        parts: into how many parts d_in is divided at most; by default :func:`splits` decides.

    Returns:
        The number of blocks of rows, of parts of d_in, and of columns of a part.
    """
    d_out, d_in = shape
    row_blocks, column_blocks = -(-d_out // config.rows), -(-d_in // config.columns)
    if parts is None:
        parts = splits(row_blocks * norms, column_blocks, gpu.processors * config.programs_on(gpu, problem))
    part = -(-column_blocks // parts) * config.columns
    return row_blocks, -(-d_in // part), part


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The device's properties; for kernels interpreted on CPU tensors, those of a Hopper GPU with one multiprocessor."""
    if device.type != "cuda":
        return Gpu(90, 1, 227 << 10, 228 << 10)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        # CUDA devices have an opt-in limit; ROCm has a single number.
        getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block),
        properties.shared_memory_per_multiprocessor,
    )


def multiprocessors(device: torch.device) -> int:
    """The device's streaming multiprocessors; see :func:`gpu`."""
    return gpu(device).processors


def architecture(device: torch.device) -> int:
    """Ten times the device's compute capability; see :func:`gpu`."""
    return gpu(device).architecture
