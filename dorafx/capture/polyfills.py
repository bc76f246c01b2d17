"""Traceable equivalents of functions of PEFT and bitsandbytes that Dynamo cannot trace, and the versions that each is equivalent to."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

import dorafx.ops  # noqa: F401  (registers the operator that stands for HQQ's dequantisation)
from dorafx._compat.hooks import has_child

from .outside import note_traced

_HQQ_PACKINGS = {"8bit_u8": "hqq8", "4bit_u8": "hqq4", "2bit_u8": "hqq2", "1bit_u8": "hqq1"}
_BITSANDBYTES = ("Params4bit", "Int8Params")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _from_torchao(kind: type) -> bool:
    # A class never changes its module, and Dynamo guards on the class: the answer is a constant of the graph.
    return kind.__module__.startswith("torchao.")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _from_bitsandbytes(kind: type) -> bool:
    return kind.__name__ in _BITSANDBYTES


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_4bit(kind: type) -> bool:
    return kind.__name__ == "Params4bit"


_PLAIN = frozenset(
    (
        torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d,
        torch.nn.modules.linear.NonDynamicallyQuantizableLinear,
    )
)  # fmt: skip


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _is_plain(kind: type) -> bool:
    """Whether this is a layer of torch that is neither quantised nor an adapter. Dynamo guards on an attribute that is absent by asking
    for it, which runs ``Module.__getattr__`` and raises: 1.5 us for each layer in each call. Of a plain layer the class tells."""
    return kind in _PLAIN


def _dequantize_for_cpu(weight: Any) -> torch.Tensor:
    state = weight.quant_state
    return torch.ops.dorafx.dequantize.default(  # type: ignore[no-any-return]
        weight.data, state.absmax, None, f"{state.quant_type}-cpu", state.shape, state.blocksize, state.dtype
    )


def _dequantize_hqq(module: Any) -> torch.Tensor:
    """``HQQLinear.dequantize()``; one operator if the codes have 1, 2, 4 or 8 bits and the scales are not quantised themselves."""
    meta = getattr(module, "meta", None)
    if meta is None:  # another class that has a W_q
        return module.dequantize()  # type: ignore[no-any-return]
    packing = _HQQ_PACKINGS.get(meta["packing"] or "", "")
    plain = not (meta["quant_zero"] or meta["quant_scale"] or meta["view_as_float"] or "zero_scale" in meta)
    if not packing or not plain or meta["group_size"] is None:
        return module.dequantize()  # type: ignore[no-any-return]
    return torch.ops.dorafx.dequantize.default(  # type: ignore[no-any-return]
        module.W_q,
        meta["scale"],
        meta["zero"],
        packing,
        meta["shape"],
        meta["group_size"],
        meta.get("compute_dtype", torch.float16),
    )


def make_dequantize_module_weight(original: Callable[..., Any]) -> Callable[..., Any]:
    """A traceable ``dequantize_module_weight(module)``.

    The original reads the ``__module__`` of a type, which Dynamo cannot trace. The order of the tests is the original's: HQQ,
    torchao, a bare tensor (FSDP), an error for anything else, bitsandbytes, an unquantised parameter.
    """
    assert isinstance(original, types.FunctionType)
    # The code for bitsandbytes' formats differs between versions of PEFT, so the installed version's is called.
    home = sys.modules[original.__module__]
    # A copy, as Dynamo replaces calls of the original function object.
    untouched = types.FunctionType(original.__code__, original.__globals__, original.__name__, original.__defaults__)

    def dequantize_module_weight(module: torch.nn.Module) -> Any:
        if not _is_plain(type(module)) and hasattr(module, "W_q"):
            return _dequantize_hqq(module)
        weight: Any = module.weight
        if _from_torchao(type(weight)):
            return weight.dequantize()
        if not isinstance(weight, torch.Tensor):
            return untouched(module)  # raises, with the original's words
        if not isinstance(weight, torch.nn.Parameter) or not _from_bitsandbytes(type(weight)):
            return weight
        device = weight.device
        dense = home.dequantize_bnb_weight(weight, state=getattr(module, "state", None))
        # Dequantisation may move 8-bit weights in place. The original always assigns, but Dynamo cannot assign a parameter
        # that did not move.
        if device.type == "cpu" and module.weight.device != device:
            module.weight = module.weight.to(device)
        return dense

    return dequantize_module_weight


def make_dequantize_bnb_weight(original: Callable[..., Any]) -> Callable[..., Any]:
    """A traceable ``dequantize_bnb_weight(weight, state)``; the original reads the ``__class__`` of an instance.

    PEFT before 0.18 moves a weight from the CPU to a GPU for dequantisation, which bitsandbytes could not do on the CPU then. Now
    it can, with the same values.

    In evaluation on a CPU with AVX512-BF16, bitsandbytes changes the layout of a weight, and its own dequantisation then reads it in
    the old order: eager PEFT computes a norm of scrambled weights, and tracing raises. Here the values are the weight's.
    """
    assert isinstance(original, types.FunctionType)
    untouched = types.FunctionType(original.__code__, original.__globals__, original.__name__, original.__defaults__)

    def dequantize_bnb_weight(weight: Any, state: Any = None) -> Any:
        import bitsandbytes as bnb

        if _is_4bit(type(weight)) and getattr(weight.quant_state, "packing_format_for_cpu", False):
            return _dequantize_for_cpu(weight)
        if _is_4bit(type(weight)):
            return bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        if state is None:
            return untouched(weight, state)  # raises, with the original's words
        if state.SCB is None:
            state.SCB = weight.SCB
        scale = state.SCB.to(weight.device)
        # The codes share the memory of the weight's data since a forward of the base layer, but in the graph they are known not
        # to be written. They are reshaped as the weight, because Dynamo makes the sizes of tensors that are no parameters
        # symbolic once two layers differ in shape.
        codes = weight.data if state.CB is None else state.CB.reshape(weight.shape)
        if hasattr(bnb.functional, "int8_vectorwise_dequant"):
            return bnb.functional.int8_vectorwise_dequant(codes, scale)
        return codes * scale.view(-1, 1) * 7.874015718698502e-3

    return dequantize_bnb_weight


def make_four_bit_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    """A traceable ``Linear4bit.forward(self, x)`` of bitsandbytes, which changes neither the layout of a weight nor the dtype of a bias.

    In its first evaluation on a CPU with AVX512-BF16 the original lays the weight out anew: the parameter gets memory of another
    shape. A graph cannot do that: it was compiled for the shape before. Here a weight is multiplied in the layout that it has. If an
    eager call changed it, its kernel is called, which has no backward; where a gradient is wanted, the weight is dequantised.
    """
    assert isinstance(original, types.FunctionType)
    # bitsandbytes 0.49 passes the transposed codes. Two functions, as Dynamo knows no variables of an outer one here.
    return _forward_of_transposed_codes if "t" in original.__code__.co_names else _forward_of_codes


def _forward_of_codes(self: Any, x: torch.Tensor) -> Any:
    return _four_bit_product(self, x, False)


def _forward_of_transposed_codes(self: Any, x: torch.Tensor) -> Any:
    return _four_bit_product(self, x, True)


def _four_bit_product(layer: Any, x: torch.Tensor, transposed: bool) -> Any:
    import bitsandbytes as bnb

    bnb.nn.modules.fix_4bit_weight_quant_state_from_module(layer)
    state = layer.weight.quant_state
    if not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    dtype = x.dtype if layer.compute_dtype is None else layer.compute_dtype
    bias = None if layer.bias is None else layer.bias.to(dtype)
    if getattr(state, "packing_format_for_cpu", False):
        if torch.is_grad_enabled() and x.requires_grad:
            dense = _dequantize_for_cpu(layer.weight).to(dtype)
            return torch.nn.functional.linear(x.to(dtype), dense, bias).to(x.dtype)
        weight = layer.weight
    else:
        weight = layer.weight.t() if transposed else layer.weight
    product = bnb.matmul_4bit(x.to(dtype), weight, bias=bias, quant_state=state)  # type: ignore[attr-defined]
    return product.to(x.dtype)


def make_cache_clear(original: Callable[..., Any]) -> Callable[..., Any]:
    """A traceable ``_cache_clear(self)`` of a DoRA layer, equivalent to the original in every state.

    The original clears a dict at every forward that does not cache. The dict is empty then, but the mutation alone keeps Dynamo
    from tracing a checkpointed body. Here only a non-empty dict is cleared, so ``ENABLE_DORA_CACHING`` works as in eager mode;
    Dynamo guards on the dict in both cases.
    """

    def _cache_clear(self: Any) -> None:
        if len(self._dora_cache) != 0:
            self._dora_cache.clear()

    return _cache_clear


def make_get_base_layer(original: Callable[..., Any]) -> Callable[..., Any]:
    """``get_base_layer(self)`` of an adapter layer, with guards that cost less (:func:`_is_plain`). Each layer that computes DoRA calls it,
    so that is where one is noticed that is traced past dorafx."""

    def get_base_layer(self: Any) -> Any:
        note_traced()
        layer = self
        while has_child(layer, "base_layer") if _is_plain(type(layer)) else hasattr(layer, "base_layer"):
            layer = layer.base_layer
        return layer

    return get_base_layer


def make_transpose(original: Callable[..., Any]) -> Callable[..., Any]:
    """A traceable ``transpose(weight, fan_in_fan_out)``, for embeddings and for layers whose weight is ``[d_in, d_out]``.

    The original makes a new ``Parameter`` of a transposed parameter, which Dynamo cannot trace. It is a leaf, so no gradient flows
    through it to the weight; ``detach`` has the same effect.
    """

    def transpose(weight: torch.Tensor, fan_in_fan_out: bool) -> torch.Tensor:
        if not fan_in_fan_out:
            return weight
        if isinstance(weight, torch.nn.Parameter):
            return weight.detach().T
        return weight.T

    return transpose


@dataclass(frozen=True)
class Polyfill:
    """A function of PEFT or bitsandbytes and its traceable equivalent.

    Attributes:
        module: where the function is defined.
        name: its qualified name there.
        make: makes the equivalent from the original.
        known: fingerprint of each original that it is equivalent to, with the versions of its package that have it.
        method: the function is called as a method.
        optional: versions without the function do not need the polyfill either.
        only_faster: without the polyfill the function is traced as well, but checked more slowly at every call.
        needed_for: the function needs a polyfill only where its module has an attribute of this name.
    """

    module: str
    name: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    known: dict[str, str]
    method: bool = False
    optional: bool = False
    only_faster: bool = False
    needed_for: str = ""

    @property
    def qualified(self) -> str:
        return f"{self.module}.{self.name}"


# The fingerprints are of 0.15.2, 0.16.0, 0.17.1, 0.18.1, 0.19.1, 0.20.0 and 0.21.2.
POLYFILLS = (
    Polyfill(
        "peft.utils.integrations",
        "dequantize_module_weight",
        make_dequantize_module_weight,
        {"1bec147cb50d62b8": "0.15 to 0.21"},
    ),
    Polyfill(
        "peft.utils.integrations",
        "dequantize_bnb_weight",
        make_dequantize_bnb_weight,
        {
            "f8c45277a3d0c206": "0.15 to 0.17",
            "57d44fd37fc88557": "0.18 and 0.19",
            "975517acf78e0165": "0.20",
            "8b7db7714a882345": "0.21",
        },
    ),
    Polyfill("peft.utils.other", "transpose", make_transpose, {"0606d9163b2dd344": "0.15 to 0.21"}),
    Polyfill(
        "peft.tuners.lora.dora",
        "DoraLinearLayer._cache_clear",
        make_cache_clear,
        {"f750c94eb0aad83f": "0.19 to 0.21"},
        method=True,
        optional=True,
    ),
    Polyfill(
        "peft.tuners.tuners_utils",
        "BaseTunerLayer.get_base_layer",
        make_get_base_layer,
        {"bd9b14e1614ec795": "0.15 to 0.21"},
        method=True,
        optional=True,
        only_faster=True,
    ),
)

# The fingerprints are of bitsandbytes 0.49.0, 0.49.2, 0.50.0, 0.50.1 and 0.50.2.
OF_BITSANDBYTES = (
    Polyfill(
        "bitsandbytes.nn.modules",
        "Linear4bit.forward",
        make_four_bit_forward,
        {"d9c66867f5d4e59c": "0.49", "758a49103cb9256d": "0.50"},
        method=True,
        needed_for="_convert_weight_packed_for_cpu",
    ),
)
