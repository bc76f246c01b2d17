"""The rewrite log: one record a candidate, whatever became of it."""

from .record import Record
from .rewritelog import SCHEMA_VERSION, RewriteLog, rewrite_log

__all__ = ["SCHEMA_VERSION", "Record", "RewriteLog", "rewrite_log"]
