"""The log as one HTML page that works offline.

Values of a log are escaped by the template engine and never become part of the script. The page's content security policy allows
only that script, identified by its digest.
"""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from importlib import resources

import jinja2

from .content import LogContent
from .drawing import Drawing, DrawnNode
from .folding import Fold, fold, totals
from .layout import HEIGHT, WIDTH, Picture, lay_out
from .table import human_bytes, human_flops

_CHARACTERS = 20  # of 11-pixel text in a box


def render(log: LogContent) -> str:
    """The page's text: summary, misses first, a table that sorts and filters, pictures of the distinct layers; readable on a
    laptop and a phone, light and dark."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(bytes=human_bytes, flops=human_flops)
    misses, rewrites = fold(log.misses), fold(log.rewrites)
    folds = misses + sorted(rewrites, key=lambda f: not f.first.reason)  # what is rewritten only in part comes next
    drawings = log.drawings
    layers = []
    for key in dict.fromkeys(key for f in folds for key in f.drawings if key in drawings):
        layers.append(_layer(key, drawings[key], next(f for f in folds if key in f.drawings)))
    style, script = _text("report.css"), _text("report.js")
    return environment.from_string(_text("report.html")).render(
        policy=f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}",
        style=style,
        script=script,
        sums=totals(log.records),
        partly=len({site for f in rewrites if f.first.reason for site in f.sites}),
        graphs=len({r.graph for r in log.records}),
        norms=log.norms,
        folds=folds,
        kinds=sorted({f.first.kind for f in folds if f.first.kind}),
        layers=layers,
        drawn={layer.key for layer in layers},
        notes=log.notes,
        dropped=log.dropped,
        box=(WIDTH, HEIGHT),
    )


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@dataclass(frozen=True)
class Layer:
    """The pictures of one distinct layer: (caption, picture, boxes) before and after."""

    key: str
    fold: Fold
    sides: list[tuple[str, Picture, list[Box]]]


@dataclass(frozen=True)
class Box:
    """A node as it is drawn: two lines of text, and a text that is shown on hover."""

    node: DrawnNode
    x: int
    y: int
    head: str
    foot: str
    replaces: str
    """Indices of the nodes of the other side, separated by spaces."""

    @property
    def hover(self) -> str:
        node = self.node
        lines = [
            node.operator if node.operator != "input" else f"input {node.label}".strip(),
            f"{node.shape} {node.dtype}".strip(),
            node.name if node.name != node.operator else "",
            node.source,
            _FATES[node.fate],
            f"in place of {len(node.replaces)} nodes: {', '.join(node.replaces)}" if node.replaces else "",
        ]
        return "\n".join(line for line in lines if line)


_FATES = {"kept": "kept", "removed": "removed", "new": "new", "cause": "the reason is about this node"}


def _layer(key: str, drawing: Drawing, fold: Fold) -> Layer:
    names = {node.name: i for i, node in enumerate(drawing.before)}
    sides = [("before" if drawing.after else "as it is", drawing.before), ("after", drawing.after)]
    return Layer(key, fold, [(caption, *_boxes(nodes, names)) for caption, nodes in sides if nodes])


def _boxes(nodes: tuple[DrawnNode, ...], names: dict[str, int]) -> tuple[Picture, list[Box]]:
    picture = lay_out(nodes)
    boxes = []
    for node, (x, y) in zip(nodes, picture.corners):
        replaces = " ".join(str(names[name]) for name in node.replaces if name in names)
        boxes.append(Box(node, x, y, _head(node), _start(f"{node.shape} {node.dtype}".strip()), replaces))
    return picture, boxes


def _head(node: DrawnNode) -> str:
    if node.operator != "input":
        return _start(node.operator.removesuffix(".default"))
    text = node.label or node.name
    if len(text) > _CHARACTERS:
        text = text.removesuffix(".weight")
    # The end of a parameter's name distinguishes it from others.
    return text if len(text) <= _CHARACTERS else f"…{text[1 - _CHARACTERS :]}"


def _start(text: str) -> str:
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS - 1]}…"
