"""Never stale: whatever is done to parameters between two decoding steps, the next step is that of stock PEFT."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import set_peft_model_state_dict
from reuse_support import LAYERS, OPTIMIZERS, Decoder, counts, one_token, overwrite, parameters, prompt, shift

import dorafx
from dorafx import rewrite_log


def _data_copy(model: Any) -> None:
    for p in parameters(model):
        overwrite(p)


def _data_replaced(model: Any) -> None:
    for p in parameters(model):
        p.data = shift(p.data)


def _in_place(model: Any) -> None:
    with torch.no_grad():
        for p in parameters(model):
            p.add_(0.25)


def _base_weight(model: Any) -> None:
    weight = model.base_model.model.first.base_layer.weight
    overwrite(weight)


def _load_state_dict(model: Any) -> None:
    model.load_state_dict({k: shift(v) for k, v in model.state_dict().items()})


def _load_assigned(model: Any) -> None:
    model.load_state_dict({k: shift(v) for k, v in model.state_dict().items()}, assign=True)


def _set_peft_state(model: Any) -> None:
    from peft import get_peft_model_state_dict

    set_peft_model_state_dict(model, {k: shift(v) for k, v in get_peft_model_state_dict(model).items()})


def _modes_set_directly(model: Any) -> None:
    for module in model.modules():
        module.training = True


def _magnitude_alone(model: Any) -> None:
    for name, p in model.named_parameters():
        if "lora_magnitude_vector" in name:
            overwrite(p)


def _scaling(model: Any) -> None:
    for module in model.modules():
        if hasattr(module, "lora_A") and module.lora_A:
            module.scaling["default"] = 0.3


CHANGES: list[Callable[[Any], None]] = [
    _data_copy,
    _data_replaced,
    _in_place,
    _base_weight,
    _load_state_dict,
    _load_assigned,
    _set_peft_state,
    _modes_set_directly,
    _magnitude_alone,
    _scaling,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__.strip("_"))
def test_change_between_steps(change: Callable[[Any], None]) -> None:
    decoder = Decoder().warm()
    change(decoder.model)
    decoder.step()
    decoder.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_step(name: str) -> None:
    """The gradients come from the stock model, so that only the step itself can tell dorafx."""
    decoder = Decoder().warm()
    optimizer = OPTIMIZERS[name](parameters(decoder.model))
    for _ in range(2):
        decoder.model(one_token(3)).sin().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        decoder.step()
    assert counts() == (3 * LAYERS, LAYERS)


def _device_and_back(model: Any) -> None:
    """Off the CPU and back, with the parameters' objects kept as ``Module.to`` keeps them. There is one device to compute
    on, so the values come back from where they were saved."""
    saved = {k: v.clone() for k, v in model.state_dict().items()}
    model.to("meta")
    model.to_empty(device="cpu")
    model.load_state_dict({k: shift(v) for k, v in saved.items()})


@pytest.mark.parametrize("swap", [False, True], ids=["data", "parameters"])
def test_device_and_back(swap: bool) -> None:
    """``Module.to`` gives parameters other data, or makes others, by a setting of torch's."""
    decoder = Decoder().warm()
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(swap)
    try:
        _device_and_back(decoder.model)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
    decoder.step()
    assert counts()[0] == 2 * LAYERS
    decoder.step()


def test_dtype_and_back() -> None:
    """The parameters stay the same objects; what they hold is rounded on the way."""
    decoder = Decoder().warm()
    decoder.model.to(torch.bfloat16)
    half = one_token().bfloat16()
    decoder.step(half, 0.03)
    decoder.step(half, 0.03)
    decoder.model.to(torch.float32)
    decoder.step()
    assert counts()[0] == 3 * LAYERS
    decoder.step()
    decoder.model.to(torch.float64)
    decoder.step(one_token().double(), 1e-12)


def test_average_swapped_in_and_out_between_prefills() -> None:
    decoder = Decoder()
    averages = [shift(p.data) for p in parameters(decoder.model)]
    for _ in range(4):
        decoder.step(prompt())
        decoder.step()
        for p, average in zip(parameters(decoder.model), averages):
            kept = p.data.clone()
            p.data.copy_(average)
            average.copy_(kept)


def test_invalidate() -> None:
    decoder = Decoder().warm()
    assert dorafx.invalidate(decoder.model) == LAYERS
    assert dorafx.invalidate(decoder.model) == 0
    decoder.step()
    assert counts() == (2 * LAYERS, LAYERS)
    assert rewrite_log().norms.invalidated == {"the user invalidated it": LAYERS}
    with pytest.raises(TypeError, match="Module, not dict"):
        dorafx.invalidate({})  # type: ignore[arg-type]


def test_reasons_are_in_the_log() -> None:
    decoder = Decoder().warm()
    _in_place(decoder.model)
    decoder.step()
    assert "2 because a parameter was written" in str(rewrite_log().norms)
    _data_copy(decoder.model)
    decoder.step()
    assert rewrite_log().norms.invalidated["a parameter's data was overwritten"] == LAYERS
    _data_replaced(decoder.model)
    decoder.step()
    assert rewrite_log().norms.invalidated["a parameter's data was replaced"] == LAYERS
    assert "norms: 8 computed, 2 reused" in str(rewrite_log())
