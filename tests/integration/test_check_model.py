"""``dorafx.check(model)``: every kind of problem planted in a live PEFT model, on any adapter of it, and nothing of the model changed."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import peft_model, peft_perceptron, randomise
from peft import LoraConfig
from torch import nn

import dorafx
from dorafx.preflight import live
from dorafx.preflight.findings import KINDS, named_rows

DORA = dict(r=4, lora_alpha=6, use_dora=True)


def perceptron() -> Any:
    """Factors away from their initialisation, and magnitudes away from the norms."""
    model = peft_perceptron(24)
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.abs_().add_(0.1 * torch.rand(p.shape, generator=g) + 0.5)
    return model


def layers(model: Any) -> list[tuple[str, Any]]:
    return [(name, m) for name, m in model.named_modules() if len(getattr(m, "lora_magnitude_vector", ()))]


def magnitude(layer: Any, adapter: str = "default") -> Any:
    return layer.lora_magnitude_vector[adapter].weight


def zero_row(layer: Any) -> None:
    layer.get_base_layer().weight.data[3] = 0
    layer.lora_B["default"].weight.data[3] = 0


def frozen(layer: Any) -> None:
    magnitude(layer).requires_grad_(False)


def transposed(layer: Any) -> None:
    layer.lora_magnitude_vector["default"].weight = nn.Parameter(torch.ones(1, layer.in_features))


def no_rank(layer: Any) -> None:
    layer.lora_A["default"].weight = nn.Parameter(torch.ones(0, layer.in_features))
    layer.lora_B["default"].weight = nn.Parameter(torch.ones(layer.out_features, 0))


def initialised(layer: Any) -> None:
    weight = layer.get_base_layer().weight + layer.scaling["default"] * (
        layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    magnitude(layer).data.copy_(weight.norm(dim=1))


PLANTED: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "zero row": (zero_row, "zero-norm", "row 3"),
    "frozen": (frozen, "frozen-magnitude", "requires_grad=False"),
    "negative": (lambda layer: magnitude(layer).data[1:4].neg_(), "negative-magnitude", "rows 1 to 3"),
    "zero": (lambda layer: magnitude(layer).data[5].zero_(), "zero-magnitude", "row 5"),
    "infinite": (lambda layer: magnitude(layer).data[5].fill_(float("inf")), "non-finite-magnitude", "row 5"),
    "factor": (lambda layer: layer.lora_A["default"].weight.data[0, 0].fill_(float("nan")), "non-finite-factor", "A"),
    "weight": (lambda layer: layer.get_base_layer().weight.data[2, 0].fill_(float("nan")), "non-finite-weight", "row 2"),
    "overflow": (lambda layer: layer.get_base_layer().weight.data[2].fill_(3e38), "overflowing-norm", "row 2"),
    "length": (lambda layer: layer.lora_magnitude_vector["default"].__setattr__("weight", nn.Parameter(torch.ones(5))), "magnitude-shape", "5 entries"),
    "axis": (transposed, "magnitude-axis", "inputs"),
    "missing": (lambda layer: layer.lora_magnitude_vector.pop("default"), "missing-magnitude", "no magnitude"),
    "untrained": (initialised, "untrained", "all magnitudes equal"),
    "bias": (lambda layer: layer.lora_B["default"].__setattr__("bias", nn.Parameter(torch.ones(3))), "refused", "lora_bias"),
    "double": (lambda layer: layer.lora_magnitude_vector["default"].double(), "mixed-dtype", "the magnitude is float64"),
    "no scaling": (lambda layer: layer.scaling.update(default=0.0), "scaling", "its scaling is 0"),
    "no rank": (no_rank, "rank", "its factors have rank 0"),
    "meta": (lambda layer: layer.get_base_layer().to("meta"), "unread", "no data"),
    "merged": (lambda layer: layer.merged_adapters.append("default"), "unread", "merged"),
}  # fmt: skip


def wide(model: Any) -> tuple[str, Any]:
    """A layer whose sides differ."""
    return next((n, m) for n, m in layers(model) if m.in_features != m.out_features)


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name: str) -> None:
    plant, kind, text = PLANTED[name]
    model = perceptron().train()
    assert dorafx.check(model).findings == []
    site, layer = wide(model)
    plant(layer)
    report = dorafx.check(model)
    assert [f.kind for f in report.findings if f.kind != kind] == []
    (found,) = report.findings
    assert found.site == site and text in found.text and found.adapter == "default"
    assert report.clean == (KINDS[kind][0] == "note") and bool(report) == report.clean
    assert found.to_dict()["severity"] == found.severity and kind in str(report)
    unread = kind in ("unread", "missing-factor", "rank")
    assert report.layers == len(layers(perceptron())) and report.checked == report.layers - unread


def test_frozen_magnitudes_of_a_model_that_is_not_trained() -> None:
    model = perceptron()
    for _, layer in layers(model):
        frozen(layer)
    assert dorafx.check(model.eval()).clean and not dorafx.check(model.train()).clean
    for p in model.parameters():
        p.requires_grad_(False)
    assert dorafx.check(model.train()).clean


def test_every_adapter_is_looked_at() -> None:
    model = perceptron()
    site, layer = layers(model)[0]
    target = site.rsplit(".", 1)[-1]
    model.add_adapter("other", LoraConfig(target_modules=[target], **DORA))
    model.add_adapter("plain", LoraConfig(target_modules=[target], r=4))
    magnitude(layer, "other").data[1] = -1.0
    report = dorafx.check(model)
    assert [(f.adapter, f.rows) for f in report.problems] == [("other", (1,))]
    assert "(other)" in str(report)


def test_nothing_is_changed() -> None:
    model = perceptron().train()
    zero_row(wide(model)[1])
    before = copy.deepcopy(model.state_dict())
    versions = [p._version for p in model.parameters()]
    hooks = [dict(m._forward_hooks) for m in model.modules()]
    dorafx.check(model)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))
    assert versions == [p._version for p in model.parameters()] and model.training
    assert hooks == [dict(m._forward_hooks) for m in model.modules()]
    assert all(p.grad is None for p in model.parameters())


def test_an_optimized_model_and_a_decoder() -> None:
    model = peft_model("llama", layers=2)
    first = dorafx.check(model)
    assert first.checked == first.layers == len(layers(model))
    dorafx.optimize(model, codegen="eager")
    assert dorafx.check(model).to_dict() == first.to_dict()
    assert "layers.*" in str(first) or not first.findings


def test_half_precision() -> None:
    model = perceptron()
    _, layer = wide(model)
    with torch.no_grad():
        layer.get_base_layer().weight[1] *= 1e-9
        layer.lora_B["default"].weight[1] = 0
    assert dorafx.check(model).clean
    (problem,) = dorafx.check(model.half()).problems
    assert problem.kind == "zero-norm" and problem.rows == (1,)
    mixed = perceptron()
    for _, m in layers(mixed):
        m.get_base_layer().to(torch.bfloat16)
    report = dorafx.check(mixed)
    assert {f.kind for f in report.findings} == {"mixed-dtype"} and report.clean
    assert "PEFT casts the input and a copy of the weight to float32" in report.findings[0].text


def test_what_is_said_of_mixed_dtypes_is_so() -> None:
    """PEFT's output has the base's dtype, and its products are in the adapter's."""
    model = perceptron()
    _, layer = wide(model)
    layer.get_base_layer().to(torch.bfloat16)
    seen = []
    layer.lora_A["default"].register_forward_hook(lambda module, args, out: seen.append(args[0].dtype))
    y = layer(torch.randn(2, layer.in_features, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16 and set(seen) == {torch.float32}


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
@pytest.mark.parametrize("kind", ["nf4", "bnb 8 bit"])
def test_quantised_bases(kind: str) -> None:
    from quantized_support import quantized

    model = quantized(kind)
    report = dorafx.check(model)
    assert report.checked == report.layers == 2 and report.clean
    assert {f.kind for f in report.findings} == {"untrained"}, "the magnitudes are the norms of the dequantised weights"
    magnitude(layers(model)[0][1]).data[3] = -1
    assert [f.kind for f in dorafx.check(model).problems] == ["negative-magnitude"]


def test_a_weight_that_cannot_be_read() -> None:
    model = perceptron()
    site, layer = wide(model)
    layer.get_base_layer().weight = nn.Parameter(torch.zeros(3, 4, dtype=torch.uint8), requires_grad=False)
    report = dorafx.check(model)
    (problem,) = report.problems
    assert problem.kind == "unread" and problem.site == site and "cannot be read" in problem.text
    assert report.checked == report.layers - 1


def test_bad_input() -> None:
    with pytest.raises(TypeError, match=r"takes an nn\.Module, not str"):
        dorafx.check("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="the model has none: is use_dora true"):
        dorafx.check(nn.Linear(3, 4))
    with pytest.raises(ValueError, match="unknown kind 'zeros'"):
        dorafx.Finding("zeros", "", "")


def test_rows_are_named_in_runs() -> None:
    assert named_rows([3], 1) == "row 3"
    assert named_rows([3, 4, 5, 9], 4) == "rows 3 to 5, 9"
    assert named_rows(range(0, 128, 2), 100) == "rows 0, 2, 4, 6, 8 and 95 more"


def test_another_librarys_layer() -> None:
    """The names and the shape of PEFT's layers are all that is asked for."""

    class Foreign(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(6, 8)
            self.lora_A = nn.ModuleDict({"a": nn.Linear(6, 2, bias=False)})
            self.lora_B = nn.ModuleDict({"a": nn.Linear(2, 8, bias=False)})
            self.lora_magnitude_vector = nn.ParameterDict({"a": nn.Parameter(torch.ones(8))})
            self.scaling = {"a": 2.0}

    model = randomise(nn.Sequential(Foreign()))
    with torch.no_grad():
        model[0].base_layer.weight[1], model[0].lora_B["a"].weight[1] = 0, 0
        model[0].lora_magnitude_vector["a"].fill_(1.5)
    assert [(f.kind, f.site, f.rows) for f in dorafx.check(model).problems] == [("zero-norm", "0", (1,))]
    assert list(live._adapters(model[0])) == ["a"]
