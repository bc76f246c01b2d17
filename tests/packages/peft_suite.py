"""Run PEFT's own tests of DoRA without dorafx and with it, and say where the outcomes differ.

    python tests/packages/peft_suite.py PATH/TO/peft/tests/test_custom_models.py … [--keyword "dora"] [--codegen inductor]

Nothing is fetched: the files are those of a checkout of PEFT, of the version that is installed. Exit code 1 if a test passes without
dorafx and does not pass with it, 2 if no test ran. The tests that pass neither way (most need a model hub) are counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

SUPPORT = Path(__file__).parents[1] / "support"


def outcomes(files: list[str], keyword: str, dorafx: dict[str, str] | None, processes: str) -> dict[str, str]:
    """``passed``, ``failed`` or ``skipped`` of each test, in a process of its own.

    Args:
        files: test files of PEFT.
        keyword: pytest's ``-k``.
        dorafx: the environment of the plugin; None to leave dorafx out.
        processes: pytest-xdist's ``-n``.
    """
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", *files, "-k", keyword, f"--junitxml={report}"]
        command += ["-o", "addopts=", "-p", "no:cacheprovider", "-n", processes, "--continue-on-collection-errors"]
        command += [] if dorafx is None else ["-p", "peft_with_dorafx"]
        path = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path, **(dorafx or {})}
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        if not report.exists():
            raise SystemExit(f"pytest did not run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
        cases = ElementTree.parse(report).iter("testcase")
        return {f"{case.get('classname')}::{case.get('name')}": _outcome(case) for case in cases}


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", help="test files of PEFT")
    parser.add_argument("--keyword", default="dora", help="pytest's -k (default: dora)")
    parser.add_argument("--codegen", default="eager", help="dorafx's codegen (default: eager)")
    parser.add_argument("--processes", default="0", help="pytest-xdist's -n (default: 0; counts need 0)")
    arguments = parser.parse_args()
    missing = [file for file in arguments.files if not Path(file).exists()]
    if missing:
        parser.error(f"no such file: {', '.join(missing)}")
    stock = outcomes(arguments.files, arguments.keyword, None, arguments.processes)
    with tempfile.TemporaryDirectory() as folder:
        counts = Path(folder) / "counts.json"
        environment = {"PEFT_DORAFX_CODEGEN": arguments.codegen, "PEFT_DORAFX_COUNTS": str(counts)}
        ours = outcomes(arguments.files, arguments.keyword, environment, arguments.processes)
        if counts.exists():
            print("with dorafx:", counts.read_text(encoding="utf-8"))
    passed = {name for name, outcome in stock.items() if outcome == "passed"}
    worse = sorted(name for name in passed if ours.get(name) != "passed")
    for name in worse:
        print(f"passes without dorafx only ({ours.get(name, 'not run')}): {name}")
    better = sum(outcome == "passed" and stock.get(name) != "passed" for name, outcome in ours.items())
    print(
        json.dumps(
            {
                "tests": len(stock),
                "passed without dorafx": len(passed),
                "of these passed with it": len(passed) - len(worse),
                "passed with dorafx only": better,
            }
        )
    )
    return 2 if not passed else int(bool(worse))


if __name__ == "__main__":
    sys.exit(main())
