"""What a check finds, and the report of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TextIO

from rich.console import Group, RenderableType
from rich.text import Text

from dorafx.log import folded_site
from dorafx.log.table import as_text, finding, show

Severity = Literal["error", "warning", "note"]

_MOST_ROWS = 64

KINDS: dict[str, tuple[Severity, str]] = {
    "zero-norm": (
        "error",
        'dorafx.optimize(model, zero_rows="finite") gives 0 for these rows; or leave the layer out of target_modules.',
    ),
    "zero-norm-with-epsilon": (
        "note",
        "Nothing where the program adds an epsilon to the norm, as LyCORIS does. Converted to PEFT these rows give NaN.",
    ),
    "tiny-norm": (
        "warning",
        "Run the layer in a dtype with a wider range (bfloat16, float32); in this one the scaling m / n has few digits.",
    ),
    "overflowing-norm": (
        "error",
        "Run the layer in a dtype with a wider range (bfloat16, float32): m / inf makes the row 0.",
    ),
    "non-finite-weight": ("error", "Repair the base weight: such a row gives NaN whatever the adapter is."),
    "non-finite-factor": ("error", "Take an earlier checkpoint: the training has diverged."),
    "non-finite-magnitude": (
        "error",
        'Take an earlier checkpoint. Where the norm of the row is zero, the training met m / 0: train with zero_rows="finite".',
    ),
    "negative-magnitude": (
        "warning",
        "The row's output has the opposite sign of the direction. PEFT allows it, but training seldom means it.",
    ),
    "zero-magnitude": ("warning", "The row gives 0 (and the bias), and no gradient reaches its factors. Was it meant?"),
    "untrained": (
        "note",
        "Nothing, if the adapter is at its initialisation. Otherwise the magnitudes were frozen or not saved.",
    ),
    "missing-magnitude": (
        "error",
        "PEFT would keep the magnitudes of its initialisation, which do not belong to these factors. Save the adapter again.",
    ),
    "ignored-magnitude": (
        "error",
        'Set "use_dora": true in adapter_config.json; without it PEFT leaves the magnitudes unread.',
    ),
    "frozen-magnitude": (
        "warning",
        "Set requires_grad of the magnitude, or list it among the optimizer's parameters on purpose.",
    ),
    "magnitude-shape": (
        "error",
        "The magnitude has one entry for each output of the layer. It belongs to another layer or base.",
    ),
    "magnitude-axis": (
        "error",
        "PEFT divides by the norm of each output row. A magnitude by input cannot be converted: run it where it was trained.",
    ),
    "missing-factor": ("error", "Both factors are needed. Save the adapter again."),
    "shape": (
        "error",
        "The adapter belongs to another base, or fan_in_fan_out is wrong. Compare base_model_name_or_path.",
    ),
    "rank": (
        "error",
        "Correct r or rank_pattern in adapter_config.json: PEFT makes factors of that rank, and cannot load these.",
    ),
    "scaling": ("warning", "Correct lora_alpha, alpha_pattern or rank_pattern in adapter_config.json."),
    "assumed-scaling": ("note", "Check the folder with its adapter_config.json: norms depend on the scaling."),
    "missing-target": (
        "error",
        "Give the base that the adapter was trained on (base_model_name_or_path in adapter_config.json).",
    ),
    "untouched-target": (
        "note",
        "Nothing, if the model has no such layer: a base's files may hold more than it. Else these layers stay at their initialisation.",
    ),
    "refused": (
        "error",
        "Change the configuration, or use another way to load the base: PEFT raises an error for this.",
    ),
    "mixed-dtype": (
        "note",
        "Cast the adapter to the base's dtype for inference, or train under autocast. dorafx makes no copy of the weight.",
    ),
    "unread": ("warning", "Check the loaded model with dorafx.check(model), or give the base in floating point."),
    "unknown-tensor": ("note", "Nothing, if another program reads them."),
}
"""Kind -> how bad it is, and what to do."""


@dataclass(frozen=True)
class Finding:
    """One thing that a check found in one layer, or in the whole adapter.

    Attributes:
        kind: a short name, one of those that ``examples/guide/check.md`` lists.
        site: the layer, as the base model names it; empty for the whole adapter.
        text: what was found.
        adapter: the adapter's name in a model; empty for files.
        count: how many rows or entries it concerns; 0 where it is not about rows.
        rows: the first 64 of them.

    Examples:
        >>> finding = dorafx.Finding("zero-norm", "lm_head", "2 of 96 rows of W + s·B·A have a norm of zero", count=2, rows=(94, 95))
        >>> finding.severity, finding.is_problem
        ('error', True)
        >>> print(finding)
        error  lm_head: 2 of 96 rows of W + s·B·A have a norm of zero [zero-norm]
               what to do: dorafx.optimize(model, zero_rows="finite") gives 0 for these rows; or leave the layer out of target_modules.
    """

    kind: str
    site: str
    text: str
    adapter: str = ""
    count: int = 0
    rows: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"finding: unknown kind {self.kind!r}; kinds are {', '.join(KINDS)}")

    @property
    def severity(self) -> Severity:
        """``"error"`` (wrong or NaN results, or a refusal of PEFT), ``"warning"`` (probably unwanted, or unchecked) or ``"note"``."""
        return KINDS[self.kind][0]

    @property
    def advice(self) -> str:
        """What to do about it."""
        return KINDS[self.kind][1]

    @property
    def is_problem(self) -> bool:
        """Whether it is an error or a warning."""
        return self.severity != "note"

    def to_dict(self) -> dict[str, Any]:
        """The fields, severity and advice."""
        return {"severity": self.severity, **asdict(self), "rows": list(self.rows), "advice": self.advice}

    def __str__(self) -> str:
        return as_text(_line([self]))


@dataclass
class CheckReport:
    """What [`dorafx.check`][] found. ``str()`` is a list, worst first; true if there is no error and no warning.

    Attributes:
        findings: in the order of the layers.
        layers: how many adapter layers there are, each adapter of a layer counted.
        checked: of how many the norms were computed.
    """

    findings: list[Finding] = field(default_factory=list)
    layers: int = 0
    checked: int = 0

    @property
    def problems(self) -> list[Finding]:
        """The errors and warnings."""
        return [f for f in self.findings if f.is_problem]

    @property
    def notes(self) -> list[Finding]:
        """What is worth knowing, and no problem."""
        return [f for f in self.findings if not f.is_problem]

    @property
    def clean(self) -> bool:
        """Whether there is no error and no warning."""
        return not self.problems

    def __bool__(self) -> bool:
        return self.clean

    def to_dict(self) -> dict[str, Any]:
        """``{"clean": bool, "layers": int, "checked": int, "findings": [finding]}``, for JSON."""
        findings = [f.to_dict() for f in self.findings]
        return {"clean": self.clean, "layers": self.layers, "checked": self.checked, "findings": findings}

    def print(self, file: TextIO | None = None) -> None:
        """Print the list, in colour where ``file`` (standard output by default) is a terminal."""
        show(self, file)

    def __rich__(self) -> RenderableType:
        order = {"error": 0, "warning": 1, "note": 2}
        folds: dict[tuple[str, str, str, str], list[Finding]] = {}
        for f in sorted(self.findings, key=lambda f: order[f.severity]):
            text = "" if f.count else f.text  # rows differ from layer to layer
            folds.setdefault((f.kind, folded_site(f.site), f.adapter, text), []).append(f)
        number = {s: sum(f.severity == s for f in self.findings) for s in order}
        summary = f"{self.layers} adapter layers, norms of {self.checked} checked: " + (
            ", ".join(f"{n} {s}{'' if n == 1 else 's'}" for s, n in number.items() if n) or "nothing found"
        )
        return Group(*map(_line, folds.values()), Text(summary, style="bold"))

    def __str__(self) -> str:
        return as_text(self)


def rows_of(mask: Any) -> tuple[int, tuple[int, ...]]:
    """How many entries of a boolean vector are true, and the first of them."""
    places = mask.reshape(-1).nonzero().flatten()
    return len(places), tuple(places[:_MOST_ROWS].tolist())


def named_rows(rows: Iterable[int], count: int) -> str:
    """``rows 3, 7 and 90 to 95``; what does not fit is counted."""
    runs: list[list[int]] = []
    for row in rows:
        if runs and runs[-1][1] == row - 1:
            runs[-1][1] = row
        else:
            runs.append([row, row])
    shown, left = runs[:5], count - sum(b - a + 1 for a, b in runs[:5])
    texts = [str(a) if a == b else f"{a} to {b}" for a, b in shown]
    return f"{'row' if count == 1 else 'rows'} {', '.join(texts)}" + (f" and {left} more" if left else "")


def _line(fold: list[Finding]) -> Text:
    styles = {"error": "bold red", "warning": "bold yellow", "note": "cyan"}
    first = fold[0]
    site = first.site or "the adapter"
    if len(fold) > 1:
        site = f"{folded_site(first.site)} x {len(fold)}"
    if first.adapter and first.adapter != "default":
        site += f" ({first.adapter})"
    text = first.text if len(fold) == 1 or not first.count else f"{first.text}, and alike in the others"
    return finding(first.severity, styles[first.severity], f"{site}: {text}", first.kind, first.advice)
