"""The command line: ``dorafx {demo, explain, bench, report, doctor}``.

Exit codes: 0 done; 1 it ran and the answer is no (``explain`` found misses, ``doctor`` found a failure, a configuration of
``bench`` failed); 2 it could not run (wrong input, or the code it was given failed); 130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dorafx
from dorafx import _compat
from dorafx.bench.command import add_arguments, run_command
from dorafx.errors import DorafxError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except KeyboardInterrupt:
        print("dorafx: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # A traceback would end in exit code 1, which here means that the command ran.
        if options.debug:
            raise
        print(f"dorafx: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    cause: BaseException = error
    while cause.__cause__ is not None and type(error).__module__.startswith("torch."):
        cause = cause.__cause__  # Dynamo wraps what the model raised
    # Dynamo's own first line says only that a shape computation failed; what failed is quoted further down.
    quoted = re.search(r": got (\w+\(.*\))$", str(cause), re.MULTILINE)
    if quoted:
        return f"{quoted[1]} (--debug shows where)"
    first = next((line.strip() for line in str(cause).splitlines() if line.strip()), "")
    if isinstance(cause, (DorafxError, OSError, ValueError, TypeError, ImportError)) and first:
        return first
    return f"{type(cause).__name__}: {first} (--debug shows where)"


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of text")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(prog="dorafx", description="DoRA at the price of LoRA.")
    parser.add_argument("--version", action="version", version=f"dorafx {dorafx.__version__}")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo", parents=[common], help="measure a small stock PEFT model with and without dorafx"
    )
    demo.add_argument("--hidden", type=int, default=1024, help="hidden size (default 1024)")
    demo.add_argument("--layers", type=int, default=1, help="decoder layers (default 1)")
    demo.add_argument("--rank", type=int, default=128, help="rank of the adapters (default 128)")
    demo.add_argument("--tokens", type=int, default=256, help="tokens of the prefill and a training step (default 256)")
    demo.add_argument("--repeats", type=int, default=3, help="timed calls a figure (default 3)")
    demo.add_argument("--out", type=Path, default=Path("dorafx-demo"), help="folder for log, report and results")
    demo.set_defaults(run=_demo)

    explain = commands.add_parser("explain", parents=[common], help="say what dorafx would do with a model of yours")
    explain.add_argument(
        "target", help="FILE.py:CALLABLE; it returns a model, or (model, args) or (model, args, kwargs) to call it with"
    )
    explain.set_defaults(run=_explain)

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
    from dorafx.demo import Size, run_demo

    if options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, not {options.repeats}")
    size = Size(options.hidden, options.layers, options.rank, options.tokens)
    run_demo(size, options.out, options.repeats, options.json)
    return 0


def _load(target: str) -> Any:
    path, separator, name = target.rpartition(":")
    if not separator or not path.endswith(".py"):
        raise ValueError(f"{target!r} is not of the form FILE.py:CALLABLE")
    if not Path(path).is_file():
        raise ValueError(f"there is no file {path!r}")
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec is not None
    assert spec.loader is not None
    # Dataclasses and Dynamo look a function's module up in sys.modules; a name that is taken must stay as it is.
    if spec.name in sys.modules:
        spec.name = f"{spec.name}_explained"
        spec.loader.name = spec.name  # type: ignore[attr-defined]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(spec.name, None)
        raise
    if not callable(getattr(module, name, None)):
        own = (n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__)
        known = [n for n in own if not n.startswith("_")]
        raise ValueError(f"{path} has no callable {name!r}; it has {', '.join(known) or 'none'}")
    return getattr(module, name)


def _call(target: str, made: Any) -> tuple[Any, Sequence[Any], Mapping[str, Any]]:
    """What to call and with what, from what the user's callable returned."""
    parts = made if isinstance(made, tuple) else (made,)
    if not 1 <= len(parts) <= 3 or not callable(parts[0]):
        raise TypeError(f"{target} must return a model, (model, args) or (model, args, kwargs), not {made!r:.60}")
    model, args, kwargs = (*parts, *((), {})[len(parts) - 1 :]) if len(parts) < 3 else parts
    if not isinstance(args, (tuple, list)):
        raise TypeError(f"{target}: args must be a tuple, not {type(args).__name__}")
    if not isinstance(kwargs, Mapping):
        raise TypeError(f"{target}: kwargs must be a dict, not {type(kwargs).__name__}")
    return model, args, kwargs


def _explain(options: argparse.Namespace) -> int:
    from dorafx import explain

    if not options.debug:
        _compat.quiet_tracing_errors()
    # What the model's code prints must not end up in the middle of the JSON.
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        model, args, kwargs = _call(options.target, _load(options.target)())
        explanation = explain(model, *args, **kwargs)
    if options.json:
        fields = {"graphs": explanation.graph_count, "breaks": explanation.break_reasons}
        print(json.dumps({**fields, **json.loads(explanation.log.to_json())}, indent=1))
    else:
        print(explanation)
    return 1 if explanation.misses else 0


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
    from dorafx.doctor import examine

    checks = examine()
    if options.json:
        print(json.dumps([check.to_dict() for check in checks], indent=1))
    else:
        for check in checks:
            print(f"{check.mark:4}  {check.name}: {check.detail}")
    return 0 if all(check.passed for check in checks) else 1
