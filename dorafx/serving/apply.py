"""PEFT's DoRA layers with their norms known: ``g * (base + s * lora)``."""

from __future__ import annotations

import functools
import os
from typing import Any, TypeVar

import torch

from dorafx.capture.in_place import is_optimized
from dorafx.capture.outside import in_optimized_model
from dorafx.errors import DorafxError
from dorafx.runtime.watch import Watch, watchable

from .export import read_scales
from .layers import DoraLayer, dora_layers

M = TypeVar("M", bound=torch.nn.Module)
_ATTRIBUTE = "_dorafx_scales"
_SCALE = "_dorafx_scale"
_NAMED = 3


class _Undo(list[Any]):
    """The layers that have scales. Copied and pickled as an empty plain list: copies of these layers are plain layers of PEFT."""

    def __reduce__(self) -> Any:
        return list, ()


def apply_scales(model: M, path: str | os.PathLike[str], adapter: str | None = None) -> M:
    """Make a PEFT model compute its DoRA layers as ``g ⊙ (x·Wᵀ + s·x·Aᵀ·Bᵀ) + b`` with the scales of [`dorafx.export_scales`][]: no norm,
    and no dequantised weight, in any forward.

    It is for inference in eager mode, and changes only how these layers are called: parameters, ``state_dict`` keys, hooks and
    ``save_pretrained`` stay as they are, copies and pickles of the model are plain PEFT. [`dorafx.restore`][] undoes it. Under
    ``torch.compile`` the layers compute as PEFT does (compile with ``backend="dorafx"``).

    A scale is right for the weights that it was computed from, so the file is refused where they, or the scaling, differ. The
    same holds afterwards: a forward raises where a parameter of the layer has been written or replaced, its adapter been scaled
    otherwise, or where it would be training. Quantised base weights are compared here, and not at each forward. On a GPU, writes that
    PyTorch does not count (``parameter.data.copy_``, as in PEFT's hotswap) are not noticed afterwards: apply the new adapter's own file then.

    Args:
        model: a PEFT model in evaluation mode, on the device where it is to run.
        path: the file, or the folder that has ``dora_scales.safetensors``.
        adapter: the adapter's name in this model; by default the name in the file, or the active adapter if there is none of that
            name. Call it once for each of several adapters.

    Returns:
        The same ``model``.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError: ``model`` is no ``nn.Module``.
        ValueError: no such adapter; none is named, and several are active.
        DorafxError: the file is not of this model and adapter; the model is in training mode; the adapter has scales already.

    Examples:
        >>> import tempfile
        >>> from peft import LoraConfig, get_peft_model
        >>> base = torch.nn.Sequential(torch.nn.Linear(8, 6))
        >>> served = get_peft_model(base, LoraConfig(use_dora=True, target_modules=["0"])).eval()
        >>> folder = tempfile.mkdtemp()
        >>> _ = dorafx.export_scales(served, folder)
        >>> dorafx.apply_scales(served, folder) is served
        True
        >>> with torch.no_grad():
        ...     scaled = served(torch.ones(1, 8))
        ...     torch.allclose(scaled, dorafx.restore(served)(torch.ones(1, 8)), atol=1e-5)
        True
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"apply_scales takes an nn.Module, not {type(model).__name__}")
    scales, named, expected = read_scales(path)
    if adapter is None and any(named in (getattr(m, "lora_magnitude_vector", None) or ()) for m in model.modules()):
        adapter = named
    adapter, layers = dora_layers(model, adapter, "apply_scales")
    if any(layer.module.training for layer in layers):
        raise DorafxError("apply_scales: the model is in training mode, in which norms change: call model.eval() first")
    if is_optimized(model) or in_optimized_model([layer.module for layer in layers]):
        raise DorafxError(
            "apply_scales: the model, or one that contains it, is optimized, and keeps its norms by itself; call "
            "dorafx.restore with that model first"
        )
    if any(isinstance(layer.dora, _Scaled) for layer in layers):
        raise DorafxError(f"apply_scales: adapter {adapter!r} has scales already; call dorafx.restore(model) first")
    _compare(layers, scales, expected, os.fspath(path))
    applied = [(layer, _Applied(layer, scales[layer.name])) for layer in layers]
    undo = model.__dict__.setdefault(_ATTRIBUTE, _Undo())
    for layer, scale in applied:
        dora: Any = layer.dora
        kind: Any = type(dora)
        undo.append((dora, kind))
        dora.__dict__[_SCALE] = scale
        dora.__class__ = _scaled(kind)
    return model


def remove_scales(model: torch.nn.Module) -> None:
    """Undo :func:`apply_scales` of a model and of every part of it, for every adapter."""
    for module in list(model.modules()):
        for dora, kind in reversed(module.__dict__.pop(_ATTRIBUTE, ())):
            dora.__class__ = kind
            dora.__dict__.pop(_SCALE, None)


def scaled_adapters(model: torch.nn.Module) -> list[str]:
    """The adapters that have scales."""
    found = (m.__dict__[_SCALE].layer.adapter for m in model.modules() if isinstance(m, _Scaled))
    return list(dict.fromkeys(found))


def _compare(
    layers: list[DoraLayer], scales: dict[str, torch.Tensor], expected: dict[str, dict[str, Any]], path: str
) -> None:
    here = {layer.name for layer in layers}
    for names, what in (
        (here - expected.keys(), "has no scale of"),
        (expected.keys() - here, "is of a model that also has"),
    ):
        if names:
            raise DorafxError(f"apply_scales: {path} {what} {_few(sorted(names))}: export the scales of this model")
    wrong = []
    for layer in layers:
        found = layer.digests()
        differ = [part for part, value in found.items() if expected[layer.name].get(part) != value]
        if scales[layer.name].shape != layer.magnitude.shape:
            differ.append(f"scale of shape {tuple(scales[layer.name].shape)}")
        if differ:
            wrong.append(f"{layer.name} ({', '.join(differ)})")
    if wrong:
        raise DorafxError(
            f"apply_scales: {path} was computed from other values than this model has, in {_few(wrong)}: export the scales again"
        )


def _few(names: list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


class _Applied:
    """The scale of one layer, and the state of what it was computed from."""

    def __init__(self, layer: DoraLayer, scale: torch.Tensor) -> None:
        self.layer = layer
        self.scale = scale.to(layer.magnitude.device)
        self.scaling = layer.scaling
        if self.scale.dim() == 1 and not layer.embedding:
            self.scale = self.scale.view(1, -1)  # as PEFT has it: of an input with one axis the output has two
        self.less_one = self.scale - 1
        watched = self._tensors()
        if not watchable(watched):
            raise DorafxError(
                f"apply_scales: {layer.name}: changes of its parameters cannot be noticed (they were made in inference mode, or are "
                "divided among processes)"
            )
        self.watch = Watch(watched, lambda _: None)

    def _tensors(self) -> list[torch.Tensor]:
        layer = self.layer
        base = [] if layer.quantized else [layer.base.weight]
        return [*base, *layer.factors, layer.magnitude]

    def check(self) -> None:
        """Raises:
        DorafxError: the scale would be wrong, or a gradient be lost."""
        layer = self.layer
        reason = ""
        if layer.module.training or layer.dora.training:
            reason = "it is in training mode"
        elif torch.is_grad_enabled() and layer.magnitude.requires_grad:
            reason = (
                "its magnitude would get no gradient: call the model under torch.no_grad() or torch.inference_mode()"
            )
        elif layer.scaling != self.scaling:
            reason = f"its scaling is {layer.scaling}, and was {self.scaling} when the scale was applied"
        else:
            reason = self.watch.change(self._tensors())
            if reason == "another parameter":
                reason = "a parameter was replaced by another"
        if reason:
            raise DorafxError(
                f"{layer.name}: its scale cannot be used: {reason}. dorafx.restore(model) makes it compute its norm again"
            )


class _Scaled(torch.nn.Module):
    """Mixed into a DoRA layer of PEFT that has a scale."""

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        # What is compiled would not check, so it computes the norm.
        if torch.compiler.is_compiling() or args:
            return super().forward(x, *args, **kwargs)
        applied: _Applied = self.__dict__[_SCALE]
        applied.check()
        if "embed_fn" in kwargs:
            return _embedded(applied, x, **kwargs)
        if kwargs.get("base_result") is None:
            return super().forward(x, **kwargs)
        return _composed(applied, x, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        state = reduced[2]
        state = {name: value for name, value in state.items() if name != _SCALE}
        return object.__new__, (type(self).__mro__[2],), state


@functools.cache
def _scaled(kind: Any) -> type:
    """A class of layers that have scales. It is called as the original is, so that what shows a model's modules shows the same."""
    return type(kind.__name__, (_Scaled, kind), {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _composed(
    applied: _Applied,
    x: torch.Tensor,
    *,
    lora_A: Any,
    lora_B: Any,
    scaling: float,
    base_layer: Any,
    base_result: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """What PEFT adds to the base layer's result: ``(g - 1)·base + g·s·lora``, in the dtype that PEFT's has."""
    lora = lora_B(lora_A(x))
    dtype = functools.reduce(
        torch.promote_types, (base_result.dtype, lora.dtype, applied.layer.magnitude.dtype, x.dtype)
    )
    bias = base_layer.bias
    base = base_result
    if bias is not None:
        base = base - (bias.view(1, -1, *(1,) * (base.dim() - 2)) if applied.scale.dim() > 2 else bias)
    less_one, scale = (t.to(base.device) for t in (applied.less_one, applied.scale))
    extra: torch.Tensor = less_one * base + scale * lora * scaling
    return extra.to(dtype)


def _embedded(
    applied: _Applied,
    x: torch.Tensor,
    *,
    lora_A: Any,
    lora_B: Any,
    scaling: float,
    base_layer: Any,
    embed_fn: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale, and the scaled low-rank product, as PEFT's layer of an embedding returns them."""
    lora = embed_fn(x, lora_A) @ lora_B
    weight, magnitude = base_layer.weight.dtype, applied.layer.magnitude.dtype
    scale = applied.scale.to(lora.device, functools.reduce(torch.promote_types, (weight, magnitude, lora.dtype)))
    return scale, scale * lora * scaling
