"""The log's summary in words."""

from __future__ import annotations

from collections.abc import Iterable

from .folding import totals
from .record import Record
from .table import human_bytes

NOTHING = "Nothing was compiled that looks like DoRA."


def in_words(records: Iterable[Record]) -> str:
    """One sentence: how many layers are rewritten, and how much less a forward forms.

    >>> in_words([dorafx.Record("rewritten", site="head", pattern="linear", dense_bytes_avoided=193 << 20)])
    '1 of 1 DoRA layer rewritten; a forward forms 193 MiB less.'
    """
    records = list(records)
    sums = totals(records)
    if not sums.modules:
        return NOTHING
    text = f"{sums.rewritten} of {sums.modules} DoRA {'layer' if sums.modules == 1 else 'layers'} rewritten"
    partly = len({r.site or (r.status, r.graph) for r in records if r.rewritten and r.reason})
    if partly:
        text += ", in part" if sums.rewritten == 1 else f", {partly} of them in part"
    if sums.missed:
        text += f"; {sums.missed} left alone"
        if sums.rewritten + sums.missed > sums.modules:
            text += " in another place"
    if sums.dense_bytes_avoided:
        text += f"; a forward forms {human_bytes(sums.dense_bytes_avoided)} less"
    return f"{text}."
