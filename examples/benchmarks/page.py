"""Write ../guide/results.md from the JSON files of results: what is reached of what dorafx wants to reach, then every figure; and
README.md's table and picture of what dorafx gains. What has no file is unmeasured.

    python examples/benchmarks/page.py [FOLDER] [--readme FILE]

The files are what ``examples/benchmarks/cpu.sh`` and ``dorafx bench gpu`` leave: ``dorafx bench -o``, ``dorafx demo`` and
``parity.py``. README.md is written only for the folder of this repository, or where it is named.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dorafx.bench.results import Metric, Results, Row
from dorafx.bench.table import human, markdown

RESULTS = Path(__file__).resolve().parent / "results"
PAGE = RESULTS.parents[1] / "guide" / "results.md"
PICTURE = RESULTS.parents[1] / "guide" / "images" / "gains.png"
README = RESULTS.parents[2] / "README.md"

HEAD = """# Results

Every figure that was measured: first what dorafx wants to reach and whether it does, then a table for each file of
results. For anybody who doubts a number. [Benchmarks](benchmarks.md) says how to measure it again and how to read the tables.

The CPU is two cores of a shared virtual machine: single medians scatter by a tenth or more, and the quartiles say how
much. `examples/benchmarks/cpu.sh` measures these files, [`dorafx bench gpu`](benchmarks-gpu.md) those of a GPU.
Written by `python examples/benchmarks/page.py` from `examples/benchmarks/results`.
"""

BEGIN = "<!-- measured: written by python examples/benchmarks/page.py -->"
END = "<!-- end of what was measured -->"
NOTHING = "Nothing has been measured on a GPU; `dorafx bench gpu --budget 300` does that."


class Verdict(NamedTuple):
    """What was measured of a wanted figure, and whether it is reached; None where nothing was measured."""

    measured: str
    reached: bool | None


Files = dict[str, Any]
UNMEASURED = Verdict("", None)


def rows(files: Files, suite: str, name: str, case: str = "") -> list[Row]:
    """The rows of a suite's implementation, of all files, of dense weights and factors like them (of one case: where its name
    begins so)."""
    found = [row for results in files.values() if isinstance(results, Results) for row in results.rows]
    dense = [r for r in found if r.parameters.get("weights", "dense") == "dense" and "factors" not in r.parameters]
    return [r for r in dense if (r.suite, r.name) == (suite, name) and r.case.startswith(case) and not r.error]


def ratios(files: Files, suite: str, metric: str, peer: str) -> dict[str, float]:
    """By case, dorafx's median over a peer's: both of one run, the last one that has the case. ``metric`` is how its name begins."""
    found: dict[str, float] = {}
    runs = [(stem, content) for stem, content in files.items() if isinstance(content, Results)]
    for stem, results in sorted(runs, key=lambda run: run[1].environment.get("time", "")):
        medians: list[dict[str, float]] = [
            {
                row.case: figure.median
                for row in rows({stem: results}, suite, name)
                for key, figure in row.metrics.items()
                if key == metric or (key.startswith(f"{metric}, ") and not key.endswith(", host"))
            }
            for name in ("dorafx", peer)
        ]
        ours, theirs = medians
        found.update({case: ours[case] / theirs[case] for case in ours if case in theirs})
    return found


def ratio(files: Files, suite: str, metric: str, peer: str, most: float, least: float = 0.0) -> Verdict:
    """dorafx's median over a peer's (with ``least``: the peer's over dorafx's), the worst of all cases."""
    found = ratios(files, suite, metric, peer).values()
    if not found:
        return UNMEASURED
    worst = max(found)
    if least:
        return Verdict(f"{1 / worst:.1f}x", 1 / worst >= least)
    return Verdict(f"{worst:.2f}x", worst <= most)


def cosine(files: Files, least: float) -> Verdict:
    """Of all models, the least cosine of dorafx's logits and stock PEFT's."""
    figures = [row.metrics.get("cosine of logits") for row in rows(files, "model", "dorafx")]
    found = [figure.median for figure in figures if figure is not None]
    return Verdict(f"{min(found):.6f}", min(found) > least) if found else UNMEASURED


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


def of_the_host(files: Files, scope: str, most: float) -> Verdict:
    """A token of a model so small that the device waits for the host, over plain LoRA's in the same scope."""
    found = [r for case, r in ratios(files, "host", "one token", "lora").items() if case.endswith(f", {scope}")]
    return Verdict(f"{max(found):.2f}x", max(found) <= most) if found else UNMEASURED


def of_memory(files: Files, metric: str, most: float) -> Verdict:
    """Bytes of a model's training step over plain LoRA's."""
    found = [r for case, r in ratios(files, "memory", metric, "lora").items() if case.startswith("hidden ")]
    return Verdict(f"{max(found):.2f}x", max(found) <= most) if found else UNMEASURED


def default_scope(files: Files, most: float) -> Verdict:
    """The same in the scope that ``optimize`` chooses, over the fastest scope."""
    found = {
        row.case.split(", ")[-1]: row.metrics["one token"].median
        for row in rows(files, "host", "dorafx")
        if "one token" in row.metrics
    }
    if "block by block" not in found:
        return UNMEASURED
    share = found["block by block"] / min(found.values())
    return Verdict(f"{share:.2f}x", share <= most)


def growth_of_compilation(files: Files, scope: str) -> Verdict:
    """How much longer the deepest model takes than the shallowest, where it is compiled in parts."""
    scoped = {n: r for n, r in files.items() if isinstance(r, Results) and r.settings.get("scope") == scope}
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
        "at most 1.05x",
        lambda f: ratio(f, "model", "training step", "lora", 1.05),
    ),
    "a step of 4 such micro-batches": (
        "at most 1.02x",
        lambda f: ratio(f, "model", "step of 4 micro-batches", "lora", 1.02),
    ),
    "first prefill, 1024 tokens": ("at most 1.12x", lambda f: ratio(f, "model", "first prefill", "lora", 1.12)),
    "prefill repeated": ("at most 1.03x", lambda f: ratio(f, "model", "prefill", "lora", 1.03)),
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
    "bytes saved for the backward, two layers as one graph, against plain LoRA": (
        "at most 1.12x",
        lambda f: of_memory(f, "saved", 1.12),
    ),
    "peak of the same step": ("at most 1.05x", lambda f: of_memory(f, "peak", 1.05)),
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
        lambda f: growth_of_compilation(f, "modules"),
    ),
    "compilation, block by block": (
        "grows less than a quarter as fast as depth",
        lambda f: growth_of_compilation(f, "blocks"),
    ),
    "one token, 12 layers of hidden 64 on one thread, against plain LoRA: one graph": (
        "at most 1.05x",
        lambda f: of_the_host(f, "one graph", 1.05),
    ),
    "the same, block by block (the default)": ("at most 1.05x", lambda f: of_the_host(f, "block by block", 1.05)),
    "the same, adapter layer by adapter layer": (
        "at most 1.05x",
        lambda f: of_the_host(f, "adapter layer by adapter layer", 1.05),
    ),
    "the default scope there, against the fastest": ("at most 1.2x", lambda f: default_scope(f, 1.2)),
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
    "the same, gradients of 8 micro-batches": (
        "at least 3x faster",
        lambda f: ratio(f, "model", "gradients", "peft", 0, 3),
    ),
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
        lambda f: ratio(f, "model", "peak", "lora", 1.02),
    ),
    "logits beside stock PEFT's: cosine": ("more than 0.9999", lambda f: cosine(f, 0.9999)),
}


WORDS = {True: "reached", False: "not reached", None: "unmeasured"}


def measured_on(files: Files, cuda: bool) -> Files:
    """What was measured on a kind of device, without dry runs, whose sizes say nothing."""
    found: Files = {}
    for stem, content in files.items():
        if isinstance(content, Results):
            if content.settings.get("quick") or str(content.settings.get("device", "cpu")).startswith("cuda") != cuda:
                continue
        elif cuda:
            continue
        found[stem] = content
    return found


def targets(files: Files) -> Iterable[str]:
    """A table for each kind of device."""
    for cuda, title, wanted in ((False, "on a CPU, 2 cores, fp32", CPU), (True, "on a CUDA GPU, bf16", GPU)):
        of_kind = measured_on(files, cuda)
        yield f"| {title} | wanted | measured | |"
        yield "|---|---|---|---|"
        for what, (want, measure) in wanted.items():
            verdict = measure(of_kind)
            yield f"| {what} | {want} | {verdict.measured} | {WORDS[verdict.reached]} |"
        yield ""


NAMES = {
    "dorafx": "dorafx", "lora": "plain LoRA", "merged": "merged", "peft": "PEFT", "peft-inductor": "PEFT, Inductor",
    "dense": "dense `B·A`", "chunked": "factored chunks", "paper": "fork of arXiv:2603.22276", "axolotl": "axolotl's kernel",
    "product": "`W·Aᵀ` alone",
}  # fmt: skip
"""Implementations, in the order of a table's columns."""
SHOWN = (
    "time",
    "forward",
    "forward + backward",
    "prefill",
    "first prefill",
    "training step",
    "gradients",
    "peak",
    "one token",
)
"""How the names of the figures begin that the page shows of GPUs."""


def on_a_gpu(files: Files) -> Iterable[str]:
    """What the page says of GPUs: verdicts, then a line for each figure of each case, a column for each implementation."""
    measured = measured_on(files, cuda=True)
    if not measured:
        yield NOTHING
        return
    cards = dict.fromkeys(content.environment.get("device", "") for content in measured.values())
    versions = dict.fromkeys(
        f"torch {content.environment['versions'].get('torch', '?')}, Triton {content.environment['versions'].get('triton', '?')}"
        for content in measured.values()
    )
    yield (
        f"On {' and '.join(cards)} ({'; '.join(versions)}), bf16, as `dorafx bench gpu` measured it; ratios are taken within one run:"
    )
    yield from ("", "| | measured | wanted |", "|---|---|---|")
    verdicts = {what: (want, measure(measured)) for what, (want, measure) in GPU.items()}
    for what, (want, verdict) in verdicts.items():
        if verdict.reached is not None:
            yield f"| {what} | {verdict.measured} | {want}: {WORDS[verdict.reached]} |"
    unmeasured = [what for what, (_, verdict) in verdicts.items() if verdict.reached is None]
    if unmeasured:
        yield from ("", f"Not measured: {'; '.join(unmeasured)}.")
    for peer, said in (("dorafx", "DoRA through dorafx"), ("peft", "stock PEFT's DoRA")):
        told = list(over_lora(measured, peer))
        if told:
            yield from ("", f"{said} takes over plain LoRA: {'; '.join(told)}.")
    for content in measured.values():
        yield from table_of(content)


GAINED = (
    ("training step", ("model",), "training step"),
    ("prefill, parameters unchanged", ("model",), "prefill"),
    ("one token (decoding)", ("decode",), "one token"),
    ("peak memory of a training step", ("memory", "model"), "peak"),
)
"""Rows of README.md's table: what, the suites that measure it, the metric."""
COMPARED = ("peft", "dorafx", "lora")


class Gain(NamedTuple):
    """A row of README.md's table: a figure of each of ``COMPARED``, all of one run and case."""

    what: str
    case: str
    results: Results
    figures: list[Metric]


def gains(files: Files, cuda: bool) -> list[Gain]:
    """For each row of ``GAINED`` the first case that was measured with all of ``COMPARED``, of whole models before single layers."""
    found = []
    runs = [content for content in measured_on(files, cuda).values() if isinstance(content, Results)]
    for what, suites, metric in GAINED:
        candidates = []
        for results in runs:
            for suite in suites:
                by_name = {name: {r.case: r for r in rows({"": results}, suite, name)} for name in COMPARED}
                for case in by_name["dorafx"]:
                    figures = [by_name[name][case].metrics.get(metric) for name in COMPARED if case in by_name[name]]
                    present = [figure for figure in figures if figure is not None]
                    if len(present) == len(COMPARED):
                        candidates.append(Gain(what, case, results, present))
        if candidates:
            found.append(max(candidates, key=lambda gain: "layers" in gain.case))  # the first of the greatest
    return found


def best_gains(files: Files) -> list[Gain]:
    """Those on a GPU if one was measured, else those on a CPU."""
    return gains(files, cuda=True) or gains(files, cuda=False)


def what_you_get(files: Files) -> Iterable[str]:
    """README.md's table: on a GPU if one was measured, else on a CPU; the device is named once."""
    found = best_gains(files)
    if not found:
        yield "Nothing has been measured yet: `dorafx bench --help`."
        return
    on_gpu = bool(measured_on({"": found[0].results}, cuda=True))
    yield from ("| | stock PEFT | dorafx | plain LoRA |", "|---|---:|---:|---:|")
    for gain in found:
        cells = [human(figure.median, figure.unit) for figure in gain.figures]
        cells[1] = f"**{cells[1]}**"
        yield f"| {gain.what} | {' | '.join(cells)} |"
    environment = found[0].results.environment
    device = environment.get("device", "?") if on_gpu else f"{environment.get('threads', '?')} CPU cores"
    cases = " and ".join(dict.fromkeys(gain.case for gain in found))
    dtype = found[0].results.settings.get("dtype", "bf16" if on_gpu else "float32")
    how = "dorafx bench gpu" if on_gpu else "examples/benchmarks/cpu.sh"
    yield ""
    versions = environment.get("versions", {})
    yield f"Medians on {device}, torch {versions.get('torch', '?').partition('+')[0]}, {dtype}: {cases} (`{how}`)."
    first = [
        row.metrics["first prefill"]
        for row in found[0].results.rows
        if row.name == "dorafx" and "first prefill" in row.metrics
    ]
    after = f" A prefill after an adapter has changed takes {human(first[0].median, first[0].unit)}." if first else ""
    yield f"PEFT is eager, as its users run it; LoRA is compiled.{after}{'' if on_gpu else ' **Not measured on a GPU yet.**'}"
    demonstrated = {r["name"]: r for r in files.get("cpu-demo", {}).get("results", ())}
    alone, ours = (demonstrated.get(f"PEFT DoRA, {name}") for name in ("Inductor", "dorafx"))
    if not on_gpu and alone and ours:
        steps = [human(r["step"], "s") for r in (alone, ours)]
        yield (
            f"Compiling alone helps PEFT little: a training step of `dorafx demo` takes {steps[0]} by Inductor, in {alone['graphs']} graphs, "
            f"and {steps[1]} by dorafx, in {ours['graphs']}."
        )


def compared(files: Files) -> dict[str, list[str]]:
    """What the picture shows: of each row of the table the figures as they are printed, in the order of ``COMPARED``."""
    return {gain.what: [human(figure.median, figure.unit) for figure in gain.figures] for gain in best_gains(files)}


def draw(files: Files, path: Path) -> None:
    """README.md's picture: the table's figures as bars, a panel a row. The file says in its own metadata what it shows."""
    from matplotlib.figure import Figure

    from dorafx.bench.plot import STYLES

    found = best_gains(files)
    figure = Figure(figsize=(9, 1.9), layout="constrained")
    for axis, gain in zip(figure.subplots(1, len(found), squeeze=False)[0], found):
        for place, (name, value) in enumerate(zip(COMPARED, gain.figures)):
            colour, hatch = STYLES[name]
            bar = axis.barh(place, value.median, 0.75, color=colour, hatch=hatch, edgecolor="white", linewidth=0.5)
            axis.bar_label(bar, [f" {human(value.median, value.unit)}"], fontsize=8, padding=2)
        first = axis is figure.axes[0]
        axis.set_yticks(
            range(len(COMPARED)), [NAMES[name] for name in COMPARED] if first else [""] * len(COMPARED), fontsize=9
        )
        axis.set_title(
            gain.what.partition(",")[0].partition(" (")[0].replace(" of a training step", ""), loc="left", fontsize=9
        )
        axis.invert_yaxis()
        axis.set_xticks([])
        axis.set_xlim(0, 1.45 * max(value.median for value in gain.figures))
        axis.spines[["top", "right", "bottom"]].set_visible(False)
        axis.tick_params(length=0)
    figure.savefig(path, dpi=150, metadata={"Description": json.dumps(compared(files)), "Software": None})


def over_lora(files: Files, name: str) -> Iterable[str]:
    """``+x %`` over plain LoRA, of the model of users."""
    for metric in ("one token", "training step"):
        for case, mine in ratios(files, "overhead", metric, "lora").items():
            theirs = ratios(files, "overhead", metric, name).get(case) if name != "dorafx" else 1.0
            if theirs:
                yield f"{metric} {mine / theirs - 1:+.1%} ({case})"


def table_of(results: Results) -> Iterable[str]:
    """The medians of one run."""
    shown = [row for row in results.rows if row.metrics and row.suite != "tune"]
    lines = dict.fromkeys(
        (row.suite, row.case, metric)
        for row in shown
        for metric in row.metrics
        if any(metric == name or metric.startswith(f"{name}, ") for name in SHOWN) and not metric.endswith(", host")
    )
    names = [name for name in NAMES if any(row.name == name for row in shown)]
    if not lines or not names:
        return
    yield from ("", f"| | {' | '.join(NAMES[name] for name in names)} |", f"|---|{'---:|' * len(names)}")
    for suite, case, metric in lines:
        cells = []
        for name in names:
            found = [row.metrics.get(metric) for row in shown if (row.suite, row.case, row.name) == (suite, case, name)]
            figure = next((f for f in found if f is not None), None)
            cells.append("" if figure is None else human(figure.median, figure.unit))
        yield f"| {suite} {case}: {metric} | {' | '.join(cells)} |"


def with_region(text: str, lines: Iterable[str]) -> str:
    """A text whose marked region holds the lines.

    Raises:
        ValueError: the marks are not there, each once and in their order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in after or END in after:
        raise ValueError(f"there is no region between {BEGIN} and {END}")
    return "\n".join([before + BEGIN, *lines, END + after])


def read(folder: Path) -> Files:
    """The JSON files of a folder, by their names without the ending."""
    files: Files = {}
    for path in sorted(folder.glob("*.json")):
        text = path.read_text(encoding="utf-8")
        files[path.stem] = Results.from_json(text) if '"dorafx bench"' in text[:200] else json.loads(text)
    return files


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
        "([plot](../benchmarks/results/cpu-parity.png))."
    )
    heads = ("seed", "mean difference of a step's losses", "largest", "of the last hundred steps' means")
    rows = [
        (seed["seed"], *(f"{seed['difference'][key]:.1e}" for key in ("mean", "largest", "of the end")))
        for seed in document["seeds"]
    ]
    return section("Training losses beside stock PEFT's", said, heads, rows)


def page(folder: Path) -> str:
    """The page's text."""
    files = read(folder)
    lines = [HEAD, *targets(files), "## On a GPU", "", *on_a_gpu(files), ""]
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
    parser.add_argument(
        "--readme", type=Path, help="where its marked region is written (default: this repository's README.md)"
    )
    options = parser.parse_args()
    folder: Path = options.folder
    here = folder.resolve() == RESULTS
    target = PAGE if here else folder / "results.md"
    target.write_text(page(folder), encoding="utf-8")
    print(f"{target} is written")
    readme: Path | None = options.readme or (README if here else None)
    if readme is not None:
        readme.write_text(with_region(readme.read_text(encoding="utf-8"), what_you_get(read(folder))), encoding="utf-8")
        print(f"{readme} is written")
        picture = PICTURE if here else folder / PICTURE.name
        draw(read(folder), picture)
        print(f"{picture} is written")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
