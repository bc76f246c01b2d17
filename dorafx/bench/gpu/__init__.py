"""``dorafx bench gpu``: everything that is claimed of a GPU, within a budget of seconds, on a machine that is there for minutes.

plan       what is measured, in the order of importance, and estimates    plain data
schedule   groups of processes: compiled side by side, timed alone
micro, tuning, ../worker                                                   what runs in the processes
run        results that are whole after every figure
"""

from .plan import PARTS
from .run import GpuSettings, balance_line, run_gpu, tuned_table

__all__ = ["PARTS", "GpuSettings", "balance_line", "run_gpu", "tuned_table"]
