"""Quantised weights: which nodes of a graph dequantise one, and what they dequantise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from dorafx._compat.tensors import is_wrapper
from dorafx.graphs.inputs import is_leaf
from dorafx.graphs.operators import arguments, canonical_name, first_argument
from dorafx.graphs.tensors import tensor_of

from .values import FLOAT_DTYPES, MatrixValue, Value

# torchao's weights of integers in groups along the rows, whose ``dequantize`` is ``(qdata - zero_point) * scale``.
_TORCHAO = frozenset(("Int8Tensor", "IntxUnpackedToInt8Tensor"))
# Their attributes that say how activations are quantised; None if these are not.
_OF_ACTIVATIONS = ("act_quant_kwargs", "act_quant_scale", "activation_quantization")


@dataclass(frozen=True)
class PackedWeight:
    """What a dequantised weight is made of; see :mod:`dorafx.ops.quantized` for the formats.

    Attributes:
        tensors: packed codes, scales and zeros (or None), each as a node and the name of one of its attributes, or "" for the node.
        format, shape, group, dtype: as :class:`dorafx.ops.quantized.Packed` has them.
    """

    tensors: tuple[tuple[fx.Node, str] | None, ...]
    format: str
    shape: tuple[int, int]
    group: int
    dtype: torch.dtype


def is_torchao(tensor: Any) -> bool:
    """Whether a tensor is one of the classes of torchao that are known here."""
    kind = type(tensor)
    return kind.__name__ in _TORCHAO and kind.__module__.startswith("torchao.")


def quantizes_activations(node: fx.Node, name: str) -> bool:
    """Whether a node reads a torchao weight that quantises the activations it is multiplied with. The result is then neither a product
    with the weight's value nor linear in the activations. Dequantising such a weight is not affected."""
    if name == "dequantize":
        return False
    values = (source.meta.get("example_value", source.meta.get("val")) for source in node.all_input_nodes)
    return any(is_torchao(v) and any(getattr(v, a, None) is not None for a in _OF_ACTIVATIONS) for v in values)


def dequantizes_by_a_cast(node: fx.Node, name: str) -> bool:
    """Whether a cast makes a plain tensor of a tensor subclass, as torchao's NF4Tensor does. The result is a value of its own."""
    source = tensor_of(first_argument(node)) if name == "cast" else None
    result = tensor_of(node)
    return source is not None and result is not None and is_wrapper(source) and not is_wrapper(result)


# Steps from codes to the weight that they stand for: operators by their canonical names, and others by torch's or Python's.
_UNPACKS = frozenset((
    "add", "addcdiv", "addcmul", "cast", "cat", "detach", "div", "expand", "getattr", "getitem", "identity", "mul", "neg",
    "permute", "rsub", "select", "slice", "stack", "sub", "t", "transpose", "view",
))  # fmt: skip
_UNPACKS_BY_NAME = frozenset((
    "and_", "bitwise_and", "bitwise_left_shift", "bitwise_not", "bitwise_or", "bitwise_right_shift", "bitwise_xor", "byte",
    "char", "floor_divide", "floordiv", "fmod", "gather", "index_select", "int", "ldexp", "long", "lshift", "mod", "or_",
    "remainder", "repeat", "repeat_interleave", "rshift", "short", "take", "tile", "where", "xor",
))  # fmt: skip


_ARITHMETIC = frozenset(("add", "addcdiv", "addcmul", "div", "mul", "rsub", "sub"))


class Codes:
    """The matrices of codes (integers, fp8) that a graph is given, and what it computes from them on the way to a weight.

    Args:
        is_without_product: whether a node is computed without a product of matrices.
    """

    def __init__(self, is_without_product: Callable[[fx.Node], bool]) -> None:
        self._is_without_product = is_without_product
        self._known: dict[fx.Node, bool] = {}

    def are_scaled_by(self, node: fx.Node, name: str, value: Value) -> bool:
        """Whether a node scales or shifts codes to a frozen weight, whatever the axes of its scales. The weight is what the layer
        multiplies with, and is one indeterminate; the codes are not."""
        tensor = tensor_of(node)
        if name not in _ARITHMETIC or not isinstance(value, MatrixValue) or tensor is None or tensor.requires_grad:
            return False
        items = value.expr.items
        by_a_number = len(items) <= 1 and all(len(chain) == 1 for (_, chain), _ in items)
        return not by_a_number and self._are_behind(node)

    def _are_behind(self, node: fx.Node) -> bool:
        known = self._known.get(node)
        if known is None:
            tensor = tensor_of(node)
            known = tensor is not None and tensor.dim() > 1 and all(size != 1 for size in tensor.shape)
            if is_leaf(node):
                known = known and tensor.dtype not in (*FLOAT_DTYPES, torch.bool)  # type: ignore[union-attr]
            else:
                known = known and _unpacks(node) and self._is_without_product(node)
                known = known and any(map(self._are_behind, node.all_input_nodes))
            self._known[node] = known
        return known


def _unpacks(node: fx.Node) -> bool:
    """Whether an operator may be a step from codes to the weight that they stand for: it moves, looks up, shifts, masks, casts or scales
    elements. Any other may multiply matrices of codes, as that of an operator library for quantised activations."""
    if canonical_name(node) in _UNPACKS:
        return True
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return str(name).partition(".")[0] in _UNPACKS_BY_NAME


def packed_weight(node: fx.Node) -> PackedWeight | str:
    """The quantised weight that a node dequantises, or (torchao) that is the node's value. Else the reason why it is unknown; an empty
    one for a node that has nothing to do with quantisation."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if is_torchao(value):
        return _torchao(node, value)
    name = str(node.target)
    if node.op != "call_function":
        source = node.args[0] if name == "dequantize" else None
        if not isinstance(source, fx.Node):
            return ""
        kind = type(source.meta.get("example_value", source.meta.get("val"))).__name__
        return f"this dequantisation of {kind} is not known"
    if name == "bitsandbytes.dequantize_4bit.default":
        args = arguments(node, "A", "absmax", "blocksize", "quant_type", "shape", "dtype")
        if (
            isinstance(value, torch.Tensor)
            and not isinstance(args["shape"], fx.Node)
            and value.shape[-1] % args["blocksize"]
        ):
            # If groups cross the end of a row, bitsandbytes' kernel for CPUs computes other values than its kernels for GPUs.
            return "its rows are not whole groups"
        return _packed(
            args["A"], args["absmax"], None, args["quant_type"], args["shape"], args["blocksize"], args["dtype"]
        )
    if name == "bitsandbytes.int8_vectorwise_dequant.default":
        args = arguments(node, "A", "stats")
        assert isinstance(value, torch.Tensor)
        return _packed(args["A"], args["stats"], None, "bnb8", value.shape, value.shape[-1], value.dtype)
    if name == "dorafx.dequantize.default":
        return _packed(*arguments(node, "packed", "scales", "zeros", "format", "shape", "group", "dtype").values())
    return ""


def _packed(
    packed: Any, scales: Any, zeros: Any, format: str, shape: Any, group: int, dtype: Any
) -> PackedWeight | str:
    if isinstance(shape, fx.Node) or len(shape) != 2 or not all(isinstance(size, int) for size in shape):
        return "its shape is symbolic or not that of a matrix"
    tensors = tuple(None if t is None else (_without_data(t), "") for t in (packed, scales, zeros))
    return PackedWeight(tensors, format, (int(shape[0]), int(shape[1])), int(group), dtype)


def _without_data(node: fx.Node) -> fx.Node:
    """The node without ``.data`` around it: that is the same memory, and codes have no gradient to detach."""
    while getattr(node.target, "__name__", "") == "_get_data_attr" and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _torchao(node: fx.Node, value: Any) -> PackedWeight | str:
    block = tuple(value.block_size)
    if len(block) != 2 or block[0] != 1 or value.qdata.dtype != torch.int8:
        return f"its scales are not those of groups along a row (block size {block})"
    zeros = (node, "zero_point") if value.zero_point is not None else None
    tensors = ((node, "qdata"), (node, "scale"), zeros)
    return PackedWeight(tensors, "affine", (int(value.shape[0]), int(value.shape[1])), int(block[1]), value.dtype)
