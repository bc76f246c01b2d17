"""One name for every spelling of an operator.

``torch.add``, ``Tensor.add``, ``operator.add`` and ``aten.add.Tensor`` are one operator to the lifter, so the same transfer functions
serve Dynamo graphs, ``make_fx`` graphs, exported programs and ``fx.symbolic_trace``.
"""

from __future__ import annotations

import builtins
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from dorafx._compat.operators import aten_name, is_overload

from .lookup import name_in_torch, view_of

# Canonical name -> its names as a torch function, a Tensor method, a Python operator or an aten packet.
_ALIASES: dict[str, tuple[str, ...]] = {
    "add": ("add", "__add__", "__radd__"),
    "sub": ("sub", "subtract", "__sub__"),
    "rsub": ("rsub", "__rsub__"),
    "mul": ("mul", "multiply", "__mul__", "__rmul__"),
    "div": ("div", "divide", "true_divide", "truediv", "__truediv__"),
    "neg": ("neg", "negative", "__neg__"),
    "abs": ("abs", "absolute", "__abs__"),
    "reciprocal": ("reciprocal",),
    "pow": ("pow", "__pow__"),
    "square": ("square",),
    "float_power": ("float_power",),
    "sqrt": ("sqrt",),
    "rsqrt": ("rsqrt",),
    "sum": ("sum",),
    "mean": ("mean",),
    "maximum": ("maximum",),
    "addcmul": ("addcmul",),
    "addcdiv": ("addcdiv",),
    "lerp": ("lerp",),
    "arange": ("arange",),
    "full": ("full",),
    "zeros": ("zeros",),
    "ones": ("ones",),
    "full_like": ("full_like",),
    "zeros_like": ("zeros_like",),
    "ones_like": ("ones_like",),
    "new_full": ("new_full",),
    "new_zeros": ("new_zeros",),
    "new_ones": ("new_ones",),
    "tensor": ("tensor", "scalar_tensor"),
    "clamp_min": ("clamp_min",),
    "clamp": ("clamp", "clip"),
    "norm": ("norm",),
    "linalg_norm": ("linalg_norm",),
    "vector_norm": ("linalg_vector_norm",),
    "matmul": ("matmul", "mm", "__matmul__"),
    "linear": ("linear", "inner"),
    "addmm": ("addmm",),
    "mv": ("mv",),
    "bmm": ("bmm",),
    "baddbmm": ("baddbmm",),
    "outer": ("outer", "ger"),
    "einsum": ("einsum",),
    "tensordot": ("tensordot",),
    "normalize": ("normalize",),
    "weight_norm": ("_weight_norm",),
    "weight_norm_interface": ("_weight_norm_interface",),
    "conv": ("conv1d", "conv2d", "conv3d"),
    "convolution": ("convolution",),
    "embedding": ("embedding",),
    "transpose": ("transpose", "swapaxes", "swapdims"),
    "t": ("t", "numpy_T", "matrix_H", "T", "H", "mT", "mH", "adjoint"),
    "permute": ("permute",),
    "view": (
        "view",
        "reshape",
        "_unsafe_view",
        "unsqueeze",
        "squeeze",
        "flatten",
        "unflatten",
        "view_as",
        "reshape_as",
    ),
    "expand": ("expand", "expand_as", "broadcast_to"),
    "cast": ("to", "float", "half", "bfloat16", "double", "type", "type_as", "_to_copy", "cpu", "cuda"),
    "dequantize": ("dequantize",),
    "detach": ("detach",),
    "identity": ("clone", "contiguous", "alias", "positive"),
    "dropout": ("dropout", "native_dropout", "alpha_dropout", "feature_dropout"),
    "eye": ("eye",),
    "diag": ("diag", "diag_embed"),
    "diagonal": ("diagonal", "diagonal_copy"),
    "getattr": ("getattr",),
    "getitem": ("getitem", "__getitem__"),
    "slice": ("slice",),
    "select": ("select",),
    "stack": ("stack",),
    "cat": ("cat", "concat", "concatenate"),
    "pad": ("pad", "constant_pad_nd"),
}
CONVOLUTIONS: dict[str, tuple[str, ...]] = {
    "conv": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "convolution": (
        "input",
        "weight",
        "bias",
        "stride",
        "padding",
        "dilation",
        "transposed",
        "output_padding",
        "groups",
    ),
}
"""The arguments of convolutions, by canonical name; those of ``aten.convolution`` are others than of ``conv2d``."""

ZEROS = frozenset(("zeros", "zeros_like", "new_zeros"))
"""Canonical names of operators that make a tensor of zeros."""
_GRAD_MODES = {
    "_set_grad_enabled": "set_grad_enabled",
    "_enter_inference_mode": "enter_inference_mode",
    "_exit_inference_mode": "exit_inference_mode",
}
_LIBRARY_OPERATORS = dict.fromkeys(
    (
        "bitsandbytes.dequantize_4bit.default",
        "bitsandbytes.dequantize_blockwise.default",
        "bitsandbytes.int8_vectorwise_dequant.default",
        "dorafx.dequantize.default",
    ),
    "dequantize",
)
_BY_NAME = {alias: name for name, aliases in _ALIASES.items() for alias in aliases}


def _function_table() -> dict[Any, str]:
    table: dict[Any, str] = {}
    for namespace in (torch, F, operator, torch.Tensor):
        for alias, name in _BY_NAME.items():
            target = getattr(namespace, alias, None)
            if callable(target):
                table.setdefault(target, name)
    table[torch.linalg.norm] = "linalg_norm"
    table[torch.linalg.vector_norm] = "vector_norm"
    table[torch.linalg.multi_dot] = "multi_dot"
    table[torch.chain_matmul] = "multi_dot"
    table[builtins.getattr] = "getattr"
    table[builtins.abs] = "abs"
    return table


_FUNCTIONS = _function_table()


def canonical_name(node: fx.Node) -> str | None:
    """The lifter's name of a node's operator; None where the table does not know it."""
    if node.op == "call_method":
        return _BY_NAME.get(str(node.target)) or _looked_up(node)
    if node.op != "call_function":
        return None
    target = node.target
    if is_overload(target):
        aten = aten_name(target)
        if aten is None:
            return _LIBRARY_OPERATORS.get(str(target))
        return _BY_NAME.get(aten) or _looked_up(node)
    try:
        name = _FUNCTIONS.get(target)
    except TypeError:  # an unhashable callable, which cannot be torch's
        return None
    return name or _GRAD_MODES.get(getattr(target, "__name__", "")) or _looked_up(node)


def _looked_up(node: fx.Node) -> str | None:
    """The name of an operator that is not in the table, from torch's own name or from how its result lies in memory."""
    name = _BY_NAME.get(name_in_torch(node.target) or "") if node.op == "call_function" else None
    if name is None and (view := view_of(node)) is not None:
        name = view.name
    return name


def permuted_axes(node: fx.Node) -> tuple[Any, ...]:
    """For a ``permute``: the axes of the argument in the order of the result's axes."""
    if _known(node):
        dims: Any = node.kwargs.get("dims", node.args[1:])
        return tuple(dims[0]) if len(dims) == 1 and isinstance(dims[0], (tuple, list)) else tuple(dims)
    view = view_of(node)
    return view.order if view is not None else ()


def _known(node: fx.Node) -> bool:
    """Whether a node is in the table by its name, so that it has the usual arguments of that operator."""
    if node.op == "call_method":
        return node.target in _BY_NAME
    target: Any = node.target
    return (aten_name(target) or name_in_torch(target)) in _BY_NAME or target in _FUNCTIONS


# NumPy's argument names, which torch also accepts, and aten's name for the first argument.
_KEYWORDS = {
    "a": "input",
    "axis": "dim",
    "keepdims": "keepdim",
    "self": "input",
    "x": "input",
    "x1": "input",
    "x2": "other",
}


def arguments(node: fx.Node, *names: str) -> dict[str, Any]:
    """The node's arguments by name: positional ones in the order of ``names``, then keywords. Omitted arguments are left out."""
    out = dict(zip(names, node.args))
    for name, value in node.kwargs.items():
        known = _KEYWORDS.get(name, name)
        out[known if name not in names and known in names else name] = value
    return out


def first_argument(node: fx.Node) -> Any:
    """The operator's main operand, passed by position or by name; None if there is none."""
    if node.args:
        return node.args[0]
    return next(
        (node.kwargs[name] for name in ("input", "self", "tensor", "x", "a", "x1", "A") if name in node.kwargs), None
    )


def drops_nothing(node: fx.Node) -> bool:
    """Whether a dropout node is the identity, which draws no random numbers."""
    args = arguments(node, "input", "p", "training")
    return args.get("training") is False or args.get("p") == 0
