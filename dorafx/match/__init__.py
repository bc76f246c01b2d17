"""Match: canonical forms over terms; every candidate ends as a match or as a miss with a reason."""

from dorafx.log.kinds import ReasonKind

from .composition import (
    Candidate,
    Composition,
    Match,
    Part,
    base_core,
    group,
    no_base_product,
    no_low_rank_product,
    part_scale,
    unequal_scaling,
    whole_match,
)
from .emission import CompositionPlan, Emit
from .matcher import match_graph
from .matches import Matches
from .near_misses import Reason
from .norms import NormFactors
from .registry import Form, check_form, forms, pattern

__all__ = [
    "Candidate",
    "Composition",
    "CompositionPlan",
    "Emit",
    "Form",
    "Match",
    "Matches",
    "NormFactors",
    "Part",
    "Reason",
    "ReasonKind",
    "base_core",
    "check_form",
    "forms",
    "group",
    "match_graph",
    "no_base_product",
    "no_low_rank_product",
    "part_scale",
    "pattern",
    "unequal_scaling",
    "whole_match",
]
