"""What a node makes of a norm: a tensor that is zero exactly where the norm is, a quotient, a mere look at it, or anything else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from dorafx._compat.operators import aten_name
from dorafx.graphs.operators import ZEROS, arguments, canonical_name, first_argument

from .closures import TRANSPOSES
from .hoist import NormKey
from .placements import is_redistribution

# Of a norm these are zero exactly where it is zero: each element is one of the norm's, or a function of one that keeps zeros.
_KEEP_ZEROS = frozenset(
    ("abs", "cast", "chunk", "data", "detach", "expand", "flip", "fliplr", "flipud", "gather", "getitem", "hsplit", "identity",
     "index", "index_select", "movedim", "moveaxis", "narrow", "neg", "permute", "repeat", "repeat_interleave", "roll", "select",
     "slice", "split", "split_with_sizes", "sqrt", "square", "t", "take", "take_along_dim", "tensor_split", "tile", "transpose",
     "unbind", "unsafe_chunk", "unsafe_split", "view")
)  # fmt: skip
_JOINS = frozenset(("cat", "stack", "hstack", "vstack", "dstack", "column_stack"))
_POWERS = frozenset(("pow", "float_power"))
# Which argument of a quotient is the divisor: its place and its name.
_DIVISORS = {"div": (1, "other"), "reciprocal": (0, "input"), "rsqrt": (0, "input"), "addcdiv": (2, "tensor2")}
# Of those that write to their divisor (``reciprocal_``) none: they would write to a copy.
_IN_PLACE = {
    "div_": "div",
    "divide_": "div",
    "true_divide_": "div",
    "__itruediv__": "div",
    "itruediv": "div",
    "addcdiv_": "addcdiv",
}
_REFLECTED = ("__rtruediv__", "__rdiv__")
# These take a shape, a dtype or a truth of a tensor, no number that could be divided by.
_LOOKS = frozenset(
    ("dim", "empty_like", "eq", "full_like", "ge", "gt", "isfinite", "isinf", "isnan", "le", "len", "lt", "ne", "new_empty",
     "new_full", "new_ones", "new_zeros", "numel", "ones_like", "rand_like", "randn_like", "size", "stride", "sym_numel",
     "sym_size", "zeros_like")
)  # fmt: skip
_LAYOUT = frozenset(("device", "dtype", "is_cuda", "layout", "ndim", "requires_grad", "shape"))


@dataclass(frozen=True)
class Reached:
    """A tensor that is zero exactly where norms are, or a list of such tensors.

    Attributes:
        keys: the norms. Where there are several, an element is zero where one of some of them is, as in a product.
        negative: whether it may have negative elements; a norm has none.
    """

    keys: frozenset[NormKey]
    negative: bool = False


Outputs = Reached | tuple["Reached | None", ...]
"""Of a node with one value, or with several of which not all are reached."""


def keys_of(value: Outputs | None) -> frozenset[NormKey]:
    """All norms that a value comes from."""
    if value is None or isinstance(value, Reached):
        return value.keys if value is not None else frozenset()
    return frozenset().union(*map(keys_of, value))


def name_of(node: fx.Node) -> str:
    """The canonical name of an operator, of one that works in place too."""
    target: Any = node.target
    name = target if isinstance(target, str) else aten_name(target) or getattr(target, "__name__", "")
    return (
        _IN_PLACE.get(str(name)) or canonical_name(node) or str(name).strip("_" if str(name).startswith("__") else "")
    )


def zeros_kept(node: fx.Node, reached: dict[fx.Node, Outputs]) -> Outputs | None:
    """What a node makes of the tensors reached so far; None if it is not known to be zero exactly where norms are."""
    inputs = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or reached.keys().isdisjoint(inputs) or "out" in node.kwargs:
        return None
    first = first_argument(node)
    main = reached.get(first) if isinstance(first, fx.Node) else None
    name = name_of(node)
    if isinstance(main, tuple):
        return main[node.args[1]] if is_part(node, main) else None  # type: ignore[index]
    if is_redistribution(node):
        return main
    if name == "mul":
        return _product(node, inputs, reached)
    if name == "where":  # one norm or another
        return _all_of(node.args[1:], reached) if len(node.args) == 3 else None
    if name in _JOINS:
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        return _all_of(tensors, reached) if isinstance(tensors, (list, tuple)) else main
    if name in ("maximum", "fmax"):
        return _maximum(arguments(node, "input", "other"), reached)
    if main is None:
        return None
    if name == "getattr":
        return main if node.args[1] in (*TRANSPOSES, "data") else None
    if name == "div":  # by a number
        number = _number(node, 1, "other")
        divides = number is not None and len(inputs) == 1 and "rounding_mode" not in node.kwargs
        return Reached(main.keys, main.negative or (number or 0) < 0) if divides else None
    if name in _POWERS:
        exponent = _number(node, 1, "exponent")
        return main if exponent is not None and exponent > 0 else None
    if name in ("clamp", "clamp_max", "clamp_min", "relu"):
        return main if _clamps_no_zero(node, name, main) else None
    if name in ("abs", "square"):
        return Reached(main.keys)
    # Sizes, and a tensor whose shape or dtype is taken, may be other inputs.
    return Reached(main.keys, main.negative or name == "neg") if name in _KEEP_ZEROS else None


def is_part(node: fx.Node, value: Outputs) -> bool:
    """Whether a node is one of the values of another one that has several."""
    if not isinstance(value, tuple) or name_of(node) != "getitem" or len(node.args) != 2:
        return False
    place = node.args[1]
    return isinstance(place, int) and -len(value) <= place < len(value)


def is_root(node: fx.Node) -> bool:
    """Whether the derivative of a node at zero is infinite."""
    exponent = _number(node, 1, "exponent") if name_of(node) in _POWERS else None
    return name_of(node) == "sqrt" or (exponent is not None and 0 < exponent < 1)


def divisor_of(node: fx.Node) -> fx.Node | None:
    """What a node divides by; None if it does not divide by a node."""
    if node.op not in ("call_function", "call_method"):
        return None
    if node.target in _REFLECTED:
        value: Any = node.args[0]
        return value if isinstance(value, fx.Node) else None
    name = name_of(node)
    if name in _POWERS:
        exponent = _number(node, 1, "exponent")
        place, argument = (0, "input") if exponent is not None and exponent < 0 else (None, "")
    else:
        place, argument = _DIVISORS.get(name, (None, ""))
    if place is None:
        return None
    names = [f"argument {i}" for i in range(place)] + [argument]
    value = arguments(node, *names).get(argument)
    return value if isinstance(value, fx.Node) else None


def replace_divisor(node: fx.Node, divisor: fx.Node, guarded: fx.Node) -> None:
    """In ``n / n`` or ``n.addcdiv(n, n)`` the other operands stay."""
    if node.target in _REFLECTED or name_of(node) in ("reciprocal", "rsqrt", *_POWERS):
        place = 0
    else:
        place = _DIVISORS[name_of(node)][0]
    if len(node.args) > place:
        node.args = (*node.args[:place], guarded, *node.args[place + 1 :])
    else:
        node.kwargs = {name: guarded if value is divisor else value for name, value in node.kwargs.items()}


def only_looks(node: fx.Node, value: fx.Node) -> bool:
    """Whether a node takes no numbers of a value, or nobody has what it makes of them."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = name_of(node)
    if name == "getattr":
        return node.args[1] in _LAYOUT
    if name in ("cast", "expand", "view"):  # of another tensor
        return first_argument(node) is not value
    return name in _LOOKS or (not node.users and canonical_name(node) is not None and "out" not in node.kwargs)


def _all_of(values: Any, reached: dict[fx.Node, Outputs]) -> Reached | None:
    parts = [reached.get(v) if isinstance(v, fx.Node) else None for v in values]
    whole = [part for part in parts if isinstance(part, Reached)]
    if not whole or len(whole) < len(parts):
        return None
    return Reached(frozenset().union(*(part.keys for part in whole)), any(part.negative for part in whole))


def _product(node: fx.Node, inputs: list[fx.Node], reached: dict[fx.Node, Outputs]) -> Reached | None:
    """Zero where a factor is, if all factors are norms or numbers."""
    product = _all_of(inputs, reached)
    numbers: list[Any] = [v for v in (*node.args, *node.kwargs.values()) if not isinstance(v, fx.Node)]
    if product is None or not all(isinstance(v, (int, float)) and v != 0 for v in numbers):
        return None
    return Reached(product.keys, product.negative or any(v < 0 for v in numbers))


def _maximum(operands: dict[str, Any], reached: dict[fx.Node, Outputs]) -> Reached | None:
    """Of norms, or of a norm and zeros."""
    nodes = [v for v in operands.values() if isinstance(v, fx.Node)]
    norms = [v for v in nodes if name_of(v) not in ZEROS]
    largest = _all_of(norms, reached) if len(nodes) == 2 else None
    return None if largest is None or largest.negative else largest


def _clamps_no_zero(node: fx.Node, name: str, value: Reached) -> bool:
    """Whether ``clamp`` and the like make no zero of what is none, and nothing else of a zero."""
    names = {"clamp": ("input", "min", "max"), "clamp_max": ("input", "max"), "clamp_min": ("input", "min")}
    bounds = arguments(node, *names.get(name, ("input",)))
    low, high = 0 if name == "relu" else bounds.get("min"), bounds.get("max")
    if low is not None and not (isinstance(low, (int, float)) and low <= 0 and not value.negative):
        return False
    return high is None or (isinstance(high, (int, float)) and high > 0)


def _number(node: fx.Node, place: int, name: str) -> float | None:
    value = node.args[place] if len(node.args) > place else node.kwargs.get(name)
    return value if isinstance(value, (int, float)) else None
