"""Match: canonical forms over terms; every candidate ends as a match or as a miss with a reason."""

from .composition import Candidate, Composition, Match, Part, base_core, part_scale
from .matcher import Matches, Verdict, match_graph
from .near_misses import Reason, operator_name, source_of
from .norms import LowRank, NormFactors
from .registry import Form, forms, pattern

__all__ = [
    "Candidate",
    "Composition",
    "Form",
    "LowRank",
    "Match",
    "Matches",
    "NormFactors",
    "Part",
    "Reason",
    "Verdict",
    "base_core",
    "forms",
    "match_graph",
    "operator_name",
    "part_scale",
    "pattern",
    "source_of",
]
