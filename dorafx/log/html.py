"""The log as one HTML page that works offline.

Values of a log are escaped by the template engine and never become part of the script. The page's content security policy allows
only that script, identified by its digest.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources

import jinja2
from markupsafe import Markup

from .content import LogContent
from .drawing import Drawing, DrawnNode
from .folding import Fold, fold, totals
from .layout import HEIGHT, WIDTH, Picture, fitting
from .summary import in_words
from .table import human_bytes, human_flops

_CHARACTERS, _SMALL = 17, 20  # of the two lines of text in a box
_WIDE, _PHONE = 1176, 372  # pixels for both sides of a drawing in a window of 1280, and for one on a phone
_PATH = 44  # characters of a path that is shown whole
_WORD = re.compile(r"""[^\s'"()\[\]<>]+""")
_A_PATH = re.compile(r"[\\/].")
_DTYPES = {"float16": "fp16", "float32": "fp32", "float64": "fp64", "bfloat16": "bf16"}


def render(log: LogContent, width: int = _WIDE) -> str:
    """The page's text: summary, misses first, a table that sorts and filters, pictures of the distinct layers with their terms; readable
    on a laptop and a phone, light and dark.

    Args:
        log: what the page is about.
        width: pixels that both sides of a drawing should have room in, beside each other.
    """
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters.update(bytes=human_bytes, flops=human_flops, paths=_with_short_paths)
    misses, rewrites = fold(log.misses), fold(log.rewrites)
    folds = misses + sorted(rewrites, key=lambda f: not f.first.reason)  # what is rewritten only in part comes next
    drawings = log.drawings
    layers = []
    for key in dict.fromkeys(key for f in folds for key in f.drawings if key in drawings):
        layers.append(_layer(key, drawings[key], next(f for f in folds if key in f.drawings), width))
    style, script = _text("report.css"), _text("report.js")
    return environment.from_string(_text("report.html")).render(
        policy=f"default-src 'none'; style-src {_digest(style)}; script-src {_digest(script)}",
        style=style,
        script=script,
        summary=in_words(log.records),
        sums=totals(log.records),
        graphs=len({r.graph for r in log.records}),
        norms=log.norms,
        folds=folds,
        kinds=sorted({f.first.kind for f in folds if f.first.kind}),
        layers=layers,
        opened=next((layer.key for layer in layers if len(layer.sides) > 1), layers[0].key if layers else ""),
        drawn={layer.key for layer in layers},
        notes=log.notes,
        dropped=log.dropped,
        box=(WIDTH, HEIGHT),
    )


def shortened(path: str, most: int = _PATH) -> str:
    """A path without folders in its middle, if it is longer than ``most`` characters: ``/home/…/lora/variants.py:248``."""
    if len(path) <= most:
        return path
    separator = "/" if "/" in path else "\\"
    first, *others = path.split(separator)
    if not first and others:  # an absolute path
        first, others = separator + others[0], others[1:]
    kept = ""
    for part in reversed(others):
        if kept and len(first) + len(part) + len(kept) + 3 > most:
            break
        kept = separator + part + kept
    text = f"{first}{separator}…{kept}"
    if len(text) <= most:
        return text
    return f"{path[: most // 4]}…{path[most // 4 + 1 - most :]}"


def _with_short_paths(text: str) -> Markup:
    """The text, with long paths in it shortened, and shown whole where one points at them."""
    parts, end = [], 0
    for found in _WORD.finditer(text):
        short = shortened(found[0]) if _A_PATH.search(found[0]) else found[0]
        if short != found[0]:
            parts.append(Markup.escape(text[end : found.start()]))
            parts.append(
                Markup('<span class="path" role="button" tabindex="0" title="{}">{}</span>').format(found[0], short)
            )
            end = found.end()
    return Markup("").join([*parts, Markup.escape(text[end:])])


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


@dataclass(frozen=True)
class Side:
    """One side of a layer's drawing: for a wide window and for a phone the picture with its boxes.

    Attributes:
        name: ``"before"`` or ``"after"``.
        caption: what is written above it.
        counts: how many nodes there are of which fate, in words.
        pictures: (class of the window, picture, boxes).
        terms: what it computes.
    """

    name: str
    caption: str
    counts: str
    pictures: list[tuple[str, Picture, list[Box]]]
    terms: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """The drawing of one distinct layer."""

    key: str
    fold: Fold
    sides: list[Side]
    form: str
    closest: tuple[str, ...]


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
    def mark(self) -> str:
        """What says the node's fate without colour."""
        return {"removed": "−", "new": "+", "cause": "!"}.get(self.node.fate, "")

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


def _layer(key: str, drawing: Drawing, fold: Fold, width: int) -> Layer:
    names = {node.name: i for i, node in enumerate(drawing.before)}
    terms = drawing.terms
    before = fitting(drawing.before, width // 2 if drawing.after else width)
    sides = [_side("before", drawing.before, names, before, terms.before, "Before" if drawing.after else "As it is")]
    if drawing.after:
        after = fitting(drawing.after, max(width - before.width, width // 2))
        sides.append(_side("after", drawing.after, names, after, terms.after, "After"))
    return Layer(key, fold, [side for side in sides if side.pictures], terms.form, terms.closest)


def _side(
    name: str, nodes: tuple[DrawnNode, ...], names: dict[str, int], broad: Picture, terms: tuple[str, ...], caption: str
) -> Side:
    fates = [node.fate for node in nodes]
    counts = [f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}"]
    counts += [f"{fates.count(fate)} {fate}" for fate in ("removed", "new") if fate in fates]
    narrow = fitting(nodes, _PHONE)
    pictures = [("broad", broad, _boxes(nodes, broad, names)), ("narrow", narrow, _boxes(nodes, narrow, names))]
    return Side(name, caption, ", ".join(counts), pictures if nodes else [], terms)


def _boxes(nodes: tuple[DrawnNode, ...], picture: Picture, names: dict[str, int]) -> list[Box]:
    boxes = []
    for node, (x, y) in zip(nodes, picture.corners):
        replaces = " ".join(str(names[name]) for name in node.replaces if name in names)
        foot = _start(f"{node.shape} {_DTYPES.get(node.dtype, node.dtype)}".strip(), _SMALL)
        boxes.append(Box(node, x, y, _head(node), foot, replaces))
    return boxes


def _head(node: DrawnNode) -> str:
    if node.operator != "input":
        return _start(node.operator.removesuffix(".default"), _CHARACTERS)
    text = node.label or node.name
    for ending in (".weight", ".default"):  # "default" is the adapter that PEFT names so
        if len(text) > _CHARACTERS:
            text = text.removesuffix(ending)
    if len(text) <= _CHARACTERS:
        return text
    # The end of a parameter's name distinguishes it from others.
    kept = ""
    for part in reversed(text.split(".")):
        if len(part) + len(kept) + bool(kept) > _CHARACTERS:
            break
        kept = f"{part}.{kept}" if kept else part
    return kept or f"…{text[1 - _CHARACTERS :]}"


def _start(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
