"""``dorafx bench``: its arguments and actions."""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dorafx.ops import dispatch
from dorafx.options import COMPOSE

from .gpu import PARTS, GpuSettings, balance_line, run_gpu, tuned_table
from .plan import ANCHORS, DTYPES, SUITES, Settings, check_device
from .plot import FORMATS, plot
from .quantized import WEIGHTS
from .results import Results
from .run import run_bench
from .shapes import PRESETS, parse_shape
from .table import markdown, summary, tables
from .tune import run_tune

_NOT_OF_GPU = ("against", "shapes", "hidden", "rank", "dtype", "checkpointing", "autocast", "tune")


def add_arguments(bench: argparse.ArgumentParser) -> None:
    """The arguments of ``dorafx bench``."""
    bench.add_argument(
        "suites",
        nargs="*",
        metavar="suite",
        help=f"{', '.join(SUITES)}; or gpu: everything claimed of a GPU, in a budget",
    )
    bench.add_argument("--against", nargs="+", default=[], metavar="NAME", help=f"{', '.join(ANCHORS)}, or none")
    bench.add_argument(
        "--shapes",
        nargs="+",
        default=[],
        metavar="SHAPE",
        help=f"{', '.join(PRESETS)}, or D_OUTxD_IN or D_OUTxD_IN:RANK",
    )
    bench.add_argument("--hidden", type=int, nargs="+", default=[], help="sizes (default 1024; norm: 1024 to 8192)")
    bench.add_argument("--rank", type=int, nargs="+", default=[], help="ranks (default 128; norm: 8 64 384)")
    bench.add_argument(
        "--tokens", type=int, default=1024, help="tokens of an input, or in decode's cache (default 1024)"
    )
    bench.add_argument("--dtype", help=f"{', '.join(DTYPES)} (default float32, on CUDA bfloat16)")
    bench.add_argument("--device", help="cpu or cuda (default cuda if there is one)")
    bench.add_argument(
        "--layers", type=int, nargs="+", default=[4], help="decoder layers of a model, also of a preset's (default 4)"
    )
    bench.add_argument("--rounds", type=int, default=2, help="processes a configuration, interleaved (default 2)")
    bench.add_argument(
        "--seconds", type=float, default=0.5, help="time of timed calls a figure and round (default 0.5)"
    )
    bench.add_argument("--threads", type=int, default=0, help="threads of a process (default: torch's own choice)")
    bench.add_argument("--checkpointing", action="store_true", help="train the model with activation checkpointing")
    bench.add_argument(
        "--micro-batches", type=int, default=1, help="forwards and backwards a training step (default 1)"
    )
    bench.add_argument(
        "--autocast",
        action="store_true",
        help="fp32 adapters under autocast to --dtype: PEFT's default, and HF Trainer's",
    )
    bench.add_argument("--mode", default="default", help="Inductor's mode for all that is compiled")
    bench.add_argument("--codegen", default="inductor", help="dorafx's codegen (default inductor)")
    bench.add_argument(
        "--compose", default="auto", help=f"dorafx's composition: {', '.join(COMPOSE)} (suite compose: auto, triton)"
    )
    bench.add_argument(
        "--scope",
        default="model",
        help="what is compiled as one graph: model (default), blocks, modules (adapter layers), or auto, as dorafx.optimize chooses "
        "(generate: always in parts)",
    )
    bench.add_argument("--weights", default="dense", help=f"the suite norm's: {', '.join(WEIGHTS)} (default dense)")
    bench.add_argument(
        "--tune", action="store_true", help="search launch configurations on this GPU and print a table to paste"
    )
    bench.add_argument(
        "--kernels",
        action="store_true",
        help="measure nothing; compile the row norms' kernels for every architecture and report what the compiler says",
    )
    gpu = bench.add_argument_group("gpu, most important first, as far as the budget goes")
    gpu.add_argument("--budget", type=float, metavar="SECONDS", help="from start to end (default 300)")
    gpu.add_argument("--part", nargs="+", default=[], metavar="PART", help=f"{', '.join(PARTS)} (default all)")
    gpu.add_argument(
        "--peer-path",
        nargs="+",
        default=[],
        metavar="FOLDER",
        help="checkouts to compare with: the fork of PEFT of arXiv:2603.22276, axolotl",
    )
    gpu.add_argument(
        "--quick", action="store_true", help="tiny sizes: does everything run, with --device cpu also without a GPU"
    )
    bench.add_argument("--plot", type=Path, metavar="FILE", help="measure nothing; draw the results of this file")
    bench.add_argument("--table", type=Path, metavar="FILE", help="measure nothing; print the results of this file")
    bench.add_argument("--markdown", action="store_true", help="with --table: as Markdown")
    bench.add_argument(
        "-o", "--output", type=Path, help=f"the results' JSON; with --plot the picture ({', '.join(FORMATS)})"
    )


def run_command(options: argparse.Namespace) -> int:
    """Returns the exit code: 1 if a configuration failed.

    Raises:
        ValueError, DorafxError, OSError: as the command line reports them, with exit code 2.
    """
    if options.plot is not None or options.table is not None:
        return _show(options)
    if options.tune:
        return _tune(options)
    if options.kernels:
        return _kernels(options)
    if options.markdown:
        raise ValueError("--markdown goes with --table FILE")
    if "gpu" in options.suites:
        return _gpu(options)
    for name in ("budget", "part", "peer_path", "quick"):
        if getattr(options, name):
            raise ValueError(f"--{name.replace('_', '-')} goes with dorafx bench gpu")
    settings = _settings(options)
    console = Console(stderr=options.json)
    results = run_bench(settings, options.output, console)
    if options.json:
        print(results.to_json())
    else:
        _print(results, console)
        if options.output is not None:
            console.print(f"results: {options.output}", highlight=False, soft_wrap=True)
    return 1 if any(row.error for row in results.rows) else 0


def _show(options: argparse.Namespace) -> int:
    if options.plot is not None and options.table is not None:
        raise ValueError("--plot and --table: give one of them")
    if options.table is not None and options.output is not None:
        raise ValueError("--table prints, and writes no file: leave -o out")
    if options.suites:
        raise ValueError("--plot and --table measure nothing: leave the suites out")
    results = Results.read(options.plot or options.table)
    if options.plot is not None:
        print(plot(results, options.output or options.plot.with_suffix(".png")))
    elif options.json:
        print(results.to_json())
    elif options.markdown:
        print(markdown(results))
    else:
        _print(results, Console())
    return 0


def _tune(options: argparse.Namespace) -> int:
    if options.suites or options.output is not None:
        raise ValueError("--tune prints a table, and measures no suite: leave suites and -o out")
    shapes = [parse_shape(text) for text in options.shapes if text.lower() not in PRESETS]
    shapes += [s for text in options.shapes if text.lower() in PRESETS for s in PRESETS[text.lower()].shapes()]
    device = options.device or "cuda"
    print(run_tune(device, shapes, options.seconds, lambda line: print(line, file=sys.stderr)))
    return 0


def _kernels(options: argparse.Namespace) -> int:
    """Exit code 1 if a kernel exceeds its limits."""
    if options.suites or options.json:
        raise ValueError("--kernels measures no suite and writes Markdown: leave suites and --json out")
    if not dispatch.available():
        raise ValueError("--kernels compiles Triton kernels, and Triton is not installed")
    from . import ahead

    rows = ahead.rows(ranks=options.rank or ahead.RANKS, report=lambda line: print(line, file=sys.stderr))
    page = ahead.markdown(rows)
    if options.output is None:
        print(page, end="")
    else:
        options.output.write_text(page)
    return 1 if ahead.violations(rows) else 0


def _gpu(options: argparse.Namespace) -> int:
    if options.suites != ["gpu"]:
        raise ValueError("bench gpu has suites of its own: leave the others out")
    for part in options.part:
        if part not in PARTS:
            raise ValueError(f"--part: {part!r} is not one of {', '.join(PARTS)}")
    for name in _NOT_OF_GPU:
        if getattr(options, name):
            raise ValueError(f"bench gpu chooses for itself: leave --{name.replace('_', '-')} out")
    device = options.device or "cuda"
    check_device(device)
    parts = tuple(part for part in PARTS if part in options.part)
    budget = 300.0 if options.budget is None else options.budget
    settings = GpuSettings(
        budget, parts, device, options.quick, tuple(options.peer_path), 0.0 if options.quick else 1.0
    )
    out = options.output or Path(f"gpu-{'-'.join(parts) or 'all'}.json")
    console = Console(stderr=True)
    with _ended_by_interrupt():
        results = run_gpu(settings, out, console)
    if options.json:
        print(results.to_json())
    else:
        _print(results, Console())
        balance = balance_line(results)
        for text in (tuned_table(results), balance):
            if text:
                print(text)
        console.print(f"results: {out}", highlight=False, soft_wrap=True)
    return 1 if any(row.error for row in results.rows) else 0


@contextlib.contextmanager
def _ended_by_interrupt() -> Iterator[None]:
    """Treat SIGTERM (as ``timeout`` sends it) like Ctrl-C, which also ends the processes of the run."""

    def interrupt(*unused: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _settings(options: argparse.Namespace) -> Settings:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = options.dtype or ("float32" if device == "cpu" else "bfloat16")
    plain: tuple[str, ...] = ("tokens", "rounds", "seconds", "threads", "checkpointing", "micro_batches", "autocast")
    fields: dict[str, Any] = {
        name: getattr(options, name) for name in (*plain, "mode", "codegen", "compose", "scope", "weights")
    }
    for name in ("suites", "against", "shapes", "hidden", "rank", "layers"):
        fields[name] = tuple(dict.fromkeys(getattr(options, name)))
    return Settings(**fields, device=device, dtype=dtype)


def _print(results: Results, console: Console) -> None:
    console.print(summary(results), highlight=False, soft_wrap=True)
    for table in tables(results):
        console.print(table)
