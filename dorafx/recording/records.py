"""One record for each candidate, made once: after the rewrite, when it is known which norms have left the graph."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import fx

from dorafx.graphs.operators import first_argument
from dorafx.graphs.provenance import site_of, source_of
from dorafx.graphs.tensors import tensor_of
from dorafx.lift import Lifter
from dorafx.log import Drawing, DrawnTerms, Record, RewriteLog, folded_site
from dorafx.match import Match, Matches, Reason
from dorafx.options import Options
from dorafx.plan import Left, NormPlan, RewritePlan
from dorafx.plan.accounting import dense_bytes, gemm_flops, merging, norm_closure, still_formed
from dorafx.rewriter import NormKey, ZeroRows

from .drawings import Subject, draw, dtype_name
from .terms import ONLY_THE_NORM, SiteTerms, drawn_terms, drawn_terms_of_rewrite, site_terms, terms_of_left

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Draft:
    """A candidate's record before it is known whether its norm leaves the graph.

    Attributes:
        fields: of the record.
        norm: the norm whose placement the record states; None for a miss.
    """

    fields: dict[str, Any]
    norm: NormKey | None = None

    def record(self, inside: Mapping[NormKey, str], zero_rows: ZeroRows | None, member: str) -> Record:
        """The record of one of the modules that the graph serves.

        Args:
            inside: the norms that stay in the graph, each with the reason.
            zero_rows: which divisions by norms are guarded, where that was asked for.
            member: the module's name.
        """
        placed = dict(self.fields)
        placed["site"] = ".".join(part for part in (member, placed["site"]) if part)
        if self.norm is not None:
            reason = inside.get(self.norm)
            placed["norm_placement"] = "prologue" if reason is None else "graph"
            guarded = zero_rows.decision(self.norm) if zero_rows is not None else ""
            decisions = placed["decision"], guarded, reason and f"norm kept in the graph: {reason}"
            placed["decision"] = "; ".join(filter(None, decisions))
        return Record(**placed)


class Recorder:
    """Collects the records of one graph and its bodies.

    Args:
        options: those of the graph.
        graph_id: its number in the log.
        members: names of the modules that it serves; the log has the records once for each.
        terms: whether to collect the terms of every site, too.
    """

    def __init__(
        self, options: Options, graph_id: int = 0, members: tuple[str, ...] = ("",), terms: bool = False
    ) -> None:
        self.members = members
        self._common = {"codegen": options.codegen, "graph": graph_id}
        self._drafts: list[_Draft] = []
        self._drawings: dict[str, Drawing] = {}
        self.terms: list[SiteTerms] | None = [] if terms else None

    def rewritten(self, matches: Matches, plan: RewritePlan, copied: dict[fx.Node, fx.Node]) -> None:
        """Record one rewritten graph. To be called before the norms are hoisted, as the drawings show them in the graph.

        Args:
            matches, plan: its candidates, and the decisions about them.
            copied: original node -> the node that stands for it in the new graph; empty where nothing was rewritten.
        """
        if self.terms is not None:
            self.terms.extend(site_terms(matches, plan))
        lift, flops = matches.lift, gemm_flops(matches.lift)
        replaced = {c.match.node for c in plan.compositions}
        replaced |= {site for norm in plan.norms.values() for site in norm.factors.info.sites}
        candidates: list[tuple[dict[str, Any], Subject, NormKey | None, Callable[[], DrawnTerms]]] = []

        def left_alone(left: Left) -> tuple[dict[str, Any], Subject, NormKey | None, Callable[[], DrawnTerms]]:
            return _left(left), _subject_left(left), None, lambda: drawn_terms(terms_of_left(matches, left))

        # First candidates without a node for their norm, then the norms, then the rest.
        candidates += [left_alone(left) for left in plan.left if not left.sites]
        for atom_id, norm in plan.norms.items():
            match, miss = plan.composed.get(atom_id), plan.without_composition.get(atom_id)
            fields = _rewritten(lift, norm, match, miss, flops)
            fields["decision"] = "; ".join(filter(None, (plan.decisions.get(atom_id), norm.formed)))
            terms = partial(drawn_terms_of_rewrite, matches, plan, atom_id)
            candidates.append((fields, _subject(norm, match, miss), (plan.part, atom_id), terms))
        candidates += [left_alone(left) for left in plan.left if left.sites]
        keys: dict[tuple[object, ...], str] = {}
        for fields, subject, norm_key, terms_of_subject in candidates:
            # One drawing for all layers that differ only in their number.
            layer = tuple({**fields, "site": folded_site(fields["site"]), "source": "", "decision": ""}.values())
            if layer not in keys:
                drawing = replace(draw(subject, lift, copied, replaced), terms=_attempted(terms_of_subject))
                keys[layer] = drawing.key
                self._drawings[drawing.key] = drawing
            self._drafts.append(_Draft({**fields, **self._common, "drawing": keys[layer]}, norm_key))

    def left_alone(self, reason: Reason, pattern: str = "") -> None:
        """A miss of the graph as a whole."""
        self._drafts.append(
            _Draft({"status": "missed", "site": "", "pattern": pattern, **_why(reason), **self._common})
        )

    def forget(self) -> None:
        """Drop everything recorded so far."""
        self._drafts.clear()
        self._drawings.clear()
        if self.terms is not None:
            self.terms.clear()

    def log(
        self,
        inside: Mapping[NormKey, str],
        seconds: Mapping[str, float] | None = None,
        zero_rows: ZeroRows | None = None,
    ) -> RewriteLog:
        """The records, for each member.

        Args:
            inside: see :func:`dorafx.rewriter.norms_inside`.
            seconds: the time of each stage.
            zero_rows: see :func:`dorafx.rewriter.guard_zero_norms`.
        """
        log = RewriteLog()
        records = (draft.record(inside, zero_rows, member) for member in self.members for draft in self._drafts)
        log.extend(records, self._drawings, seconds)
        return log


def _attempted(terms: Callable[[], DrawnTerms]) -> DrawnTerms:
    """The terms; none where they cannot be written, as a formula must not stop a rewrite."""
    try:
        return terms()
    except Exception:
        _logger.debug("no terms of a drawing", exc_info=True)
        return DrawnTerms()


def _subject(norm: NormPlan, match: Match | None, miss: Reason | None) -> Subject:
    sites = tuple(norm.factors.info.sites)
    if match is not None:
        return Subject((match.node,), (match.expr,), sites)
    return Subject(sites, (), sites, miss.node if miss is not None else None)


def _subject_left(left: Left) -> Subject:
    node = left.reason.node
    return Subject(left.sites or ((node,) if node is not None else ()), (), left.sites, node)


def _rewritten(
    lift: Lifter, norm: NormPlan, match: Match | None, miss: Reason | None, flops: Mapping[fx.Node, int]
) -> dict[str, Any]:
    factors = norm.factors
    site = match.origin if match is not None else next(iter(factors.info.sites), None)
    closure = norm_closure(factors) or (merging(lift, match) if match is not None else [])
    weight = tensor_of(lift.atom_of(factors.dense_atom).node)
    return {
        "status": "rewritten",
        "site": site_of(site) if site is not None else "",
        "pattern": match.pattern if match is not None else "norm_only",
        **_why(miss, ONLY_THE_NORM),
        "source": source_of(site) if site is not None else "",
        "d_out": factors.d_out,
        "d_in": factors.d_in,
        "rank": factors.rank,
        "dtype": norm.packed.format if norm.packed is not None else dtype_name(weight),
        "dense_bytes_avoided": dense_bytes(factors, closure, still_formed(norm.packed is not None, closure)),
        "flops_before": sum(flops.get(node, 0) for node in closure),
        "flops_after": 2 * (factors.batch or 1) * factors.d_out * factors.d_in * factors.rank,
        "norm_algorithm": norm.algorithm,
    }


def _left(left: Left) -> dict[str, Any]:
    node = left.reason.node or next(iter(left.sites), None)
    operand = tensor_of(first_argument(left.sites[0])) if left.sites else None
    matrix = operand is not None and operand.dim() == 2 and all(isinstance(s, int) for s in operand.shape)
    d_out, d_in = operand.shape if matrix and operand is not None else (0, 0)
    return {
        "status": "missed",
        "site": site_of(node) if node is not None else "",
        "pattern": "norm_only",
        **_why(left.reason),
        "source": source_of(node) if node is not None else "",
        "d_out": int(d_out),
        "d_in": int(d_in),
        "dtype": dtype_name(operand),
        "decision": left.decision,
    }


def _why(reason: Reason | None, before: str = "") -> dict[str, str]:
    """The fields of a record that state the reason."""
    if reason is None:
        return {"reason": "", "kind": ""}
    return {"reason": f"{before}{reason.text}", "kind": reason.kind.value}
