"""Write results/RESULTS.md from the JSON files beside it: what is reached of what dorafx wants to reach, then every figure.

    python examples/benchmarks/page.py [FOLDER]

The files are what ``examples/benchmarks/cpu.sh`` and ``gpu.sh`` leave: ``dorafx bench -o``, ``dorafx demo`` and ``parity.py``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dorafx.bench.results import Results, Row
from dorafx.bench.table import human, markdown

RESULTS = Path(__file__).resolve().parent / "results"

HEAD = """# Measured

Written by `python examples/benchmarks/page.py` from the JSON files beside this page, which `examples/benchmarks/cpu.sh` measures: two
cores of a shared virtual machine, so single medians scatter by a tenth or more; the quartiles say how much. Nothing has been measured
on a GPU: `examples/benchmarks/gpu.sh` does that.
"""


class Verdict(NamedTuple):
    """What was measured of a wanted figure, and whether it is reached; None where nothing was measured."""

    measured: str
    reached: bool | None


Files = dict[str, Any]
UNMEASURED = Verdict("", None)


def rows(files: Files, suite: str, name: str, case: str = "") -> list[Row]:
    """The rows of a suite's implementation, of all files (of one case: where its name begins so)."""
    found = [row for results in files.values() if isinstance(results, Results) for row in results.rows]
    dense = [row for row in found if row.parameters.get("weights", "dense") == "dense"]
    return [r for r in dense if (r.suite, r.name) == (suite, name) and r.case.startswith(case) and not r.error]


def ratio(files: Files, suite: str, metric: str, peer: str, most: float, least: float = 0.0) -> Verdict:
    """dorafx's median over a peer's (with ``least``: the peer's over dorafx's), the worst of all cases."""
    ours = {row.case: row.metrics[metric].median for row in rows(files, suite, "dorafx") if metric in row.metrics}
    theirs = {row.case: row.metrics[metric].median for row in rows(files, suite, peer) if metric in row.metrics}
    shared = ours.keys() & theirs.keys()
    if not shared:
        return UNMEASURED
    if least:
        fewest = min(theirs[case] / ours[case] for case in shared)
        return Verdict(f"{fewest:.1f}x", fewest >= least)
    worst = max(ours[case] / theirs[case] for case in shared)
    return Verdict(f"{worst:.2f}x", worst <= most)


def at_most(files: Files, suite: str, metric: str, case: str, most: float) -> Verdict:
    """dorafx's median, the best of the ways to compute it that were measured."""
    found = [row.metrics[metric] for row in rows(files, suite, "dorafx", case) if metric in row.metrics]
    if not found:
        return UNMEASURED
    best = min(found, key=lambda figure: figure.median)
    return Verdict(human(best.median, best.unit), best.median <= most)


def largest_allocation(files: Files) -> Verdict:
    """Of all norms, the largest allocation as a share of the weight's bytes."""
    found = [
        row.metrics["largest allocation"].median / (row.parameters["d_out"] * row.parameters["d_in"] * 4)
        for row in rows(files, "norm", "dorafx")
        if "largest allocation" in row.metrics
    ]
    return Verdict(f"{max(found):.4f} of the weight", max(found) < 1 / 8) if found else UNMEASURED


def deepest_pass(files: Files) -> Verdict:
    found = rows(files, "pass", "dorafx", "64 layers")
    seconds = max((row.metrics["pass"].median for row in found), default=None)
    return UNMEASURED if seconds is None else Verdict(human(seconds, "s"), seconds <= 3.0)


def linear_pass(files: Files) -> Verdict:
    """Time a node at the greatest depth over that at the least."""
    found = {row.metrics["nodes"].median: row.metrics["pass a node"].median for row in rows(files, "pass", "dorafx")}
    if len(found) < 2:
        return UNMEASURED
    growth = found[max(found)] / found[min(found)]
    return Verdict(f"{growth:.2f}x the time a node at {max(found) / min(found):.1f}x the nodes", growth <= 1.25)


def share_of_compilation(files: Files) -> Verdict:
    shares = [row.metrics.get("share of the pass") for row in rows(files, "compile", "dorafx")]
    found = [share.median for share in shares if share is not None]
    return Verdict(f"at most {max(found):.1%}", max(found) <= 0.05) if found else UNMEASURED


def growth_of_compilation(files: Files) -> Verdict:
    """How much longer the deepest model takes than the shallowest, where every adapter layer is compiled by itself."""
    scoped = {n: r for n, r in files.items() if isinstance(r, Results) and r.settings.get("scope") == "auto"}
    found = {
        int(row.parameters["size"]["layers"]): row.metrics["compilation"].median
        for row in rows(scoped, "compile", "dorafx")
    }
    if len(found) < 2:
        return UNMEASURED
    few, many = min(found), max(found)
    growth = found[many] / found[few]
    return Verdict(f"{growth:.2f}x from {few} to {many} layers", growth < many / few / 4)


def losses(files: Files) -> Verdict:
    document = files.get("cpu-parity")
    return UNMEASURED if document is None else Verdict(f"{document['mean']:.1e}", document["mean"] < document["limit"])


CPU: dict[str, tuple[str, Callable[[Files], Verdict]]] = {
    "training step, hidden 1024, r128, 1024 tokens, against plain LoRA": (
        "at most 1.10x",
        lambda f: ratio(f, "model", "training step", "lora", 1.10),
    ),
    "prefill, the same": ("at most 1.15x", lambda f: ratio(f, "model", "prefill", "lora", 1.15)),
    "a token of `generate()`, dynamic cache, against plain LoRA": (
        "at most 1.05x",
        lambda f: ratio(f, "generate", "a token, dynamic cache", "lora", 1.05),
    ),
    "the same, static cache": ("at most 1.05x", lambda f: ratio(f, "generate", "a token, static cache", "lora", 1.05)),
    "a token of `generate()`, dynamic cache, faster than stock PEFT": (
        "at least 10x",
        lambda f: ratio(f, "generate", "a token, dynamic cache", "peft", 0, 10),
    ),
    "the same, static cache faster than stock": (
        "at least 10x",
        lambda f: ratio(f, "generate", "a token, static cache", "peft", 0, 10),
    ),
    "one token, the whole forward compiled, against plain LoRA": (
        "at most 1.05x",
        lambda f: ratio(f, "decode", "one token", "lora", 1.05),
    ),
    "the same, faster than stock PEFT": ("at least 10x", lambda f: ratio(f, "decode", "one token", "peft", 0, 10)),
    "largest single allocation made for a norm": ("less than 1/8 of the weight", largest_allocation),
    "extra FLOPs over LoRA where norms are computed; where reused": (
        "2·d_out·d_in·r a module; none",
        lambda f: Verdict("exactly that (`tests/zoo/test_cost.py`)", True),
    ),
    "the pass (lift to rewrite), 64 layers as one graph": ("at most 3 s", deepest_pass),
    "the pass is linear in nodes": ("at most 1.25x a node", linear_pass),
    "the pass as a share of compilation": ("at most 5 %", share_of_compilation),
    "compilation, adapter layer by adapter layer": (
        "grows less than a quarter as fast as depth",
        growth_of_compilation,
    ),
    "difference of a step's losses from stock PEFT's, mean of 2000 steps and three seeds": ("less than 7.1e-4", losses),
}

GPU: dict[str, tuple[str, Callable[[Files], Verdict]]] = {
    "norm 8192x8192 r384 (bf16)": (
        "at most 0.13 ms (H200)",
        lambda f: at_most(f, "norm", "time", "8192x8192 r384", 1.3e-4),
    ),
    "norm 8192x28672 r384": ("at most 0.46 ms (H200)", lambda f: at_most(f, "norm", "time", "8192x28672 r384", 4.6e-4)),
    "norm 4096x4096 r16": ("at most 0.02 ms (H200)", lambda f: at_most(f, "norm", "time", "4096x4096 r16", 2e-5)),
    "transient memory of the norm 8192x8192 r384": (
        "at most 16 MB",
        lambda f: at_most(f, "norm", "temporaries", "8192x8192 r384", 16e6),
    ),
    "composition 8192x8192, forward": ("at most 110 us (H200)", lambda f: at_most(f, "compose", "forward", "", 1.1e-4)),
    "the same with backward": (
        "at most 500 us (H200)",
        lambda f: at_most(f, "compose", "forward + backward", "", 5e-4),
    ),
    "32B-shaped model, r384, 4096 tokens, against stock PEFT: inference": (
        "at least 4x faster",
        lambda f: ratio(f, "model", "prefill", "peft", 0, 4),
    ),
    "the same, gradients": ("at least 3x faster", lambda f: ratio(f, "model", "training step", "peft", 0, 3)),
    "one token, against stock PEFT": ("at least 8x faster", lambda f: ratio(f, "decode", "one token", "peft", 0, 8)),
    "training step, against plain LoRA": ("at most 1.08x", lambda f: ratio(f, "model", "training step", "lora", 1.08)),
    "prefill, against plain LoRA": ("at most 1.12x", lambda f: ratio(f, "model", "prefill", "lora", 1.12)),
    "one token, against plain LoRA": ("at most 1.05x", lambda f: ratio(f, "decode", "one token", "lora", 1.05)),
    "one token, against merged weights (hidden 5120, r384)": (
        "at most 1 + 1.2·r(d_in+d_out)/(d_in·d_out) = 1.18x",
        lambda f: ratio(f, "decode", "one token", "merged", 1 + 1.2 * 384 * 2 / 5120),
    ),
    "peak memory of a training step, 32B-shaped, against plain LoRA": (
        "at most 1.02x",
        lambda f: ratio(f, "memory", "peak", "lora", 1.02),
    ),
}


def targets(files: Files) -> Iterable[str]:
    """A table for each kind of device; its figures come from the files that are named after it."""
    words = {True: "reached", False: "not reached", None: "unmeasured"}
    for kind, title, wanted in (("cpu-", "on a CPU, 2 cores, fp32", CPU), ("gpu-", "on a CUDA GPU", GPU)):
        of_kind = {stem: content for stem, content in files.items() if stem.startswith(kind)}
        yield f"| {title} | wanted | measured | |"
        yield "|---|---|---|---|"
        for what, (want, measure) in wanted.items():
            verdict = measure(of_kind)
            yield f"| {what} | {want} | {verdict.measured} | {words[verdict.reached]} |"
        yield ""


def section(title: str, said: str, heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> Iterable[str]:
    """A heading, a paragraph, and a table whose columns but the first are numbers."""
    first, *numbers = heads
    yield from (f"### {title}", "", said, "")
    yield f"| {' | '.join((first, *numbers))} |".replace("|  |", "| |")
    yield f"|---|{'---:|' * len(numbers)}"
    for cells in rows:
        yield f"| {' | '.join(map(str, cells))} |"


def demo(document: dict[str, Any]) -> Iterable[str]:
    size = document["size"]
    said = (
        f"One stock PEFT Llama layer, hidden {size['hidden']}, rank {size['rank']}, {size['tokens']} tokens, fp32, {document['threads']} threads, "
        f"torch {document['torch']}."
    )
    heads = ("", "one token", "prefill", "training step", "peak memory", "graphs", "graph breaks")
    rows = []
    for r in document["results"]:
        times = [human(r[key], "s") for key in ("decode", "prefill", "step")]
        apart = f"{r['max_difference']:.1e}" if r.get("max_difference") else ""
        rows.append((r["name"], *times, human(r["peak_memory"], "B"), r["graphs"], r["breaks"], apart))
    return section("`dorafx demo`", said, (*heads, "difference of logits from stock"), rows)


def parity(document: dict[str, Any]) -> Iterable[str]:
    settings = document["settings"]
    said = (
        f"`python examples/benchmarks/parity.py --rate {settings['rate']:g}`: {settings['steps']} steps of DoRA from one trained base model of "
        f"{document['seeds'][0]['parameters'] / 1e6:.1f} million parameters, {settings['dtype']}, by stock PEFT and by dorafx "
        "([plot](cpu-parity.png))."
    )
    heads = ("seed", "mean difference of a step's losses", "largest", "of the last hundred steps' means")
    rows = [
        (seed["seed"], *(f"{seed['difference'][key]:.1e}" for key in ("mean", "largest", "of the end")))
        for seed in document["seeds"]
    ]
    return section("Training losses beside stock PEFT's", said, heads, rows)


def page(folder: Path) -> str:
    """The page's text."""
    files: Files = {}
    for path in sorted(folder.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        files[path.stem] = Results.from_json(text) if '"dorafx bench"' in text[:200] else json.loads(text)
    lines = [HEAD, *targets(files)]
    for stem, content in files.items():
        if isinstance(content, Results):
            lines += [f"## {stem}.json", "", markdown(content)]
    for stem, told in (("cpu-demo", demo), ("cpu-parity", parity)):
        if stem in files:
            lines += [f"## {stem}.json", "", *told(files[stem]), ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, nargs="?", default=RESULTS, help="where the JSON files are (default: results)"
    )
    folder = parser.parse_args().folder
    (folder / "RESULTS.md").write_text(page(folder), encoding="utf-8")
    print(f"{folder / 'RESULTS.md'} is written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
