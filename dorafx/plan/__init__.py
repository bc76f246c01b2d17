"""Plan: what may be rewritten, what should be, and which kernel serves it."""

from dorafx.match import CompositionPlan

from .planner import Left, NormPlan, RewritePlan, make_plan, serves_few_tokens

__all__ = ["CompositionPlan", "Left", "NormPlan", "RewritePlan", "make_plan", "serves_few_tokens"]
