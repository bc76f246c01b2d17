"""A rewritten region as data: the nodes before and after, small enough to be stored in a log and drawn later."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

MAX_NODES = 96
"""The most nodes of one side of a drawing; those farthest from the region's end are left out. A layer has 10 to 40."""

_FATES = ("kept", "removed", "new", "cause")
_LONGEST = 400  # characters of a text; a repr can be of any length
_LONGEST_TERM, _MOST_TERMS = 2000, 8


@dataclass(frozen=True)
class DrawnNode:
    """One node of a graph.

    Attributes:
        name: the node's name in its graph.
        operator: what it calls; ``"input"`` for a placeholder or an attribute.
        label: for an input, the parameter's name.
        shape: of its tensor, ``"[96, 64]"``; symbolic sizes by name; empty if the value is no tensor.
        dtype: of its tensor.
        source: ``file:line`` of the user's code.
        fate: ``"kept"``; ``"removed"`` (before only); ``"new"`` (after only); ``"cause"``: the node that a miss is about.
        inputs: indices of the nodes that it reads, within the same side.
        replaces: names of the original nodes that a new one stands for.
    """

    name: str
    operator: str
    label: str = ""
    shape: str = ""
    dtype: str = ""
    source: str = ""
    fate: str = "kept"
    inputs: tuple[int, ...] = ()
    replaces: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Fields that are not empty."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values if v}

    @staticmethod
    def from_dict(values: Any, number: int) -> DrawnNode:
        """Node ``number`` of a side, which may read only earlier nodes.

        Raises:
            ValueError: an unknown, absent or wrong field; the message names it.
        """
        if not isinstance(values, Mapping):
            raise ValueError(f"drawing: a node is a {type(values).__name__}, not an object")
        known = [f.name for f in fields(DrawnNode)]
        unknown = sorted(map(str, set(values) - set(known)))
        if unknown:
            raise ValueError(f"drawing: unknown field {unknown[0]!r}; fields are {', '.join(known)}")
        node = {"name": "", "operator": "", **values}
        inputs, replaces = node.pop("inputs", []), node.pop("replaces", [])
        invalid = sorted(name for name, value in node.items() if not isinstance(value, str) or len(value) > _LONGEST)
        if invalid:
            raise ValueError(f"drawing: field {invalid[0]!r} must be a text of at most {_LONGEST} characters")
        if node.get("fate", "kept") not in _FATES:
            raise ValueError(f"drawing: fate {node['fate']!r:.40} is not one of {', '.join(_FATES)}")
        if not isinstance(inputs, list) or any(type(i) is not int or not 0 <= i < number for i in inputs):
            raise ValueError("drawing: 'inputs' must be a list of indices of earlier nodes")
        if not isinstance(replaces, list) or any(not isinstance(n, str) or len(n) > _LONGEST for n in replaces):
            raise ValueError("drawing: 'replaces' must be a list of names")
        return DrawnNode(**node, inputs=tuple(inputs), replaces=tuple(replaces))


@dataclass(frozen=True)
class DrawnTerms:
    """What a region computes, as formulas (:mod:`dorafx.lift.show` explains the notation), each ``"y = …"`` or ``"n = …"``.

    Attributes:
        before: of the region as the program has it.
        after: of what replaced it; empty for a miss.
        closest: of the form that a near miss is closest to.
        form: that form's name.
    """

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    closest: tuple[str, ...] = ()
    form: str = ""

    def shortened(self) -> DrawnTerms:
        """The terms, each cut to the length that a log takes."""
        before, after, closest = (
            tuple(t if len(t) <= _LONGEST_TERM else t[: _LONGEST_TERM - 1] + "…" for t in side[:_MOST_TERMS])
            for side in (self.before, self.after, self.closest)
        )
        return DrawnTerms(before, after, closest, self.form[:_LONGEST])

    def to_dict(self) -> dict[str, Any]:
        """Fields that are not empty."""
        values = ((f.name, getattr(self, f.name)) for f in fields(self))
        return {name: list(v) if isinstance(v, tuple) else v for name, v in values if v}

    @staticmethod
    def from_dict(values: Any) -> DrawnTerms:
        """The terms of a dictionary as :meth:`to_dict` makes it.

        Raises:
            ValueError: anything else.
        """
        form = values.get("form", "") if isinstance(values, Mapping) else None
        sides = [values.get(s, []) for s in ("before", "after", "closest")] if isinstance(values, Mapping) else []
        texts_only = all(isinstance(side, list) and len(side) <= _MOST_TERMS for side in sides) and all(
            isinstance(text, str) and len(text) <= _LONGEST_TERM for side in sides for text in side
        )
        if not texts_only or not isinstance(form, str) or len(form) > _LONGEST:
            raise ValueError(
                f"drawing: 'terms' must be lists of at most {_MOST_TERMS} texts of at most {_LONGEST_TERM} characters"
            )
        before, after, closest = map(tuple, sides)
        return DrawnTerms(before, after, closest, form)


@dataclass(frozen=True)
class Drawing:
    """A region of a graph before and after its rewrite; ``after`` is empty for a miss. ``terms``: what the sides compute."""

    before: tuple[DrawnNode, ...]
    after: tuple[DrawnNode, ...] = ()
    terms: DrawnTerms = DrawnTerms()

    @property
    def key(self) -> str:
        """A digest of the content, by which records refer to the drawing."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """``{"before": [node], "after": [node], "terms": terms}``, the last only where there are any."""
        sides = {"before": [n.to_dict() for n in self.before], "after": [n.to_dict() for n in self.after]}
        terms = self.terms.to_dict()
        return {**sides, "terms": terms} if terms else sides

    @staticmethod
    def from_dict(values: Any) -> Drawing:
        """The drawing of a dictionary as :meth:`to_dict` makes it.

        Raises:
            ValueError: anything else.
        """
        sides = [values.get("before"), values.get("after", [])] if isinstance(values, Mapping) else [None]
        if any(not isinstance(side, list) or len(side) > MAX_NODES for side in sides):
            raise ValueError(f"drawing: 'before' and 'after' must be lists of at most {MAX_NODES} nodes")
        before, after = (tuple(DrawnNode.from_dict(node, i) for i, node in enumerate(side or [])) for side in sides)
        return Drawing(before, after, DrawnTerms.from_dict(values.get("terms", {})))
