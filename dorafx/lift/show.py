"""Prints terms as formulas: ``x·Wᵀ·D(m·n⁻¹) where n = ‖W + 2·B·A‖``.

============================  =====================================================================================================
``x·Wᵀ``                      product of matrices; ``ᵀ`` a transpose, ``I`` the identity (the empty chain), ``𝟙`` a matrix of ones
``D(m·n⁻¹)``                  diagonal matrix of a vector; of vectors and scalars, products and powers are by element
``2·s·B·A``, ``W − B·A``      numbers and scalars stand in front of a product
``(W + B·A)²``                a matrix with every element squared
``‖W‖``, ``‖W‖_col``          2-norm of each row, of each column
``Σ(W)²``, ``Σ_col(W)²``      sum of the squares of each row, of each column; ``√(Σ(W)² + 1e-06)`` a norm with an epsilon under the root
``n``, ``n₁``                 a norm in a product of matrices, defined after ``where``
``detach(n)``                 without a gradient
``max(n, 1e-12)``             a lower bound (``maximum(n, …)`` with half of the gradient where both are equal)
``bfloat16(W)``               rounded to a less accurate dtype
``tanh(B·A)``, ``relu_3``     a value for which the lifter has no term, by its operator; an activation that is long, by its node's name
``dropout(x)₂``               another value that would print the same
``(x + y)``                   a sum that is one indeterminate
``onehot(i)``, ``patches(x)`` what an embedding, or a convolution, multiplies its weight with
``rows(8:16)``                columns of an identity: what follows it becomes these rows, among zeros
``flat(W)``, ``channels(x)``  a convolution's weight as a matrix with a filter a row, its activations as one with channels as columns
``W [without 0·p]``           what vanished: ``0·p`` was multiplied by zero, ``p − p`` cancelled, ``n·n⁻¹`` cancelled as a divisor
============================  =====================================================================================================

Inputs and attributes have the names that the graph gives them, as short as possible while distinct: ``W``, ``lora_A``, ``0.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from dorafx._compat.operators import aten_name, is_overload
from dorafx.graphs.inputs import is_leaf
from dorafx.graphs.provenance import input_path

from .algebra import ONES, Atom, Chain, Diag, Expr, Mat, Mono, Poly, Vanished, count_matrices
from .lifter import Lifter
from .values import AtomInfo, MatrixValue, Value, VectorValue

Term = MatrixValue | VectorValue | Expr | Poly | Chain | Mat | Diag | Atom | fx.Node | None
"""What can be shown. A node stands for the value that it was lifted to."""

_LONGEST, _LONGEST_ACTIVATION = 200, 40  # the most characters of an operator with its operands
_DEPTH = 4  # the most nested operators
# Private-use characters: placeholders of leaves and norms, whose names are chosen at the end; the mark of a node printed by its name.
_LEAF, _NORM, _UNNAMED = 0xF0000, 0x100000, "\ue000"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")


def show(lift: Lifter, term: Term) -> str:
    """A term in the notation of this module.

    Args:
        lift: the lifter that created the term; it knows what the indeterminates stand for.
        term: a value, an expression, a polynomial, a chain, one factor or indeterminate of these, or a node of the graph.
    """
    notation = Notation(lift, (term,))
    text = notation.term(term)
    norms = ", ".join(f"{name} = {norm}" for name, norm in notation.norms().items())
    return f"{text} where {norms}" if norms else text


def term_of(value: Value) -> Expr | Poly:
    """The term of a value; for a single token, the one that shows its product."""
    if isinstance(value, MatrixValue):
        return value.expr
    return value.poly if value.row is None else value.row


class Notation:
    """Common names for everything in several terms, so that they can be read side by side.

    Args:
        lift: the lifter that created the terms.
        terms: the terms.
    """

    def __init__(self, lift: Lifter, terms: Sequence[Term]) -> None:
        self._lift = lift
        self._written: dict[tuple[Atom, bool, int], str] = {}
        self._same: dict[str, list[int]] = {}
        norms: dict[Atom, None] = {}
        for term in map(self._read, terms):
            if isinstance(term, Expr):
                self._collect_norms(term, norms)
        # Norms that also occur with a gradient: where such a norm is detached, it is printed with ``detach``.
        self._bare = {atom.id for atom in norms if not atom.detached}
        # The text shows which names are needed, and how short they can be; until then a placeholder stands for each.
        self._norms = {atom_id: chr(_NORM + i) for i, atom_id in enumerate(dict.fromkeys(a.id for a in norms))}
        self._leaves: dict[fx.Node, str] = {}
        written = "".join(map(self._marked, terms)) + "".join(map(self._definition, self._norms))
        taken = set(re.findall(rf"{_UNNAMED}(\w+)", written))
        self._names = _short_names([leaf for leaf, mark in self._leaves.items() if mark in written], taken)
        letter = "n" if "n" not in {*self._names.values(), *taken} else "norm"
        several = len(self._norms) > 1
        self._letters = {
            mark: f"{letter}{str(i).translate(_SUBSCRIPTS)}" if several else letter
            for i, mark in enumerate(self._norms.values(), 1)
        }

    # -- results --------------------------------------------------------------------------------------------------------

    def term(self, term: Term) -> str:
        """One of the terms."""
        return self._named(self._marked(term))

    def norms(self) -> dict[str, str]:
        """The definitions of the norms in the terms, by name."""
        return {self._letters[mark]: self._named(self._definition(atom_id)) for atom_id, mark in self._norms.items()}

    def _named(self, text: str) -> str:
        names = {mark: self._names.get(leaf, leaf.name) for leaf, mark in self._leaves.items()}
        return text.translate({ord(mark): name for mark, name in {**names, **self._letters, _UNNAMED: ""}.items()})

    def _marked(self, term: Term) -> str:
        if term is None:
            return "unknown"
        if isinstance(term, fx.Node) and self._lift.values.get(term) is None:
            return self._node(term, 0)
        return self._text(term, False, 0)

    def _definition(self, atom_id: int) -> str:
        return self._written_out(Atom(atom_id, atom_id not in self._bare), False, 0)

    # -- terms ----------------------------------------------------------------------------------------------------------

    def _read(self, term: Term) -> Expr | Poly:
        if isinstance(term, fx.Node):
            term = self._lift.values.get(term)
        if isinstance(term, (MatrixValue, VectorValue)):
            return term_of(term)
        if isinstance(term, Atom):
            return Poly.var(term)
        if isinstance(term, (Mat, Diag)):
            return Expr.chain((term,))
        if isinstance(term, (Expr, Poly)):
            return term
        return Expr.chain(term) if term is not None else Poly(())

    def _collect_norms(self, term: Expr | Poly, into: dict[Atom, None]) -> None:
        for atom in term.atoms():
            info = self._lift.atom_of(atom)
            if info.kind == "norm" and atom not in into:
                into[atom] = None
                assert info.expr is not None
                self._collect_norms(info.expr, into)
            elif info.poly is not None:
                self._collect_norms(info.poly, into)

    def _text(self, term: Term, plain: bool, depth: int) -> str:
        read = self._read(term)
        text = self._expr(read, plain, depth) if isinstance(read, Expr) else self._poly(read, plain, depth)
        value = self._lift.values.get(term) if isinstance(term, fx.Node) else term
        return f"({text})²" if isinstance(value, MatrixValue) and value.squared else text

    # -- sums and products ----------------------------------------------------------------------------------------------

    def _expr(self, expr: Expr, plain: bool, depth: int = 0) -> str:
        """``plain``: inside a ``detach``, where atoms need no ``detach`` of their own."""
        if not plain and self._is_detached(expr.atoms()):
            return f"detach({self._expr(expr, True, depth)})"

        def order(item: tuple[tuple[Mono, Chain], float]) -> tuple[bool, int, int]:
            chain = item[0][1]
            return chain[:1] == (Mat(ONES),), count_matrices(chain), len(chain)

        parts = []
        for (scalars, chain), c in sorted(expr.items, key=order):
            product = self._chain(scalars, chain, plain, depth)
            parts.append((c, product))
        return _sum(parts) + self._vanished(expr.vanished)

    def _chain(self, scalars: Mono, chain: Chain, plain: bool, depth: int) -> str:
        atoms = list(Expr.chain(chain).atoms())
        inside = plain or (len(atoms) > 1 and self._is_detached(atoms))
        factors = [
            f"D({self._mono(f.mono, inside, depth)})" if isinstance(f, Diag) else self._mat(f, inside, depth)
            for f in chain
        ]
        text = "·".join(factors) or "I"
        if inside and not plain:
            text = f"detach({text})"
        return f"{self._mono(scalars, plain, depth)}·{text}" if scalars else text

    def _mat(self, mat: Mat, plain: bool, depth: int) -> str:
        return self._atom(mat.atom, plain, depth) + ("ᵀ" if mat.transposed else "")

    def _poly(self, poly: Poly, plain: bool, depth: int = 0) -> str:
        if not plain and self._is_detached(poly.atoms()):
            return f"detach({self._poly(poly, True, depth)})"
        items = sorted(poly.items, key=lambda item: not item[0])  # a number comes last
        return _sum([(c, self._mono(m, plain, depth)) for m, c in items]) + self._vanished(poly.vanished)

    def _mono(self, mono: Mono, plain: bool, depth: int) -> str:
        return "·".join(
            self._power(atom, e, plain, depth) for atom, e in sorted(mono, key=lambda factor: factor[1] < 0)
        )

    def _power(self, atom: Atom, exponent: int, plain: bool, depth: int) -> str:
        info = self._lift.atom_of(atom)
        if info.kind == "reciprocal":  # (1/p)ᵉ is p⁻ᵉ
            exponent = -exponent
        text = self._atom(atom, plain, depth)
        if exponent == 1:
            return text
        if text.startswith(("√", "Σ")):
            text = f"({text})"
        return text + str(exponent).translate(_SUPERSCRIPTS)

    def _is_detached(self, atoms: Iterable[Atom]) -> bool:
        """Whether every atom that requires a gradient is detached, and there is such an atom."""
        all_atoms = list(atoms)
        return any(a.detached for a in all_atoms) and all(
            a.detached or not self._lift.atom_of(a).requires_grad for a in all_atoms
        )

    def _vanished(self, lost: Iterable[Vanished]) -> str:
        notes: dict[int, str] = {}
        for v in sorted(lost):
            name = self._atom(v.atom, False, 0)
            if v.zeroed:
                notes[v.atom.id] = f"0·{name}⁻¹" if v.divisor else f"0·{name}"
            else:
                notes[v.atom.id] = f"{name}·{name}⁻¹" if v.divisor else f"{name} − {name}"
        return f" [without {', '.join(notes.values())}]" if notes else ""

    # -- indeterminates -------------------------------------------------------------------------------------------------

    def _atom(self, atom: Atom, plain: bool, depth: int) -> str:
        """An indeterminate, as one symbol or in parentheses."""
        name = self._norms.get(atom.id)
        if name is None:
            return self._written_out(atom, plain, depth)
        return f"detach({name})" if atom.detached and atom.id in self._bare and not plain else name

    def _written_out(self, atom: Atom, plain: bool, depth: int) -> str:
        if atom.detached and not plain:
            return f"detach({self._written_out(atom, True, depth)})"
        key = (Atom(atom.id), plain, depth)
        if key not in self._written:
            self._written[key] = self._numbered(atom, self._base(atom, self._lift.atom_of(atom), plain, depth))
        return self._written[key]

    def _numbered(self, atom: Atom, text: str) -> str:
        others = self._same.setdefault(text, [])
        if atom.id not in others:
            others.append(atom.id)
        number = others.index(atom.id) + 1
        return text if number == 1 else text + str(number).translate(_SUBSCRIPTS)

    def _base(self, atom: Atom, info: AtomInfo, plain: bool, depth: int) -> str:
        if info.kind == "ones":
            return "𝟙"
        if info.expr is not None:
            return self._of_squares(info, plain, depth)
        if info.poly is not None:
            inner = self._poly(info.poly, plain, depth)
            if info.kind == "reciprocal":
                return f"({inner})"
            if info.kind == "repeated":
                return f"repeat({inner})"
            if info.kind == "rounded":
                return f"{_dtype(info.dtype)}({inner})"
            return f"{'max' if info.kind == 'clamp_min' else 'maximum'}({inner}, {_number(info.eps)})"
        if info.rounds is not None:
            return f"{_dtype(info.dtype)}({self._expr(info.rounds, plain, depth)})"
        if info.kind in ("onehot", "unfold"):
            of = self._expr(info.of, plain, depth) if isinstance(info.of, Expr) else self._operand(info.of, depth)
            return f"{'onehot' if info.kind == 'onehot' else 'patches'}({of})"
        if info.kind == "selection":
            return f"rows({info.rows[0]}:{info.rows[0] + info.rows[1]})"
        text = self._node(info.node, depth, atom)
        return {"filter": f"flat({text})", "channels": f"channels({text})"}.get(info.kind, text)

    def _of_squares(self, info: AtomInfo, plain: bool, depth: int) -> str:
        assert info.expr is not None
        inner = self._expr(info.expr, plain, depth)
        side = ("_col" if info.span == 1 else "_channel") if info.side == "col" else ""
        if info.kind == "norm" and not info.eps:
            return f"‖{inner}‖{side}"
        squares = f"Σ{side}({inner})²"
        return squares if info.kind == "sumsq" else f"√({squares} + {_number(info.eps)})"

    # -- nodes ----------------------------------------------------------------------------------------------------------

    def _node(self, node: fx.Node | None, depth: int, atom: Atom | None = None) -> str:
        """A node by its operator. ``atom``: the indeterminate that stands for the node, even if its term is known."""
        if node is None:
            return "unknown"
        if is_leaf(node):
            return self._leaves.setdefault(node, chr(_LEAF + len(self._leaves)))
        if depth >= _DEPTH:
            return _UNNAMED + node.name
        of_weights = atom is not None and self._lift.weights.is_made_of_weights(Expr.mat(atom))
        value = self._lift.values.get(node)
        is_one = value is None or any(self._lift.atom_of(a).node is node for a in self._read(value).atoms())
        if atom is not None and not is_one:  # a sum that is one indeterminate in a product
            text = self._text(value, True, depth + 1)
            return f"({text})" if self._is_short(text, of_weights) else _UNNAMED + node.name
        operator = _operator(node)
        operands = [self._operand(a, depth) for a in node.args]
        if operator == "getitem" and len(operands) == 2:
            text = f"{operands[0]}[{operands[1].removeprefix('[').removesuffix(']')}]"
        else:
            operands += [f"{name}={self._operand(a, depth)}" for name, a in node.kwargs.items()]
            text = f"{operator}({', '.join(operands)})"
        return text if self._is_short(text, of_weights) else _UNNAMED + node.name

    def _is_short(self, text: str, of_weights: bool) -> bool:
        """Whether an operator is printed with its operands. Activations get less room: how a weight is computed is of more interest."""
        return len(text) <= _LONGEST if of_weights else len(text) <= _LONGEST_ACTIVATION and _UNNAMED not in text

    def _operand(self, argument: Any, depth: int) -> str:
        if isinstance(argument, fx.Node):
            if self._lift.values.get(argument) is None:
                return self._node(argument, depth + 1)
            return self._text(argument, True, depth + 1)
        if isinstance(argument, (list, tuple)):
            return f"[{', '.join(self._operand(a, depth) for a in argument)}]"
        if isinstance(argument, (int, float)) and not isinstance(argument, bool):
            return f"−{_number(-argument)}" if argument < 0 else _number(argument)
        if isinstance(argument, slice):
            ends = (argument.start, argument.stop, *(() if argument.step is None else (argument.step,)))
            return ":".join("" if end is None else self._operand(end, depth) for end in ends)
        if isinstance(argument, torch.dtype):
            return _dtype(argument)
        if argument is Ellipsis:
            return "…"
        return f'"{argument}"' if isinstance(argument, str) else str(argument)


def _sum(parts: list[tuple[float, str]]) -> str:
    """A sum of numbers times products, with the first positive one in front."""
    first = next((i for i, (c, _) in enumerate(parts) if c > 0), 0)
    text = ""
    for c, product in [*parts[first : first + 1], *parts[:first], *parts[first + 1 :]]:
        size = abs(c)
        term = product if size == 1 and product else f"{_number(size)}·{product}" if product else _number(size)
        negative = c < 0
        text += (f" − {term}" if negative else f" + {term}") if text else (f"−{term}" if negative else term)
    return text or "0"


def _number(value: float) -> str:
    return f"{value:.6g}"


def _dtype(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")


def _operator(node: fx.Node) -> str:
    target: Any = node.target
    name = aten_name(target) if is_overload(target) else None
    return name or str(getattr(target, "__name__", target))


def _path(node: fx.Node) -> list[str]:
    """Where an input or an attribute comes from, outermost first."""
    parts = [part for part in input_path(node).split(".") if part]
    if parts:
        return parts
    # Tracers number arguments, as in ``x_1``; Dynamo's names without a source look like ``L_args_0_``.
    target = re.sub(r"^L_|_$", "", str(node.target))
    return [re.sub(r"_\d+$", "", target) or str(node.target)]


def _short_names(leaves: list[fx.Node], taken: set[str]) -> dict[fx.Node, str]:
    """A name for each leaf that is not taken: the last part of its path that is in no other path, or as much of the path's end as makes
    it unique."""
    paths = {leaf: _path(leaf) for leaf in leaves}
    names: dict[fx.Node, str] = {}
    for leaf, path in paths.items():
        others = [p for other, p in paths.items() if other is not leaf]
        there = taken.union(*others)
        one = next((part for part in reversed(path) if part not in there and not part.isdigit()), None)
        if one is not None:
            names[leaf] = one
            continue
        ends: Iterator[list[str]] = (path[-count:] for count in range(1, len(path) + 1))
        end = next((end for end in ends if len(end) > 1 and all(p[-len(end) :] != end for p in others)), None)
        names[leaf] = ".".join(end) if end is not None else leaf.name
    return names
