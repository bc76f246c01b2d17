"""The part tune: launch configurations of the row norm, compiled by several processes at once and timed one at a time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch

from dorafx.ops import norm
from dorafx.ops.triton.configs import Gpu, RowNormConfig

from ..clock import Clock
from ..processes import ALONE, DEVICE, Report, one_line, turn
from ..tune import Problem, candidates, fits, served, time_on
from ..worker import prepare

_BLOCKS = (1, 4, 16)
"""In place of launch configurations on a CPU: factors by which the tiled norm's blocks are smaller than usual."""
_RANK_OF_ANY = 384
"""The rank timed for a configuration that serves any rank."""


@dataclass(frozen=True)
class Trial:
    """One configuration of one row of a table: ``configuration`` are its fields (on a CPU one of the sizes of blocks), ``problems`` the
    fields of the norms that it is timed with."""

    row: int
    configuration: tuple[Any, ...]
    problems: tuple[tuple[int, int, int, int], ...]


def label_of(row: int, config: RowNormConfig) -> str:
    """A row of a table in words, with its number, since several serve the same ranks and factors: for cards with less memory, or
    other weights."""
    return f"{row + 1}. {served(config)}"


def trials(table: Sequence[RowNormConfig], sides: Sequence[int], gpu: Gpu | None) -> list[Trial]:
    """The trials for each row of a table that fits the card: first the configuration in use of every row, then candidates, alternating
    between the rows. Rows of half-precision factors and large ranks come first.

    Args:
        table: launch configurations of an architecture.
        sides: of the square weights to time.
        gpu: the card; None is a CPU.
    """
    order = sorted(range(len(table)), key=lambda i: (table[i].factor_bytes, -(table[i].max_rank or 1 << 30)))
    columns = []
    for index in order:
        row = table[index]
        if gpu is not None and not fits(row, gpu):
            continue
        rank = row.max_rank or _RANK_OF_ANY
        problems = tuple(astuple(Problem(side, side, rank, row.factor_bytes)) for side in sides)
        configurations = [(b,) for b in _BLOCKS] if gpu is None else [astuple(c) for c in candidates(row, gpu)]
        present = configurations[0] if gpu is None else astuple(row)
        columns.append([Trial(index, c, problems) for c in (present, *(c for c in configurations if c != present))])
    longest = max(map(len, columns), default=0)
    return [column[place] for place in range(longest) for column in columns if place < len(column)]


def tune_share(request: dict[str, Any], report: Report) -> dict[str, Any]:
    """Try some configurations.

    ``request["trials"]`` are pairs of an index and the fields of a :class:`Trial`. They are compiled in order for at most
    ``request["compiling"]`` seconds, and those that were compiled are timed. Reports ``{"trial": index}`` with ``seconds``, one for each
    problem, or with ``error``.
    """
    started = time.monotonic()
    clock = prepare(request)
    report(turn(DEVICE))
    single_call = Clock(clock.device, 0, least=1)
    compiled: list[tuple[int, dict[str, Any]]] = []
    for index, trial in request["trials"]:
        if compiled and time.monotonic() - started > request["compiling"]:
            break
        try:
            for problem in trial["problems"]:
                _seconds(single_call, trial, problem)
        except Exception as error:  # too large for the device, or it does not compile
            report({"trial": index, "error": one_line(error)})
        else:
            compiled.append((index, trial))
    report(turn(ALONE))
    for index, trial in compiled:
        try:
            report({"trial": index, "seconds": [_seconds(clock, trial, problem) for problem in trial["problems"]]})
        except RuntimeError as error:
            report({"trial": index, "error": one_line(error)})
    return {}


def _seconds(clock: Clock, trial: dict[str, Any], problem: tuple[int, int, int, int]) -> float:
    if clock.cuda:
        return time_on(clock, RowNormConfig(*trial["configuration"]), Problem(*problem))
    d_out, d_in, rank, factor_bytes = problem
    factor = torch.bfloat16 if factor_bytes == 2 else torch.float32
    weight = torch.randn(d_out, d_in, dtype=torch.bfloat16)
    left, right = torch.randn(d_out, rank, dtype=factor), torch.randn(rank, d_in, dtype=factor)
    return statistics.median(clock.samples(lambda: norm.tiled(weight, left, right, 0.5, *trial["configuration"])))
