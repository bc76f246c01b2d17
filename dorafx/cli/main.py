"""The command line: ``dorafx {demo, explain, check, bench, report, doctor}``.

Exit codes: 0 success; 1 it ran, with a negative result (``explain`` found misses, ``check`` problems, ``doctor`` a failure, a configuration of
``bench`` failed); 2 it could not run (wrong input, or the user's code failed); 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NoReturn

import torch
from rich.text import Text

import dorafx
from dorafx._compat.dynamo import quiet_tracing_errors
from dorafx.bench.command import add_arguments, run_command
from dorafx.errors import DorafxError
from dorafx.quiet import quiet_imports

_DTYPES = ("float16", "bfloat16", "float32")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()  # a closed pipe raises here, not when Python exits
        return code
    except KeyboardInterrupt:
        print("dorafx: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of a pipe has closed it, as ``head`` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        # Not raised: a traceback gives exit code 1, which here means that the command ran.
        if options.debug:
            raise
        print(f"dorafx: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None and type(error).__module__.startswith("torch."):
        cause = cause.__cause__  # Dynamo wraps what the model raised
    if isinstance(getattr(cause, "inner_exception", None), Exception):
        return _one_line(cause.inner_exception)  # type: ignore[attr-defined]
    # Dynamo's first line says only that a shape computation failed; its error is quoted further down.
    quoted = re.search(r": got (\w+\(.*\))$", str(cause), re.MULTILINE)
    if quoted:
        return f"{quoted[1]} (--debug shows where)"
    first = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    if isinstance(cause, (DorafxError, OSError, ValueError, TypeError, ImportError)) and first:
        return first
    return f"{type(cause).__name__}: {first} (--debug shows where)"


class _Parser(argparse.ArgumentParser):
    """Reports an error in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    common = _Parser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of text")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = _Parser(prog="dorafx", description="DoRA at the price of LoRA.")
    parser.add_argument("--version", action="version", version=f"dorafx {dorafx.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo", parents=[common], help="measure a small stock PEFT model with and without dorafx"
    )
    demo.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if torch can use one)")
    demo.add_argument("--hidden", type=int, help="hidden size (default 1024; more on a GPU)")
    demo.add_argument("--layers", type=int, help="decoder layers (default 1; 2 on a GPU)")
    demo.add_argument("--rank", type=int, help="rank of the adapters (default 128)")
    demo.add_argument(
        "--tokens", type=int, help="tokens of the prefill and a training step (default 256; more on a GPU)"
    )
    demo.add_argument("--repeats", type=int, default=3, help="timed calls a figure (default 3)")
    demo.add_argument("--out", type=Path, default=Path("dorafx-demo"), help="folder for log, report and results")
    demo.set_defaults(run=_demo)

    explain = commands.add_parser("explain", parents=[common], help="say what dorafx would do with a model of yours")
    explain.add_argument(
        "target",
        help="FILE.py:CALLABLE, which returns a model, or (model, args) or (model, args, kwargs) to call it with; or the "
        "folder of a PEFT adapter",
    )
    adapter = explain.add_argument_group("for the folder of an adapter (no weights are read or downloaded)")
    adapter.add_argument(
        "--base", type=Path, help="folder with the base model's config.json (default: in or beside it)"
    )
    adapter.add_argument("--tokens", type=int, default=256, help="length of the sequence (default 256)")
    adapter.add_argument("--train", action="store_true", help="as in training: dropout and gradients")
    adapter.add_argument("--random-weights", action="store_true", help="make weights, if a model cannot do without")
    explain.add_argument(
        "--terms",
        action="store_true",
        help="also print what each site computes, and the form that a near miss is close to",
    )
    explain.add_argument("--html", type=Path, help="also write the report, with a picture of each distinct layer")
    explain.set_defaults(run=_explain)

    check = commands.add_parser("check", parents=[common], help="check a DoRA adapter on disk against its base")
    check.add_argument(
        "adapter",
        help="folder that PEFT saved, or a safetensors file of PEFT, diffusers, sd-scripts or LyCORIS",
    )
    check.add_argument(
        "--base",
        help="the base's folder or safetensors file (default: what adapter_config.json names, if it is a folder)",
    )
    check.add_argument(
        "--dtype",
        choices=_DTYPES,
        help="in which the layers will compute (default: the wider one of base weight and factors)",
    )
    check.set_defaults(run=_check)

    bench = commands.add_parser(
        "bench", parents=[common], help="measure dorafx beside PEFT, dense and factored norms, LoRA and merged weights"
    )
    add_arguments(bench)
    bench.set_defaults(run=run_command)

    report = commands.add_parser("report", parents=[common], help="turn a log into an HTML page")
    report.add_argument("log", type=Path, help="a log's JSON, or the JSON lines that DORAFX_LOG collects")
    report.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="the page (default report.html)")
    report.set_defaults(run=_report)

    doctor = commands.add_parser("doctor", parents=[common], help="check this installation; paste it into a bug report")
    doctor.set_defaults(run=_doctor)
    return parser


def _demo(options: argparse.Namespace) -> int:
    from .demo import choose_setting, run_demo

    if options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, not {options.repeats}")
    sizes = {name: getattr(options, name) for name in ("hidden", "layers", "rank", "tokens")}
    run_demo(choose_setting(options.device, **sizes), options.out, options.repeats, options.json)
    return 0


def _explain(options: argparse.Namespace) -> int:
    from dorafx import explain

    from .targets import adapter_target, script_target

    if not options.debug:
        quiet_tracing_errors()
        warnings.simplefilter("ignore", FutureWarning)  # of PEFT about transformers, nothing that the user can change
    # Output of the model's code must not mix with the JSON.
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        if Path(options.target).is_dir():
            target = adapter_target(
                Path(options.target), options.base, options.tokens, options.train, options.random_weights
            )
        else:
            target = script_target(options.target)
        explanation = explain(target.model, *target.args, **target.kwargs)
    if options.html is not None:
        explanation.log.to_html(options.html)
    if options.json:
        terms = {"terms": [asdict(t) for t in explanation.terms]} if options.terms else {}
        print(json.dumps({**explanation.to_dict(), **terms, **json.loads(explanation.log.to_json())}, indent=1))
    else:
        explanation.print(terms=options.terms)
    if target.note:
        print(f"note: {target.note}", file=sys.stderr)
    return 1 if explanation.misses else 0


def _check(options: argparse.Namespace) -> int:
    from dorafx.preflight import check_files

    dtype = None if options.dtype is None else getattr(torch, options.dtype)
    for name in ("adapter", "base"):
        if getattr(options, name) == "":
            raise ValueError(f"{name} is empty: give a folder or a safetensors file")
    base = None if options.base is None else Path(options.base)
    report = check_files(Path(options.adapter), base, dtype)
    if options.json:
        print(json.dumps(report.to_dict(), indent=1))
    else:
        report.print()
    return 0 if report.clean else 1


def _report(options: argparse.Namespace) -> int:
    from dorafx.log import RewriteLog

    try:
        log = RewriteLog.from_json(options.log.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{options.log}: not a dorafx log: not UTF-8 text ({error.reason})") from error
    except ValueError as error:
        raise ValueError(f"{options.log}: {error}") from error
    page = log.to_html(options.output)
    summary = {"report": str(page), "rewritten": len(log.rewrites), "missed": len(log.misses)}
    print(
        json.dumps(summary) if options.json else f"{page}: {summary['rewritten']} rewritten, {summary['missed']} missed"
    )
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from rich.console import Console

    from .doctor import HOW_TO_REPORT, bug_report, examine

    with quiet_imports():
        checks = examine()
    failed = [check for check in checks if not check.passed]
    if options.json:
        answer = {
            "passed": not failed,
            "checks": [asdict(c) for c in checks],
            "bug_report": bug_report(checks),
            "how_to_report": HOW_TO_REPORT,
        }
        print(json.dumps(answer, indent=1))
        return 1 if failed else 0
    console = Console(highlight=False, soft_wrap=True)
    group = ""
    for check in checks:
        if check.group != group:
            group = check.group
            console.print(Text(group, style="bold"))
        console.print(
            Text.assemble(
                (f"  {check.mark:4}", "green" if check.passed else "bold red"), f"  {check.name}: {check.detail}"
            )
        )
    verdict = f"{len(failed)} of {len(checks)} checks failed" if failed else f"all {len(checks)} checks passed"
    console.print(Text(verdict, style="bold red" if failed else "bold green"))
    print(f"\nPaste this into a bug report:\n\n{bug_report(checks)}\n\n{HOW_TO_REPORT}")
    return 1 if failed else 0
