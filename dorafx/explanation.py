"""The result of :func:`dorafx.explain`."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Group, RenderableType
from rich.text import Text

from dorafx.log import Record, RewriteLog, folded_site
from dorafx.log.table import as_text, finding, printable, show
from dorafx.options import EXPLAIN_SUFFIXES
from dorafx.recording import SiteTerms

_TORCH = str(Path(torch.__file__).parent) + os.sep
_NODE_NUMBER = re.compile(r"(?<=[a-z])_\d+")
_NO_HINTS = ("Please report an issue to PyTorch", "It may be possible to write Dynamo tracing rules")


@dataclass(frozen=True)
class GraphBreak:
    """A place where Dynamo broke the graph, and why.

    Attributes:
        reason: Dynamo's headline.
        explanation: Dynamo's longer explanation.
        hints: what Dynamo proposes.
        source: ``file:line`` of the innermost frame outside of torch.
        function: the function there.
        code: the line there.
        called_from: ``file:line`` of the frames that lead there, outermost first.
    """

    reason: str
    explanation: str = ""
    hints: tuple[str, ...] = ()
    source: str = ""
    function: str = ""
    code: str = ""
    called_from: tuple[str, ...] = ()

    def __rich__(self) -> Text:
        what = f"in {self.function}: {self.reason}" if self.function else self.reason
        if self.code:
            what += f", at `{self.code}`"
        return finding("graph break", "bold magenta", what, self.source, "; or ".join(self.hints) or self.explanation)

    def __str__(self) -> str:
        return as_text(self)


def graph_breaks_of(causes: Iterable[tuple[str, list[Any]]]) -> list[GraphBreak]:
    """The distinct breaks among Dynamo's causes: (reason, user's stack of ``FrameSummary``, innermost last)."""
    breaks: dict[tuple[str, str], GraphBreak] = {}
    for reason, stack in causes:
        graph_break = _graph_break(reason, stack)
        breaks.setdefault((graph_break.reason, graph_break.source), graph_break)
    return list(breaks.values())


def _graph_break(reason: str, stack: list[Any]) -> GraphBreak:
    # Dynamo's text: a headline, "  Explanation: …", "  Hint: …", then notes for its developers.
    for_users = reason.split("*** While handling", 1)[0]
    headline = next((line.strip() for line in for_users.splitlines() if line.strip()), "unknown")
    explanation = re.search(r"^\s*Explanation: (.+)$", for_users, re.MULTILINE)
    hints = [hint.strip() for hint in re.findall(r"^\s*Hint: (.+)$", for_users, re.MULTILINE)]
    outside = [frame for frame in stack if not frame.filename.startswith(_TORCH)]
    innermost = outside[-1] if outside else None
    return GraphBreak(
        headline,
        explanation[1].strip() if explanation else "",
        tuple(hint for hint in hints if not hint.startswith(_NO_HINTS)),
        f"{innermost.filename}:{innermost.lineno}" if innermost else "",
        innermost.name if innermost else "",
        (innermost.line or "").strip() if innermost else "",
        tuple(f"{frame.filename}:{frame.lineno}" for frame in outside[:-1]),
    )


@dataclass
class Explanation:
    """What dorafx would do with a model, found by tracing one call of it. ``str()`` is a table.

    Attributes:
        graph_count: number of graphs that Dynamo captured.
        breaks: the distinct places where it broke the graph, with the cause of each.
        log: the records.
        terms: what each site computes, as a formula, and for a near miss the form that it is closest to; ``dorafx/lift/show.py``
            explains the notation.
        layers: the names of the model's adapter layers with a magnitude.
        zero_rows: site -> how many rows of its adapted weight have a norm of zero, of sites that have such rows. ``m / 0`` makes them
            NaN or infinite, in the original too. Norms that gradients flow through are not looked at.
        counted_breaks: how many graphs ended in a break, where the graphs are not those of one call; else None.

    Examples:
        >>> def noisy(x):
        ...     print("once a forward")
        ...     return layer(x)
        >>> explanation = dorafx.explain(noisy, x)
        once a forward
        >>> explanation.graph_break_count, explanation.breaks[0].code, explanation.breaks[0].hints[0][:28]
        (1, 'print("once a forward")', 'Avoid calling builtin `print')
    """

    graph_count: int
    breaks: list[GraphBreak] = field(default_factory=list)
    log: RewriteLog = field(default_factory=RewriteLog)
    terms: list[SiteTerms] = field(default_factory=list)
    layers: list[str] = field(default_factory=list)
    zero_rows: dict[str, int] = field(default_factory=dict)
    counted_breaks: int | None = None

    @property
    def layers_outside(self) -> list[str]:
        """The names of the adapter layers that are in no graph of this call: those with a record that says why, and those that computed no
        norm in it (merged, disabled, cached, of an adapter that is not active, or not called), or shared the graph of an equal layer."""
        inside = {record.site for record in self.log.records if record.graph}
        return [name for name in self.layers if name not in inside]

    @property
    def graph_break_count(self) -> int:
        """How often the program leaves compiled code for Python, between graphs or around a single one."""
        if self.counted_breaks is not None:
            return max(self.counted_breaks, len(self.breaks))
        return max(self.graph_count - 1, 1 if self.breaks else 0)

    @property
    def rewrites(self) -> list[Record]:
        """The records of what would be rewritten, in whole or in part."""
        return self.log.rewrites

    @property
    def misses(self) -> list[Record]:
        """The records of what would be left alone."""
        return self.log.misses

    def print(self, file: TextIO | None = None, terms: bool = False) -> None:
        """Print the table, in colour where ``file`` (standard output by default) is a terminal; with ``terms`` also what each site
        computes.

        Examples:
            >>> dorafx.explain(layer, x).print(terms=True)
            1 graph, 0 graph breaks
            ...
            (function)  linear
              y = args·weightᵀ·D(magnitude·n⁻¹) + args·lora_Aᵀ·lora_Bᵀ·D(magnitude·n⁻¹)
              n = detach(‖weight + lora_B·lora_A‖)
        """
        show(self, file)
        if terms and self.terms:
            show(_shown(self.terms), file)

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the explanation to a file, whose suffix says how: ``".txt"`` the table, ``".html"`` the report, ``".json"`` the log with
        the fields of [`to_dict`][dorafx.Explanation.to_dict]. Another process never sees half of it.

        Returns:
            The path written.

        Raises:
            ValueError: another suffix.
            OSError: the file cannot be written.
        """
        target = Path(path)
        suffix = target.suffix.lower()
        if suffix not in EXPLAIN_SUFFIXES:
            allowed = f"{', '.join(EXPLAIN_SUFFIXES[:-1])} or {EXPLAIN_SUFFIXES[-1]}"
            raise ValueError(f"{str(target)!r} does not end in {allowed}")
        partial = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            if suffix == ".html":
                self._noted().to_html(partial)
            elif suffix == ".json":
                content = {**self.to_dict(), **json.loads(self.log.to_json())}
                partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            else:
                partial.write_text(f"{self}\n", encoding="utf-8")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
        return target

    def _noted(self) -> RewriteLog:
        """The log with graphs and graph breaks as notes, for the report."""
        noted = RewriteLog()
        noted.extend(self.log.records, self.log.drawings, self.log.seconds)
        noted.add_note(f"{_counted(self.graph_count, 'graph')}, {_counted(self.graph_break_count, 'graph break')}")
        for text in [" ".join(str(b).split()) for b in self.breaks] + self.log.notes:
            noted.add_note(text)
        return noted

    def to_dict(self) -> dict[str, Any]:
        """``{"graphs": int, "graph_breaks": int, "breaks": [break], "zero_rows": {site: int}}``; the log has its own JSON."""
        return {
            "graphs": self.graph_count,
            "graph_breaks": self.graph_break_count,
            "breaks": [asdict(b) for b in self.breaks],
            "zero_rows": dict(self.zero_rows),
        }

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [
            Text(f"{_counted(self.graph_count, 'graph')}, {_counted(self.graph_break_count, 'graph break')}", "bold"),
            self.log.__rich__(),
            *(b.__rich__() for b in self.breaks),
            *_shown_zeros(self.zero_rows),
        ]
        outside = self.layers_outside
        if outside:
            parts.append(
                Text(f"{len(self.layers) - len(outside)} of {_counted(len(self.layers), 'DoRA layer')} are in graphs")
            )
            recorded = {record.site for record in self.log.records}
            idle = [name for name in outside if name not in recorded]
            if idle:
                named = ", ".join(map(printable, idle[:3])) + (" and others" if len(idle) > 3 else "")
                parts.append(
                    Text(
                        f"{_counted(len(idle), 'layer')} without a record of {'its' if len(idle) == 1 else 'their'} own, which shared an "
                        "equal layer's graph or computed no DoRA norm in this call (disabled, merged, cached, not active or not called): "
                        + named
                    )
                )
        if not self.log.records:
            parts.append(Text("no DoRA computation was found in this call"))
        return Group(*parts)

    def __str__(self) -> str:
        return as_text(self)


def _shown_zeros(zero_rows: Mapping[str, int]) -> Iterable[Text]:
    folds: dict[tuple[str, int], list[str]] = {}
    for site, count in zero_rows.items():
        folds.setdefault((folded_site(site), count), []).append(site)
    for (folded, count), sites in folds.items():
        times = len(sites)
        site = (folded if times > 1 else sites[0]) or "(function)"
        what = f"{site}{f' x {times}' if times > 1 else ''}: {_counted(count, 'row')} with a norm of zero: NaN or infinite, in the original too"
        yield finding(
            "zero norm",
            "bold yellow",
            what,
            "",
            'with zero_rows="finite" they give 0; dorafx.check(model) names the rows',
        )


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _shown(terms: Iterable[SiteTerms]) -> Group:
    """Terms for a terminal: repeated layers folded; a near miss is shown above the form that it is closest to."""
    folds: dict[tuple[object, ...], set[str]] = {}
    firsts: dict[tuple[object, ...], SiteTerms] = {}
    for t in terms:
        key: tuple[object, ...] = (folded_site(t.site), t.pattern, _NODE_NUMBER.sub("", t.output), t.norm, t.reason)
        firsts.setdefault(key, t)
        folds.setdefault(key, set()).add(t.site)
    parts = []
    for key, t in firsts.items():
        text = Text(overflow="fold")
        count = len(folds[key])
        site = str(key[0]) if count > 1 else t.site
        text.append(f"{printable(site or '(function)')}{f' x {count}' if count > 1 else ''}", style="bold")
        text.append(f"  {printable(t.reason or t.pattern)}")
        form = t.closest
        for letter, actual, expected in (
            ("y", t.output, form.output if form else ""),
            ("n", t.norm, form.norm if form else ""),
        ):
            lines = [("found" if form else "", actual)] if actual else []
            if form is not None and lines:
                lines.append((form.name, expected))
            width = max((len(head) for head, _ in lines), default=0)
            for head, line in lines:
                equation = line if line.startswith("n₁ = ") else f"{letter} = {line}"
                text.append(f"\n  {f'{head:{width}}  ' if head else ''}")
                text.append(printable(equation), style="cyan" if head in ("", "found") else "dim")
        parts.append(text)
    return Group(*parts)
