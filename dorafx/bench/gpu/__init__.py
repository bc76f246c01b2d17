"""``dorafx bench gpu``: all claims about GPUs measured within a budget of seconds, for a machine that is available for minutes.

plan       what is measured, in the order of importance, and estimates    plain data
micro, tuning, ../worker                                                   the jobs in the processes
run        the run by ../schedule, with a complete file of results after every figure
"""

from .plan import PARTS
from .run import GpuSettings, balance_line, run_gpu, tuned_table

__all__ = ["PARTS", "GpuSettings", "balance_line", "run_gpu", "tuned_table"]
