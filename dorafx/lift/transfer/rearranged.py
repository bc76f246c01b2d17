"""``einsum`` as tracers decompose it: axes are moved, added and merged before and after a batched product.

Every axis of a rearranged tensor carries the letters of the source's axes that it consists of. A batched product gives the axes that it
sums over the same letters in both operands. Once the axes are those of a matrix or of a vector again, the letters are those of an
``einsum`` of the sources, and are read as such.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from dorafx.graphs.operators import arguments, canonical_name, first_argument, permuted_axes
from dorafx.graphs.tensors import tensor_of

from ..algebra import Mat
from ..lifter import Lifter, Reading, transfer
from ..values import FLOAT_DTYPES, MatrixValue, Value, VectorValue, loses_accuracy
from .arithmetic import same_shape, same_size
from .einsum import by_letters
from .filters import filters_by_letters, swapped_axes
from .indexing import takes_everything

_MOST_OPERANDS = 6
_letters = itertools.count()


@dataclass(frozen=True)
class Subscripts:
    """A tensor as an ``einsum``: ``sources`` with a letter for each axis (None for an axis of size 1), and the letters of each axis of
    the result. ``detached``: some step recorded no gradients."""

    sources: tuple[tuple[fx.Node, tuple[int | None, ...]], ...]
    axes: tuple[tuple[int, ...], ...]
    sizes: dict[int, Any]
    detached: bool = False

    def renamed(self, names: dict[int, int]) -> Subscripts:
        return Subscripts(
            tuple((n, tuple(None if s is None else names.get(s, s) for s in letters)) for n, letters in self.sources),
            tuple(tuple(names.get(s, s) for s in axis) for axis in self.axes),
            {names.get(s, s): size for s, size in self.sizes.items()},
            self.detached,
        )


def _of(lift: Lifter, arg: Any) -> Subscripts | None:
    """The subscripts of an argument: those known already, or a new letter for each axis."""
    known = lift.subscripts.get(arg) if isinstance(arg, fx.Node) else None
    tensor = tensor_of(arg)
    if known is not None or tensor is None or tensor.dtype not in FLOAT_DTYPES or arg in lift.written:
        return known
    letters = tuple(None if isinstance(size, int) and size == 1 else next(_letters) for size in tensor.shape)
    sizes = {s: size for s, size in zip(letters, tensor.shape) if s is not None}
    return Subscripts(((arg, letters),), tuple(() if s is None else (s,) for s in letters), sizes)


# -- one operand ------------------------------------------------------------------------------------------------------


def _viewed(lift: Lifter, node: fx.Node) -> Subscripts | None:
    """Axes are merged, or split where they were merged before."""
    source, before, after = _of(lift, first_argument(node)), tensor_of(first_argument(node)), tensor_of(node)
    if source is None or before is None or after is None or after.dtype not in FLOAT_DTYPES:
        return None
    if before.dtype != after.dtype:  # view(dtype) reinterprets bits
        return None
    rest = [s for axis in source.axes for s in axis]
    axes: list[tuple[int, ...]] = []
    for size in after.shape:
        taken: list[int] = []
        product: Any = 1
        while not same_size(product, size):
            if not rest:
                return None
            taken.append(rest.pop(0))
            product = product * source.sizes[taken[-1]]
        axes.append(tuple(taken))
    return None if rest else replace(source, axes=tuple(axes))


def _permuted(lift: Lifter, node: fx.Node) -> Subscripts | None:
    source = _of(lift, first_argument(node))
    return _moved(source, permuted_axes(node))


def _transposed(lift: Lifter, node: fx.Node) -> Subscripts | None:
    source = _of(lift, first_argument(node))
    dims = swapped_axes(node)
    if source is None or dims is None:
        return None
    order = list(range(len(source.axes)))
    first, second = (d % len(order) for d in dims)
    order[first], order[second] = second, first
    return _moved(source, order)


def _attribute(lift: Lifter, node: fx.Node) -> Subscripts | None:
    source = _of(lift, first_argument(node))
    if source is None or node.args[1] not in ("T", "mT") or len(source.axes) < 2:
        return None
    count = len(source.axes)
    return _moved(source, [*range(count - 2), count - 1, count - 2] if node.args[1] == "mT" else range(count)[::-1])


def _moved(source: Subscripts | None, order: Any) -> Subscripts | None:
    if source is None or not all(isinstance(d, int) for d in order) or len(order) != len(source.axes):
        return None
    return replace(source, axes=tuple(source.axes[d] for d in order))


def _kept(lift: Lifter, node: fx.Node) -> Subscripts | None:
    before, after = tensor_of(first_argument(node)), tensor_of(node)
    if before is None or after is None or not same_shape(before.shape, after.shape) or before.device != after.device:
        return None
    if before.dtype not in FLOAT_DTYPES or after.dtype not in FLOAT_DTYPES or loses_accuracy(before.dtype, after.dtype):
        return None
    return _of(lift, first_argument(node))


def _selected(lift: Lifter, node: fx.Node) -> Subscripts | None:
    """The only slice along an axis, or an index that takes everything."""
    args = arguments(node, "input", "dim", "index")
    before, dim = tensor_of(args.get("input")), args.get("dim")
    if lift.name_of(node) == "getitem":
        if takes_everything(node.args[1]):
            return _viewed(lift, node)
        dim = 0 if isinstance(node.args[1], int) and not isinstance(node.args[1], bool) else None
    if before is None or not isinstance(dim, int) or before.dim() < 2 or str(before.shape[dim]) != "1":
        return None
    return _viewed(lift, node)


# -- two operands -----------------------------------------------------------------------------------------------------


def _multiplied(lift: Lifter, node: fx.Node) -> Subscripts | None:
    args = arguments(node, "input", "other")
    both = args.get("input"), args.get("other")
    if not any(_is_opaque(lift, arg) for arg in both) and not all(_is_vector(lift, arg) for arg in both):
        return None  # the transfer functions of arithmetic know more
    left, right = _of(lift, args.get("input")), _of(lift, args.get("other"))
    if left is None or right is None or len(left.axes) != len(right.axes):
        return None
    return _joined(left, right, list(zip(range(len(left.axes)), range(len(left.axes)))), ())


def _is_vector(lift: Lifter, arg: Any) -> bool:
    value = lift.value(arg)
    return isinstance(value, VectorValue) and value.axis is not None


def _is_opaque(lift: Lifter, arg: Any) -> bool:
    """Whether an argument was rearranged so that only its letters are known."""
    value = lift.value(arg) if isinstance(arg, fx.Node) and arg in lift.subscripts else None
    if not isinstance(value, MatrixValue):
        return False
    ((_, chain), _c) = value.expr.items[0] if len(value.expr.items) == 1 else (((), ()), 0.0)
    return len(chain) == 1 and isinstance(chain[0], Mat) and lift.atom_of(chain[0].atom).node is arg


def _batched_product(lift: Lifter, node: fx.Node) -> Subscripts | None:
    args = arguments(node, "input", "other" if lift.name_of(node) == "matmul" else "mat2")
    left, right = _of(lift, args.get("input")), _of(lift, args.get("other", args.get("mat2")))
    if left is None or right is None or len(left.axes) != len(right.axes) or len(left.axes) < 3:
        return None
    leading = len(left.axes) - 2
    return _joined(left, right, [(i, i) for i in range(leading)] + [(leading + 1, leading)], (leading + 1,))


def _joined(
    left: Subscripts, right: Subscripts, shared: list[tuple[int, int]], summed: tuple[int, ...]
) -> Subscripts | None:
    """The product of two tensors that share axes (pairs of positions in left and right), summed over some axes of ``left``. An axis of
    size 1 in one of them is broadcast. None if gradients flow to one of them only: the term of the result has them for both or none."""
    if len(left.sources) + len(right.sources) > _MOST_OPERANDS or left.detached != right.detached:
        return None
    right = right.renamed({s: next(_letters) for s in right.sizes})
    names: dict[int, int] = {}
    axes = list(left.axes)
    for i, j in shared:
        axis, other = left.axes[i], right.axes[j]
        if axis and other:
            if len(axis) != len(other) or not all(
                same_size(left.sizes[s], right.sizes[t]) for s, t in zip(axis, other)
            ):
                return None
            names.update(zip(other, axis))
        elif i in summed and (axis or other):
            return None
        axes[i] = axis or other
    if summed:
        axes[summed[0]] = right.axes[-1]
    right = right.renamed(names)
    return Subscripts(
        (*left.sources, *right.sources), tuple(axes), {**right.sizes, **left.sizes}, left.detached or right.detached
    )


# -- reading ----------------------------------------------------------------------------------------------------------


def _value(lift: Lifter, subscripts: Subscripts) -> Value | None:
    """The term of a tensor by its letters; None if its axes are not those of a matrix or of a vector."""
    long = [i for i, axis in enumerate(subscripts.axes) if axis]
    value: Value | None = _filters(lift, subscripts, long)
    if value is not None:
        return lift.detach(value) if subscripts.detached else value
    if not long or len(subscripts.axes[long[-1]]) != 1:
        return None
    if len(subscripts.sources) == 1:
        value = _rearranged(lift, subscripts, long)
    else:
        value = by_letters(lift, *_equation(subscripts, long))
        if isinstance(value, VectorValue):
            value = replace(value, axis=long[0] - len(subscripts.axes)) if len(long) == 1 else None
        elif long[-1] != len(subscripts.axes) - 1:
            value = None
    return lift.detach(value) if value is not None and subscripts.detached else value


def _filters(lift: Lifter, subscripts: Subscripts, long: list[int]) -> MatrixValue | None:
    """A product that lies as filters ``[rows, ...]``, of which some axes may be of size one."""
    axes = subscripts.axes
    if len(axes) < 3 or len(subscripts.sources) < 2 or len(long) < 2 or long[0] != 0 or len(axes[0]) != 1:
        return None
    if long == [0, len(axes) - 1] and len(axes[-1]) == 1:
        return None  # a matrix
    inputs, result, sources = _equation(subscripts, long)
    for letters, (_, source_letters) in zip(inputs, subscripts.sources):
        if len(source_letters) > 2 and (
            source_letters[0] is None or (source_letters[-1] is None and letters[1:] != result[1:])
        ):
            return None
    return filters_by_letters(lift, inputs, result, sources)


def _rearranged(lift: Lifter, subscripts: Subscripts, long: list[int]) -> Value | None:
    ((source, letters),) = subscripts.sources
    count = len(subscripts.axes)
    known = [s for s in letters if s is not None]
    if len(known) == 1:
        vector = lift.vector(source)
        fits = vector is not None and vector.axis is not None
        return VectorValue(vector.poly, long[0] - count) if fits and vector is not None else None
    value = lift.value(source)
    if not isinstance(value, MatrixValue) or value.squared or value.layout != "last" or long[-1] != count - 1:
        return None
    order = [s for axis in subscripts.axes for s in axis]
    if order == known and letters[-1] is not None:
        return value
    return replace(value, expr=value.expr.transposed()) if len(letters) == 2 and order == known[::-1] else None


def _equation(subscripts: Subscripts, long: list[int]) -> tuple[list[str], str, list[fx.Node]]:
    """Subscripts as text, of each source and of the result. Axes of size 1 have no letter, except if there are exactly two of them that
    can only belong together."""
    names = {s: chr(ord("a") + i) for i, s in enumerate(subscripts.sizes)}
    inputs = ["".join(names[s] for s in letters if s is not None) for _, letters in subscripts.sources]
    result = "".join(names[s] for axis in subscripts.axes for s in axis)
    short = [i for i, (_, letters) in enumerate(subscripts.sources) if len(letters) == 2 and letters.count(None) == 1]
    missing = len(long) == 1 and long[0] == len(subscripts.axes) - 1
    if len(short) + missing == 2:
        for i in short:
            inputs[i] = "1" + inputs[i] if subscripts.sources[i][1][0] is None else inputs[i] + "1"
        result = "1" + result if missing else result
    return inputs, result, [node for node, _ in subscripts.sources]


_TRACES: dict[str, Callable[[Lifter, fx.Node], Subscripts | None]] = {
    "view": _viewed,
    "permute": _permuted,
    "transpose": _transposed,
    "getattr": _attribute,
    "identity": _kept,
    "cast": _kept,
    "select": _selected,
    "getitem": _selected,
    "mul": _multiplied,
    "bmm": _batched_product,
    "matmul": _batched_product,
}


def _of_several(name: str | None, subscripts: Subscripts | None) -> bool:
    """Whether the letters are those of a product of several sources. The operator's own transfer function sees only the last step of
    such a product (except for an elementwise product, of which it sees everything)."""
    return subscripts is not None and len(subscripts.sources) > 1 and name != "mul"


@transfer(*_TRACES, reading=Reading.TAKEN_APART)
def taken_apart(lift: Lifter, node: fx.Node) -> Value | None:
    """Follow the letters of the axes; a product of several sources is read by them."""
    name = canonical_name(node)
    subscripts = _TRACES[name](lift, node) if name is not None else None
    if subscripts is None:
        lift.subscripts.pop(node, None)  # from an attempt before an operand was sealed
        return None
    if not lift.records_gradients:
        subscripts = replace(subscripts, detached=True)
    lift.subscripts[node] = subscripts
    return _value(lift, subscripts) if _of_several(name, subscripts) else None


@transfer(*_TRACES, reading=Reading.MOVED)
def moved(lift: Lifter, node: fx.Node) -> Value | None:
    """Read a rearranged tensor by the letters of its axes, if its layout did not suffice."""
    subscripts = lift.subscripts.get(node)
    of_several = _of_several(canonical_name(node), subscripts)
    return _value(lift, subscripts) if subscripts is not None and not of_several else None
