"""Types for writing canonical forms of your own, which [`dorafx.pattern`][] registers.

A form is asked about every node whose term is scaled by the reciprocal of a DoRA norm. A term is what the node computes, however it is
written: a sum of products of matrices, each product scaled by vectors. ``check`` decides whether the term matches the form, ``rewrite``
makes the nodes that replace it.

Examples:
    >>> import torch
    >>> from dorafx.extension import Candidate, CompositionPlan, Emit, Match, Part, Reason, base_core
    >>> @dorafx.pattern(name="base_only")
    ... class BaseOnly:
    ...     name: str
    ...
    ...     def check(self, candidate: Candidate) -> Match | Reason:
    ...         base = base_core(candidate)
    ...         if base is None:
    ...             return Reason("no product with the norm's weight is scaled by it", candidate.node)
    ...         cores = dict(candidate.composition.cores)
    ...         scaling = cores.pop(base)
    ...         if not cores or any(scale.constant is None for scale in cores.values()):
    ...             return Reason("the low-rank product is not added with a constant factor", candidate.node)
    ...         parts = tuple(Part(core, scale) for core, scale in cores.items())
    ...         return Match(self.name, candidate.node, candidate.expr, candidate.norm, scaling, base, parts)
    ...
    ...     def rewrite(self, match: Match, plan: CompositionPlan, emit: Emit) -> torch.fx.Node:
    ...         base, bias = emit.base(match.base, match.bias, match.scaling)
    ...         y = emit.compose(base, None, emit.vector(match.scaling), None, 1.0, plan.kernel)
    ...         low_rank, scale = emit.low_rank_sum(match.parts)
    ...         return emit.call(torch.add, y, emit.call(torch.mul, low_rank, scale))
"""

from dorafx.lift import Diag, Expr, Mat, Poly
from dorafx.match import (
    Candidate,
    Composition,
    CompositionPlan,
    Emit,
    Form,
    Match,
    NormFactors,
    Part,
    Reason,
    ReasonKind,
    base_core,
    part_scale,
)

__all__ = [
    "Candidate",
    "Composition",
    "CompositionPlan",
    "Diag",
    "Emit",
    "Expr",
    "Form",
    "Mat",
    "Match",
    "NormFactors",
    "Part",
    "Poly",
    "Reason",
    "ReasonKind",
    "base_core",
    "part_scale",
]
