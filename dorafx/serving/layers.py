"""What a DoRA layer of PEFT computes its scale from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from dorafx.capture.polyfills import make_dequantize_bnb_weight
from dorafx.errors import DorafxError
from dorafx.runtime.watch import memory
from dorafx.scope import adapted_modules

_KINDS = frozenset(f"Dora{kind}Layer" for kind in ("Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"))
_BITSANDBYTES = ("Params4bit", "Int8Params")
_BLOCK = 2**22
"""Elements of a block of rows that is formed at a time, in fp64: 32 MiB."""


@dataclass(frozen=True)
class DoraLayer:
    """One adapter of one layer.

    Attributes:
        name: the module's name, as ``named_modules()`` gives it.
        module: PEFT's adapter layer.
        adapter: the adapter's name in this model.
    """

    name: str
    module: Any
    adapter: str

    @property
    def dora(self) -> Any:
        """The module that computes the norm and the composition, and holds the magnitude."""
        return self.module.lora_magnitude_vector[self.adapter]

    @property
    def base(self) -> Any:
        """The base layer."""
        return self.module.get_base_layer()

    @property
    def embedding(self) -> bool:
        """Whether the factors are those of an embedding, which are parameters and no modules."""
        return self.adapter in getattr(self.module, "lora_embedding_A", ())

    @property
    def factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The parameters ``A`` and ``B``."""
        if self.embedding:
            return self.module.lora_embedding_A[self.adapter], self.module.lora_embedding_B[self.adapter]
        return self.module.lora_A[self.adapter].weight, self.module.lora_B[self.adapter].weight

    @property
    def scaling(self) -> float:
        """The factor ``s`` of the low-rank product."""
        return float(self.module.scaling[self.adapter])

    @property
    def magnitude(self) -> torch.Tensor:
        """The parameter ``m``."""
        return self.dora.weight  # type: ignore[no-any-return]

    @property
    def quantized(self) -> bool:
        """Whether the base weight is kept as codes."""
        if hasattr(self.base, "W_q"):
            return True
        kind = type(self.base.weight)
        return kind.__module__.startswith("torchao.") or kind.__name__ in _BITSANDBYTES

    def weight(self) -> torch.Tensor:
        """The base weight, dequantised if it is kept as codes. Nothing of the layer is changed."""
        base = self.base
        if hasattr(base, "W_q"):
            return base.dequantize().detach()  # type: ignore[no-any-return]
        weight = base.weight
        if type(weight).__module__.startswith("torchao."):
            return weight.dequantize().detach()  # type: ignore[no-any-return]
        if type(weight).__name__ == "Int8Params":
            # PEFT's own function moves codes and scales. Both are in the state since the first forward of the base layer.
            state = base.state
            scale = weight.SCB if state.SCB is None else state.SCB
            codes = weight.data if state.CB is None else state.CB.reshape(weight.shape)
            return codes.float() * (scale.to(codes.device).view(-1, 1) / 127)  # type: ignore[no-any-return]
        if type(weight).__name__ == "Params4bit":
            from peft.utils.integrations import dequantize_bnb_weight

            # PEFT's own function reads weights that were laid out for AVX512-BF16 in the wrong order.
            return make_dequantize_bnb_weight(dequantize_bnb_weight)(weight).detach()  # type: ignore[no-any-return]
        return weight.detach()  # type: ignore[no-any-return]

    def check(self) -> None:
        """Raises:
        DorafxError: a scale cannot be computed, or would not be this layer's."""
        if getattr(self.module, "merged", False):
            raise DorafxError(
                f"{self.name}: an adapter is merged into the base weight: call model.unmerge_adapter() first"
            )
        kind = type(self.dora).__name__
        if kind not in _KINDS:
            raise DorafxError(f"{self.name}: a DoRA layer of class {kind}; known are {', '.join(sorted(_KINDS))}")
        if not self.embedding and getattr(self.module.lora_B[self.adapter], "bias", None) is not None:
            raise DorafxError(
                f"{self.name}: its low-rank product has a bias (lora_bias=True), of which PEFT has no DoRA"
            )
        codes = self.base.W_q if hasattr(self.base, "W_q") else self.base.weight
        for tensor in (codes, *self.factors, self.magnitude):
            if hasattr(tensor, "placements"):
                raise DorafxError(
                    f"{self.name}: its parameters are divided among processes; export from one that has them whole"
                )
            if tensor.is_meta or not tensor.numel():
                raise DorafxError(f"{self.name}: its parameters are not in memory (offloaded, or on the meta device)")

    def scale(self) -> torch.Tensor:
        """``g = m / ‖W + s·B·A‖`` in the shape of the magnitude and on the weight's device: in fp64 if the layer has anything in fp64, else
        in fp32. Norms are taken in fp64, over blocks of rows, so that nothing dense of the weight's size is formed."""
        weight = self.weight()
        double = torch.float64 in (weight.dtype, self.magnitude.dtype, *(factor.dtype for factor in self.factors))
        if weight.device.type == "mps":  # which has no fp64
            weight = weight.cpu()
        left, right = (factor.detach().to(weight.device) for factor in (self.factors[1], self.factors[0]))
        rank = right.shape[0]
        if self.embedding:
            weight = weight.T
        elif weight.dim() == 2:
            weight = weight.T if getattr(self.dora, "fan_in_fan_out", False) else weight
        shape = weight.shape
        left, right = left.reshape(-1, rank), right.reshape(rank, -1)
        rows = weight.reshape(shape[0], -1) if weight.dim() > 2 else weight
        grouped = left.shape[0] != rows.shape[0]  # of convolutions with groups PEFT reshapes the product
        if grouped:
            product = (left.double() @ right.double()).reshape(shape[0], -1)
            norm = torch.linalg.vector_norm(rows.double() + self.scaling * product, dim=1)
        else:
            step = max(1, _BLOCK // max(rows.shape[1], 1))
            wide = right.double()
            norm = torch.cat(
                [
                    torch.linalg.vector_norm(
                        torch.addmm(rows[k : k + step].double(), left[k : k + step].double(), wide, alpha=self.scaling),
                        dim=1,
                    )
                    for k in range(0, rows.shape[0], step)
                ]
            )
        magnitude = self.magnitude.detach().to(norm.device)
        scale: torch.Tensor = magnitude.double() / norm.view(magnitude.shape)
        return scale if double else scale.float()

    def digests(self) -> dict[str, Any]:
        """Of everything that the scale is computed from: contents, shapes and dtypes, and the scaling."""
        right, left = self.factors
        return {
            "base weight": digest(self.weight()),
            "lora_A": digest(right),
            "lora_B": digest(left),
            "magnitude": digest(self.magnitude),
            "scaling": self.scaling,
        }


def dora_layers(model: torch.nn.Module, adapter: str | None, function: str) -> tuple[str, list[DoraLayer]]:
    """An adapter's name and its DoRA layers, each checked.

    Args:
        model: a PEFT model.
        adapter: its name; the active one by default.
        function: the public function, for messages.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: no such adapter, or none named and several active.
        DorafxError: there is no DoRA, or a layer whose scale cannot be computed.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"{function} takes an nn.Module, not {type(model).__name__}")
    adapted: list[tuple[str, Any]] = [(name, module) for name, module in adapted_modules(model)]
    if not adapted:
        raise DorafxError(f"{function}: the model has no adapter layer of PEFT with DoRA (LoraConfig(use_dora=True))")
    known = list(dict.fromkeys(name for _, module in adapted for name in module.lora_magnitude_vector))
    if adapter is None:
        active = [name for name in known if any(name in module.active_adapters for _, module in adapted)]
        if len(active) != 1:
            raise ValueError(f"{function}: name one adapter; those with DoRA are {known}, active of them {active}")
        (adapter,) = active
    if adapter not in known:
        raise ValueError(f"{function}: the model has no adapter {adapter!r} with DoRA; it has {known}")
    layers = [DoraLayer(name, module, adapter) for name, module in adapted if adapter in module.lora_magnitude_vector]
    for layer in layers:
        layer.check()
    return adapter, layers


def digest(tensor: torch.Tensor) -> str:
    """128 bits of contents, shape and dtype."""
    plain = tensor.detach().contiguous().cpu()
    state = xxhash.xxh3_128(f"{plain.dtype} {tuple(plain.shape)} ".encode())
    if plain.numel():
        state.update(memory(plain.data_ptr(), plain.nbytes))
    return state.hexdigest()
