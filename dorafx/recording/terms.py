"""The terms of a graph's sites as text: what a layer computes, its norm, and the form that a near miss is closest to."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

import torch
from torch import fx

from dorafx.graphs.provenance import site_of
from dorafx.graphs.shapes import with_shapes
from dorafx.lift import Atom, Expr, Lifter, Notation, term_of
from dorafx.lift.algebra import TooComplex
from dorafx.log import DrawnTerms
from dorafx.match import Candidate, Form, Match, Matches, Reason, check_form, forms
from dorafx.match.composition import group
from dorafx.plan import Left, RewritePlan

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
    terms = [terms_of_left(matches, left) for left in plan.left if not left.sites]
    terms += [terms_of_norm(matches, plan, atom_id) for atom_id in plan.norms]
    return terms + [terms_of_left(matches, left) for left in plan.left if left.sites]


def terms_of_norm(matches: Matches, plan: RewritePlan, atom_id: int) -> SiteTerms:
    """The terms of a norm that is rewritten, with the composition that reads it."""
    reason = plan.without_composition.get(atom_id)
    why = f"{ONLY_THE_NORM}{reason.text}" if reason is not None else ""
    return _of_norm(matches, atom_id, plan.composed.get(atom_id) or _reading(matches, atom_id), reason, why)


def terms_of_left(matches: Matches, left: Left) -> SiteTerms:
    """The terms of a candidate that is left alone."""
    lift, reason, atom_id = matches.lift, left.reason, left.atom_id
    if atom_id is None:
        node = left.sites[0]
        return SiteTerms(_site(reason, [node]), "", *_texts(lift, None, node), reason.text, form_terms("linear"))
    if matches.misses.get(atom_id) is reason:
        texts = _texts(lift, _last_scaled(lift, atom_id), Atom(atom_id))
        closest = form_terms(_form_of(lift, atom_id))
        return SiteTerms(_site(reason, lift.atoms[atom_id].sites), "", *texts, reason.text, closest)
    match = next((m for m in matches.compositions if m.node is reason.node), None)  # one that does not pay
    return _of_norm(matches, atom_id, match, reason, reason.text)


def _reading(matches: Matches, atom_id: int) -> Match | None:
    """The last composition that a norm is in."""
    reading = [m for m in matches.compositions if any(a.id == atom_id for a in matches.lift.norms_in(m.expr))]
    return reading[-1] if reading else None


def drawn_terms(found: SiteTerms) -> DrawnTerms:
    """The terms of a site that is left alone, for its drawing."""
    form = found.closest
    if form is None:
        return DrawnTerms(_equations(found.output, found.norm)).shortened()
    return DrawnTerms(
        _equations(found.output, found.norm), (), _equations(form.output, form.norm), form.name
    ).shortened()


def drawn_terms_of_rewrite(matches: Matches, plan: RewritePlan, atom_id: int) -> DrawnTerms:
    """The terms of a rewritten norm and its composition, before and after, for their drawing."""
    found, match = terms_of_norm(matches, plan, atom_id), plan.composed.get(atom_id)
    terms = drawn_terms(found)
    output, norm = _texts_after(matches.lift, match, Atom(atom_id)) if match is not None else ("", found.norm)
    how = _BY_BLOCKS if plan.norms[atom_id].algorithm == "tiled" else _MULTIPLIED_OUT
    terms = replace(terms, after=_equations(output, f"{norm}, {how}"))
    return (terms if match is None else _with_short_input(matches.lift, match, terms)).shortened()


_BY_BLOCKS = "block by block: the sum is never whole in memory"
_MULTIPLIED_OUT = "from its square multiplied out: the sum is never whole in memory"
_LONGEST_INPUT = 12  # characters of a layer's input that is written out in every product


def _equations(output: str, norm: str) -> tuple[str, ...]:
    named = norm if norm.startswith("n₁ = ") else f"n = {norm}"
    return tuple(line for line in (f"y = {output}" if output else "", named if norm else "") if line)


def _with_short_input(lift: Lifter, match: Match, terms: DrawnTerms) -> DrawnTerms:
    """The terms with ``x`` for the layer's input, and a line that says what it is, if it is long and in every product."""
    given = match.base[:-1]
    if not given or any(part.core[: len(given)] != given for part in match.parts) or match.constant is not None:
        return terms
    text = Notation(lift, (match.expr, given)).term(given)
    written = re.compile(rf"(?<![\w.]){re.escape(text)}(?=·)")
    sides = terms.before, terms.after
    named_x = any(re.search(r"(?<![\w.])x(?![\w.])", line) for side in sides for line in side)
    if len(text) <= _LONGEST_INPUT or named_x or not written.search("".join(terms.before)):
        return terms
    before, after = ((*(written.sub("x", line) for line in side), f"x = {text}") for side in sides)
    return replace(terms, before=before, after=after)


def _texts_after(lift: Lifter, match: Match, norm: Atom) -> tuple[str, str]:
    """Output and norm of a rewritten composition: ``(x·Wᵀ + s·x·Aᵀ·Bᵀ)·D(g)``, as far as its form is such a bracket."""
    for scaled in (Expr.times_scalar, Expr.right_diag):  # s is a number or a scalar; else a vector
        try:
            inner = Expr.chain(match.base)
            for part in match.parts:
                inner = inner + scaled(Expr.chain(part.core), part.scale)
            rest = match.expr + inner.right_diag(match.scaling).scaled(-1.0)
        except TooComplex:
            continue
        if len(inner.items) < 2 or len(rest.items) + len(inner.items) > len(match.expr.items) + 1:
            continue  # not everything in the bracket is scaled by g
        rest = Expr(rest.items)
        notation = Notation(lift, (match.expr, norm, inner, match.scaling, rest))
        text = f"({notation.term(inner)})·D({notation.term(match.scaling)})"
        others = notation.term(rest) if rest.items else ""
        if others:
            text += f" − {others[1:]}" if others.startswith("−") else f" + {others}"
        return text, _norms(notation, norm)
    return _texts(lift, match.expr, norm)


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
