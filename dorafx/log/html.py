"""The log as one HTML page. Everything that comes from a log is escaped by the template engine; nothing is executed."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

import jinja2

from .table import fold, human_bytes, human_flops

if TYPE_CHECKING:
    from .rewritelog import RewriteLog

__all__ = ["render"]


def render(log: RewriteLog) -> str:
    """The page's text: summary, misses first, a table that sorts and filters, light and dark."""
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["bytes"] = human_bytes
    environment.filters["flops"] = human_flops
    template = environment.from_string(resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8"))
    rewrites, misses = log.rewrites, log.misses
    return template.render(
        modules=len({r.site for r in rewrites}),
        missed=len({r.site for r in misses}),
        graphs=len({r.graph for r in rewrites + misses}),
        avoided=sum(f.first.dense_bytes_avoided * f.count for f in fold(rewrites)),
        folds=fold(misses) + fold(rewrites),
        notes=log.notes,
        dropped=log.dropped,
    )
