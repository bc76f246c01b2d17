"""The terms of a graph's sites as text: what a layer computes, its norm, and the form that a near miss is closest to."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import fx

from dorafx.graphs.provenance import site_of
from dorafx.graphs.shapes import with_shapes
from dorafx.lift import Atom, Expr, Lifter, Notation, term_of
from dorafx.match import Candidate, Form, Match, Matches, Reason, check_form, forms
from dorafx.match.composition import group
from dorafx.plan import RewritePlan

ONLY_THE_NORM = "only the norm is rewritten: "
"""The beginning of the reason why a norm is rewritten without its composition."""


@dataclass(frozen=True)
class FormTerms:
    """A canonical form as terms: ``y = …`` and ``n = …``.

    Attributes:
        name: of the form.
        output: what it computes.
        norm: what its norm is taken of.
    """

    name: str
    output: str
    norm: str


@dataclass(frozen=True)
class SiteTerms:
    """The terms of one site (see :mod:`dorafx.lift.show` for the notation).

    Attributes:
        site: the module's name, as the records have it.
        pattern: the form that was recognised; empty if none was.
        output: what the site computes; empty if nothing is scaled by the norm.
        norm: what its norm is taken of.
        reason: why the site, or all of it but its norm, is left alone; empty if nothing is.
        closest: of a near miss, the form that it is closest to.
    """

    site: str
    pattern: str
    output: str
    norm: str
    reason: str = ""
    closest: FormTerms | None = None


def site_terms(matches: Matches, plan: RewritePlan) -> list[SiteTerms]:
    """The terms of every site of a graph, in the order of the plan's records.

    Args:
        matches: the candidates.
        plan: the decisions about them.
    """
    lift = matches.lift
    matched = {atom.id: match for match in matches.compositions for atom in lift.norms_in(match.expr)}
    # Norms that the plan leaves alone, as no node computes them by itself, come first, as their records do.
    unplanned = [atom_id for atom_id in matches.norms if atom_id not in plan.norms]
    reasons = {atom_id: left.reason for atom_id, left in zip(unplanned, plan.left)}
    terms = [
        _of_norm(matches, atom_id, matched.get(atom_id), reasons[atom_id], reasons[atom_id].text)
        for atom_id in unplanned
    ]
    for atom_id in plan.norms:
        reason = plan.without_composition.get(atom_id)
        why = f"{ONLY_THE_NORM}{reason.text}" if reason is not None else ""
        terms.append(_of_norm(matches, atom_id, plan.composed.get(atom_id) or matched.get(atom_id), reason, why))
    for atom_id, reason in matches.misses.items():
        texts = _texts(lift, _last_scaled(lift, atom_id), Atom(atom_id))
        closest = form_terms(_form_of(lift, atom_id))
        terms.append(SiteTerms(_site(reason, lift.atoms[atom_id].sites), "", *texts, reason.text, closest))
    for atom_id, reason in matches.composition_misses.items():
        if atom_id in plan.composed and reason.node is not None:
            terms.append(_of_norm(matches, atom_id, None, reason, reason.text))
    for node, reason in matches.unknown:
        terms.append(SiteTerms(_site(reason, [node]), "", *_texts(lift, None, node), reason.text, form_terms("linear")))
    return terms


def _of_norm(matches: Matches, atom_id: int, match: Match | None, miss: Reason | None, why: str) -> SiteTerms:
    """A recognised norm with its composition; ``miss`` is the reason if that is not recognised, or rewriting it does not pay."""
    lift, sites = matches.lift, matches.lift.atoms[atom_id].sites
    if match is not None:
        return SiteTerms(site_of(match.origin), match.pattern, *_texts(lift, match.expr, Atom(atom_id)), why)
    texts = _texts(lift, miss.node if miss is not None else None, Atom(atom_id))
    site = site_of(sites[0]) if sites else _site(miss, []) if miss is not None else ""
    return SiteTerms(site, "", *texts, why, form_terms(_closest_form(matches, atom_id, miss)))


def _site(reason: Reason, sites: list[fx.Node]) -> str:
    node = reason.node or (sites[0] if sites else None)
    return site_of(node) if node is not None else ""


def _texts(lift: Lifter, output: Expr | fx.Node | None, norm: Atom | fx.Node) -> tuple[str, str]:
    """Output and norm, with the same names in both."""
    notation = Notation(lift, (output, norm))
    return notation.term(output) if output is not None else "", _norms(notation, norm)


def _norms(notation: Notation, norm: Atom | fx.Node) -> str:
    named = notation.norms()
    if not named:
        return notation.term(norm)
    if len(named) == 1:
        return next(iter(named.values()))
    return ", ".join(f"{name} = {text}" for name, text in named.items())


def _last_scaled(lift: Lifter, atom_id: int) -> fx.Node | None:
    """The last node whose term contains a norm."""
    last = None
    for node, value in lift.values.items():
        if value is not None and any(atom.id == atom_id for atom in lift.norms_in(term_of(value))):
            last = node
    return last


# -- the closest form -------------------------------------------------------------------------------------------------


def _closest_form(matches: Matches, atom_id: int, reason: Reason | None) -> str:
    """The form whose check gave the reason."""
    lift = matches.lift
    value = lift.values.get(reason.node) if reason is not None and reason.node is not None else None
    if reason is None or reason.node is None or value is None:
        return _form_of(lift, atom_id)
    if isinstance(term := term_of(value), Expr):
        candidate = Candidate(lift, reason.node, term, group(term), matches.norms[atom_id])
        for name, form in forms().items():
            checked = check_form(form, candidate)
            if isinstance(checked, Reason) and checked.text == reason.text:
                return name
    return _form_of(lift, atom_id)


def _form_of(lift: Lifter, atom_id: int) -> str:
    """The form whose norm is of the same kind."""
    info = lift.atoms[atom_id]
    assert info.expr is not None
    if info.side == "col":
        return "linear_columns"
    if any(lift.atom_of(atom).kind == "filter" for atom in info.expr.atoms()):
        return "convolution"
    return "linear"


@functools.lru_cache(maxsize=64)
def form_terms(name: str) -> FormTerms | None:
    """A form's ``statement`` as terms, for the arguments that its ``example`` returns; None for a form without these, or if its statement
    cannot be traced."""
    form = forms().get(name)
    if form is None or not hasattr(form, "statement") or not hasattr(form, "example"):
        return None
    try:
        with torch.inference_mode(False), torch.enable_grad():  # the cached result must not depend on the caller's mode
            return _stated(form)
    except Exception:  # the statement may be a user's
        return None


def _stated(form: Form) -> FormTerms | None:
    example: dict[str, torch.Tensor] = form.example()  # type: ignore[attr-defined]
    gm = with_shapes(fx.symbolic_trace(form.statement), list(example.values()))  # type: ignore[attr-defined]
    parameters = {argument for argument, value in example.items() if isinstance(value, torch.nn.Parameter)}
    lift = Lifter(gm.graph, is_parameter=lambda node: node.target in parameters).run()
    (result,) = next(node for node in gm.graph.nodes if node.op == "output").all_input_nodes
    notation = Notation(lift, (result,))
    return FormTerms(form.name, notation.term(result), ", ".join(notation.norms().values()))
