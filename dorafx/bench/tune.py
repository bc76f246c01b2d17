"""``dorafx bench --tune``: search launch configurations of the row norm on the current device, and print its table.

The table is to be pasted into :mod:`dorafx.ops.triton.configs`, so that no search is needed at a first call; the tests then compile
every configuration of it for every architecture and check for spilled registers.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from dorafx.errors import DorafxError
from dorafx.ops import dispatch
from dorafx.ops.norm import tiled
from dorafx.ops.triton import configs
from dorafx.ops.triton.configs import TABLES, Gpu, RowNormConfig, table_of

from .clock import Clock
from .shapes import Shape

SHAPES = (Shape(4096, 4096), Shape(8192, 8192), Shape(28672, 8192), Shape(1024, 8192))
"""The default weights of the search: square, tall and wide."""

_RANKS_OF_ANY = (256, 384)
"""The ranks timed for a configuration that serves any rank."""
_ACCUMULATORS = 64
"""Registers of a thread for the tile of the product, at most; the sums of squares take as many."""
_OTHERS = 56
"""Registers of a thread for the weight's tile and the addresses."""
_CHUNKS = 8
"""Chunks of the rank, at most."""


@dataclass(frozen=True)
class Problem:
    """One norm to time: ``[d_out, d_in]`` at a rank, factors of 2 (bf16) or 4 (fp32) bytes; the weight is bf16."""

    d_out: int
    d_in: int
    rank: int
    factor_bytes: int


Timer = Callable[[RowNormConfig, Problem], float]
"""Seconds of a call; raises if the configuration does not compile, does not launch, or does not compute the norm."""


@dataclass(frozen=True)
class Choice:
    """The configuration found for one row of the table.

    Attributes:
        config: the fastest.
        gain: its speed relative to the present configuration: the geometric mean over the problems; at least 1.
        tried: configurations that ran.
        failed: configurations that did not.
    """

    config: RowNormConfig
    gain: float
    tried: int
    failed: int


def candidates(present: RowNormConfig, gpu: Gpu) -> list[RowNormConfig]:
    """Configurations that may replace the present one, without those that do not fit a multiprocessor."""
    configurations = []
    for rows, columns, depth, warps, stages in itertools.product(
        (64, 128, 256), (32, 64, 128), (16, 32, 64, 128), (4, 8, 16), (1, 2, 3, 4)
    ):
        accumulators = rows * columns // (32 * warps)
        resident = max(1, 65536 // (32 * warps * (_OTHERS + 2 * accumulators)))
        config = replace(
            present, rows=rows, columns=columns, depth=depth, num_warps=warps, num_stages=stages, programs=resident
        )
        if present.max_rank is None:
            sensible = depth in (32, 64) and stages > 1
        else:  # at least one whole chunk, and not too many
            sensible = depth <= present.max_rank <= _CHUNKS * depth
        if sensible and 8 <= accumulators <= _ACCUMULATORS and fits(config, gpu):
            configurations.append(config)
    return configurations


def served(config: RowNormConfig) -> str:
    """What a row of a table serves, in words."""
    ranks = "any rank" if config.max_rank is None else f"rank to {config.max_rank}"
    return f"{8 * config.factor_bytes}-bit factors, {ranks}"


def fits(config: RowNormConfig, gpu: Gpu) -> bool:
    """Whether the card has enough shared memory for a configuration in the timed problems."""
    problem = configs.Problem(config.max_rank or 0, config.factor_bytes, config.factor_bytes, 2)
    return config.shared_bytes(problem, gpu.architecture) <= gpu.block_bytes


def search(
    present: RowNormConfig, configurations: Iterable[RowNormConfig], problems: Sequence[Problem], timer: Timer
) -> Choice:
    """The configuration with the smallest geometric mean of times over the problems.

    Raises:
        DorafxError: the present configuration does not run.
    """
    try:
        before = [timer(present, problem) for problem in problems]
    except Exception as error:
        raise DorafxError(f"--tune: the configuration in use, {present}, failed: {_first_line(error)}") from error
    best, gain, ran, failed = present, 1.0, 1, 0
    for config in configurations:
        if config == present:
            continue
        try:
            after = [timer(config, problem) for problem in problems]
        except Exception:  # too large for the device, or it does not compile
            failed += 1
            continue
        ran += 1
        ratio = math.exp(statistics.fmean(math.log(b / a) for b, a in zip(before, after)))
        if ratio > gain:
            best, gain = config, ratio
    return Choice(best, gain, ran, failed)


def tune(
    table: Sequence[RowNormConfig],
    gpu: Gpu,
    shapes: Sequence[Shape],
    timer: Timer,
    report: Callable[[str], None] = lambda line: None,
) -> list[Choice]:
    """Search for every row of a table.

    Args:
        table: the configurations in use.
        gpu: the card that they are for.
        shapes: weights to time; their ranks are ignored, since a row of the table determines the ranks.
        timer: times one configuration.
        report: called with a line after each row.
    """
    choices = []
    for present in table:
        if not fits(present, gpu):
            choices.append(Choice(present, 1.0, 0, 0))
            report(f"{served(present)}: {present} does not fit this card")
            continue
        ranks = _RANKS_OF_ANY if present.max_rank is None else (present.max_rank,)
        sizes = dict.fromkeys((s.d_out, s.d_in) for s in shapes or SHAPES)
        problems = [Problem(*size, rank, present.factor_bytes) for size in sizes for rank in ranks]
        choice = search(present, candidates(present, gpu), problems, timer)
        choices.append(choice)
        report(
            f"{served(present)}: {choice.gain:.2f}x the speed of the present one; "
            f"{choice.tried} ran, {choice.failed} did not"
        )
    return choices


def paste(name: str, choices: Sequence[Choice]) -> str:
    """The table as Python."""
    rows = "".join(f"    {c.config!r},\n" for c in choices)
    return f"{name} = (\n{rows})"


def paste_for(architecture: int, choices: Sequence[Choice]) -> str:
    """The table of an architecture as Python, with the place where it belongs."""
    key = max((known for known in TABLES if known <= architecture), default=min(TABLES))
    return f"# dorafx/ops/triton/configs.py: TABLES[{key}]\n" + paste(f"ROW_NORM_{key}", choices)


def time_on(clock: Clock, config: RowNormConfig, problem: Problem) -> float:
    """Seconds of the kernel in this configuration: the median of cold calls.

    Raises:
        ArithmeticError: the result is not the norm; and whatever Triton raises.
    """
    from dorafx.ops.triton.row_norm import launch

    operands = _operands(problem, clock.device)

    def step() -> torch.Tensor:
        return launch(*operands, 0.5, config=config)

    error = ((step() - _exact(problem, clock.device)).abs() / _exact(problem, clock.device)).max().item()
    if not error <= 1e-3:
        raise ArithmeticError(f"{config}: relative error {error}")
    return statistics.median(clock.samples(step, cold=True))


@functools.lru_cache(maxsize=1)
def _operands(problem: Problem, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    factor = torch.bfloat16 if problem.factor_bytes == 2 else torch.float32
    shapes = (problem.d_out, problem.d_in), (problem.d_out, problem.rank), (problem.rank, problem.d_in)
    dtypes = (torch.bfloat16, factor, factor)
    weight, left, right = (
        torch.randn(shape, generator=generator, device=device).to(dtype) for shape, dtype in zip(shapes, dtypes)
    )
    return weight, left, right


@functools.lru_cache(maxsize=64)
def _exact(problem: Problem, device: str) -> torch.Tensor:
    return tiled(*_operands(problem, device), 0.5)


def check_device(device: str) -> Gpu:
    """The card to tune for.

    Raises:
        ValueError: there is no CUDA device, or no Triton.
    """
    if torch.device(device).type != "cuda" or not torch.cuda.is_available():
        raise ValueError("--tune times launch configurations on a CUDA device, and there is none here")
    if not dispatch.available():
        raise ValueError("--tune times Triton kernels, and Triton is not installed")
    return configs.gpu(torch.device(device))


def run_tune(device: str, shapes: Sequence[Shape], seconds: float, report: Callable[[str], None]) -> str:
    """Tune for the device; returns the table to paste.

    Raises:
        ValueError: see :func:`check_device`.
        DorafxError: see :func:`search`.
    """
    gpu = check_device(device)
    clock = Clock(device, min(seconds, 0.05))
    choices = tune(table_of(gpu.architecture), gpu, shapes, functools.partial(time_on, clock), report)
    return paste_for(gpu.architecture, choices)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]
