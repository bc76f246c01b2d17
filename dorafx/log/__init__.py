"""The rewrite log: one record a candidate, whatever became of it."""

from .counters import NormCounters
from .record import Record
from .rewritelog import SCHEMA_VERSION, RewriteLog, rewrite_log

__all__ = ["SCHEMA_VERSION", "NormCounters", "Record", "RewriteLog", "rewrite_log"]
