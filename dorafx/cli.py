"""The command line: ``dorafx {demo, explain, report, doctor}``.

Exit codes: 0 done; 1 it ran and the answer is no (``explain`` found misses, ``doctor`` found a failure); 2 wrong input.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dorafx.errors import DorafxError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        code: int = options.run(options)
        return code
    except (DorafxError, OSError, ValueError, TypeError, ImportError) as error:
        if options.debug:
            raise
        print(f"dorafx: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="print JSON instead of text")
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(prog="dorafx", description="DoRA at the price of LoRA.")
    commands = parser.add_subparsers(required=True, metavar="command")

    demo = commands.add_parser(
        "demo", parents=[common], help="measure a small stock PEFT model with and without dorafx"
    )
    demo.add_argument("--hidden", type=int, default=1024, help="hidden size (default 1024)")
    demo.add_argument("--layers", type=int, default=2, help="decoder layers (default 2)")
    demo.add_argument("--rank", type=int, default=128, help="rank of the adapters (default 128)")
    demo.add_argument("--tokens", type=int, default=256, help="tokens of the prefill and a training step (default 256)")
    demo.add_argument("--repeats", type=int, default=3, help="timed calls a figure (default 3)")
    demo.add_argument("--out", type=Path, default=Path("dorafx-demo"), help="folder for log, report and results")
    demo.set_defaults(run=_demo)

    explain = commands.add_parser("explain", parents=[common], help="say what dorafx would do with a model of yours")
    explain.add_argument(
        "target", help="FILE.py:CALLABLE; the callable returns (model, args) or (model, args, kwargs) to call it with"
    )
    explain.set_defaults(run=_explain)

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
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec.loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        known = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
        raise ValueError(f"{path} has no callable {name!r}; it has {', '.join(known) or 'none'}")
    return getattr(module, name)


def _explain(options: argparse.Namespace) -> int:
    from dorafx import explain

    made = _load(options.target)()
    if not isinstance(made, tuple) or len(made) not in (2, 3):
        raise TypeError(
            f"{options.target} must return (model, args) or (model, args, kwargs), not {type(made).__name__}"
        )
    model, args, *rest = made
    explanation = explain(model, *args, **(rest[0] if rest else {}))
    if options.json:
        fields = {"graphs": explanation.graph_count, "breaks": explanation.break_reasons}
        print(json.dumps({**fields, **json.loads(explanation.log.to_json())}, indent=1))
    else:
        print(explanation)
    return 1 if explanation.misses else 0


def _report(options: argparse.Namespace) -> int:
    from dorafx.log import RewriteLog

    log = RewriteLog.from_json(options.log.read_text(encoding="utf-8"))
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
