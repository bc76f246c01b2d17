"""The rewrite log: one record for each candidate, rewritten or not."""

from .counters import NormCounters
from .drawing import MAX_NODES, Drawing, DrawnNode, DrawnTerms
from .folding import folded_site
from .kinds import ReasonKind
from .record import Record
from .reproduction import Reproduction
from .rewritelog import SCHEMA_VERSION, RewriteLog, rewrite_log

__all__ = [
    "MAX_NODES",
    "SCHEMA_VERSION",
    "Drawing",
    "DrawnNode",
    "DrawnTerms",
    "NormCounters",
    "ReasonKind",
    "Record",
    "Reproduction",
    "RewriteLog",
    "folded_site",
    "rewrite_log",
]
