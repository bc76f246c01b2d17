"""``dorafx bench``: what dorafx costs beside stock PEFT, the dense product, the factored norm, plain LoRA and merged
weights, each configuration in a process of its own.

    plan      what is measured: suites, anchors, cases       plain data
    run       configurations interleaved over rounds         processes, worker, suites/
    schedule  groups of processes: compiled side by side, timed alone (``bench gpu`` and the demo)
    results   raw samples and the figures taken from them    JSON
    table, plot                                              made from that JSON
"""

from .plan import ANCHORS, SUITES, Settings
from .results import Metric, Results, Row
from .run import run_bench

__all__ = ["ANCHORS", "SUITES", "Metric", "Results", "Row", "Settings", "run_bench"]
