"""``export_scales`` and ``apply_scales``: DoRA as LoRA and a scale by row."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_support import (
    Perceptron,
    assert_close,
    base_model,
    call,
    dora_sites,
    in_double,
    lora_config,
    peft_model,
    peft_perceptron,
    randomise,
)
from peft import PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import dorafx
from dorafx import DorafxError, rewrite_log
from dorafx.capture.in_place import is_optimized
from dorafx.serving import scaled_adapters
from dorafx.serving.layers import digest


class Mixed(nn.Module):
    """An embedding, convolutions of each kind, one of them with groups, and a linear without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(13, 8)
        self.one = nn.Conv1d(8, 8, 3, padding=1)
        self.grouped = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.two = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.three = nn.Conv3d(1, 4, 1)
        self.out = nn.Linear(8, 5, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids)
        x = self.grouped(self.one(x.mT)).mT
        x = x + self.two(x[:, None]).mean(1) + self.three(x[:, None, None]).mean(1)[:, 0]
        return self.out(x)


MIXED = ["words", "one", "grouped", "two", "three", "out"]
IDS = torch.tensor([[0, 3, 12, 5], [7, 7, 1, 2]])


def mixed(targets: list[str] | None = None, **lora: Any) -> Any:
    torch.manual_seed(0)
    config = lora_config(target_modules=targets or MIXED, task_type=None, r=4, **lora)
    return randomise(get_peft_model(Mixed(), config)).eval()


def norms_of(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers whose norm is computed from now on."""
    from peft.tuners.lora import dora

    seen: list[str] = []
    for kind in (dora.DoraLinearLayer, dora._DoraConvNdLayer):
        original = kind.get_weight_norm

        def counted(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            seen.append(type(self).__name__)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(kind, "get_weight_norm", counted)
    return seen


@torch.no_grad()
def check(model: Any, function: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, tolerance: float = 2e-6) -> None:
    """The scaled model's result is the stock's, and no further from the one in fp64; no norm is computed; all is undone."""
    expected = function(model)
    exact = function(in_double(model))
    classes = {n: type(m) for n, m in model.named_modules()}
    keys = list(model.state_dict())
    scales = dorafx.export_scales(model, folder)
    assert sorted(scales) == dora_sites(model)
    assert dorafx.apply_scales(model, folder) is model
    with monkeypatch.context() as patch:
        norms = norms_of(patch)
        found = function(model)
        assert not norms
        function(in_double(model))
        assert norms, "nothing would be counted"
    assert found.dtype == expected.dtype
    assert_close(found, expected, tolerance)
    stock = (expected.double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= 1.5 * stock + 1e-7 * exact.abs().max()
    assert list(model.state_dict()) == keys
    assert dorafx.restore(model) is model
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert not any("dorafx" in name for m in model.modules() for name in m.__dict__)
    assert torch.equal(function(model), expected)


# -- results -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_language_models(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Linears without bias; and with, of transposed weights. A dropout does nothing in evaluation."""
    model = peft_model(kind, layers=2, lora_dropout=0.1)
    check(model, lambda m: call(m, m), tmp_path, monkeypatch)


@pytest.mark.parametrize("target", [*MIXED, "all"])
def test_every_kind_of_layer(target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = mixed(MIXED if target == "all" else [target])
    check(model, lambda m: m(IDS), tmp_path, monkeypatch)


@pytest.mark.parametrize("cast", [False, True], ids=["adapters in fp32", "all in half precision"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, cast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model(dtype=dtype)
    if cast:
        model = model.to(dtype)
    check(model, lambda m: call(m, m), tmp_path, monkeypatch, 3e-2)
    embedding = mixed(["words", "out"]).to(dtype)
    check(embedding, lambda m: m(IDS), tmp_path, monkeypatch, 3e-2)


def test_autocast(tmp_path: Path) -> None:
    model = peft_model()
    dorafx.export_scales(model, tmp_path)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = call(model, model)
        found = call(dorafx.apply_scales(model, tmp_path), model)
    assert_close(found, expected, 3e-2)


def test_scales_are_those_of_the_definition(tmp_path: Path) -> None:
    model = peft_perceptron()
    scales = dorafx.export_scales(model)
    for name, g in scales.items():
        layer = model.get_submodule(name)
        w, a, b = (t.double() for t in (layer.weight, layer.lora_A.default.weight, layer.lora_B.default.weight))
        norm = (w + layer.scaling["default"] * b @ a).norm(dim=1)
        assert g.dtype == torch.float32 and g.shape == norm.shape
        torch.testing.assert_close(
            g.double(), layer.lora_magnitude_vector.default.weight.double() / norm, rtol=1e-7, atol=0
        )
        assert (g - 1).abs().max() > 0.05, "a magnitude equal to the norm shows nothing"


def test_zero_rows_are_nan_as_in_peft(tmp_path: Path) -> None:
    model = peft_perceptron()
    layer = model.base_model.model.first
    with torch.no_grad():
        for tensor in (layer.weight, layer.lora_B.default.weight, layer.lora_magnitude_vector.default.weight):
            tensor[3] = 0
        expected = call(model, model)
        dorafx.export_scales(model, tmp_path)
        found = call(dorafx.apply_scales(model, tmp_path), model)
    assert torch.equal(found.isnan(), expected.isnan()) and expected.isnan().any()


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_perceptron()
    expected = dorafx.export_scales(model)
    monkeypatch.setattr("dorafx.serving.layers._BLOCK", 100)  # four rows, two rows
    for name, g in dorafx.export_scales(model).items():
        torch.testing.assert_close(g, expected[name], rtol=1e-7, atol=0)


@pytest.mark.parametrize("kind", ["nf4", "nf4 double", "bnb 8 bit", "torchao int8", "hqq 4 bit"])
def test_quantised_bases(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip({"n": "bitsandbytes", "b": "bitsandbytes", "t": "torchao", "h": "hqq"}[kind[0]])
    from quantized_support import quantized

    model, stock = (randomise(quantized(kind)).eval() for _ in range(2))
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        dorafx.export_scales(model, tmp_path)
        expected = stock(x)  # of 8 bits once only: then PEFT has lost their scales, on a CPU
        dorafx.apply_scales(model, tmp_path)
        norms = norms_of(monkeypatch)
        found = [model(x) for _ in range(3)]
    assert not norms
    for y in found:
        assert_close(y, expected, 1e-5)
    dorafx.restore(model)


# -- the file ----------------------------------------------------------------------------------------------------------


def test_the_file(tmp_path: Path) -> None:
    """Beside the adapter, readable by anyone, and right for the adapter as it is loaded again."""
    model = peft_model()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = call(model, model)
    scales = dorafx.export_scales(model, tmp_path)
    with safe_open(tmp_path / "dora_scales.safetensors", "pt") as file:
        assert sorted(file.keys()) == dora_sites(model)
        assert all(torch.equal(file.get_tensor(name), scales[name]) for name in file.keys())  # noqa: SIM118
        metadata = file.metadata()
    assert metadata["adapter"] == "default" and metadata["dorafx_scales"] == "2" and metadata["peft_version"]
    layers = json.loads(metadata["layers"])
    assert {layer["scaling"] for layer in layers.values()} == {6 / 4}
    again = PeftModel.from_pretrained(base_model(), tmp_path, adapter_name="other")
    dorafx.apply_scales(again, tmp_path / "dora_scales.safetensors")
    assert_close(call(again, again), expected, 2e-6)


def test_what_is_no_file_of_scales(tmp_path: Path) -> None:
    model = peft_perceptron()
    with pytest.raises(FileNotFoundError, match=r"dora_scales.safetensors.*export_scales"):
        dorafx.apply_scales(model, tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(DorafxError, match=r"not written by dorafx.export_scales"):
        dorafx.apply_scales(model, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DorafxError, match=r"no safetensors file"):
        dorafx.apply_scales(model, tmp_path / "adapter_config.json")


def _metadata(**changes: Any) -> Any:
    """Metadata that are changed; a value of None is taken out."""

    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        for key, value in changes.items():
            metadata.pop(key) if value is None else metadata.update({key: value})

    return change


def _each(function: Any) -> Any:
    def change(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        tensors.update({name: function(t) for name, t in tensors.items()})

    return change


def _no_digest(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    layers = json.loads(metadata["layers"])
    del layers["base_model.model.second"]["scale"]
    metadata["layers"] = json.dumps(layers)


def _made_for(change: Any) -> Any:
    """A file that says that it is whole."""

    def whole(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
        change(tensors, metadata)
        layers = json.loads(metadata["layers"])
        metadata["layers"] = json.dumps({n: {**told, "scale": digest(tensors[n])} for n, told in layers.items()})

    return whole


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_metadata(adapter=None), "no 'adapter' in its metadata"),
        (_metadata(layers=None), "no 'layers' in its metadata"),
        (_metadata(layers="{"), "'layers' in its metadata is not JSON"),
        (_metadata(layers="[]"), "is no JSON object"),
        (_metadata(layers='{"base_model.model.first": 1}'), "base_model.model.first has no 'base weight'"),
        (_no_digest, "base_model.model.second has no 'scale'"),
        (lambda tensors, _: tensors.pop("base_model.model.first"), "no tensor of base_model.model.first"),
        (_each(lambda t: 2 * t), "damaged: the scale of base_model.model.(first|second)"),
        (_each(lambda t: t[:1]), "damaged: the scale of base_model.model.(first|second)"),
        (_made_for(_each(lambda t: t[:1])), "first \\(scale of shape \\(1,\\)\\)"),
        (_metadata(dorafx_scales="1"), "format 1, this dorafx reads 2"),
    ],
)
def test_a_file_that_was_changed_is_refused(change: Any, named: str, tmp_path: Path) -> None:
    model = peft_perceptron()
    dorafx.export_scales(model, tmp_path)
    path = tmp_path / "dora_scales.safetensors"
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, metadata)
    with pytest.raises(DorafxError, match=named):
        dorafx.apply_scales(model, tmp_path)
    assert not any("dorafx" in name for m in model.modules() for name in m.__dict__), "nothing is left behind"


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    model = peft_perceptron()
    dorafx.export_scales(model, tmp_path)
    path = tmp_path / "dora_scales.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-20] + b"\0" * 20)
    with pytest.raises(DorafxError, match=r"damaged: the scale of base_model"):
        dorafx.apply_scales(model, tmp_path)


def test_where_a_file_is_written(tmp_path: Path) -> None:
    model = peft_perceptron()
    dorafx.export_scales(model, tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "dora_scales.safetensors").is_file()
    dorafx.apply_scales(model, tmp_path / "new" / "folder")
    with pytest.raises(DorafxError, match=r"no folder .*absent to write g.safetensors"):
        dorafx.export_scales(model, tmp_path / "absent" / "g.safetensors")
    (tmp_path / "taken").write_text("")
    with pytest.raises(DorafxError, match=r"cannot be written"):
        dorafx.export_scales(model, tmp_path / "taken" / "inner")


@torch.no_grad()
def test_models_in_double_precision(tmp_path: Path) -> None:
    model = in_double(peft_perceptron())
    x = torch.randn(5, 24, dtype=torch.float64)
    expected = model(x)
    scales = dorafx.export_scales(model, tmp_path)
    assert {g.dtype for g in scales.values()} == {torch.float64}
    assert_close(dorafx.apply_scales(model, tmp_path)(x), expected, 1e-14)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 6)])
def test_the_output_has_peft_s_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = lora_config(target_modules=["0"], task_type=None)
    model = randomise(get_peft_model(nn.Sequential(nn.Linear(6, 8)), config)).eval()
    x = torch.randn(shape)
    expected = model(x)
    dorafx.export_scales(model, tmp_path)
    assert_close(dorafx.apply_scales(model, tmp_path)(x), expected, 2e-6)
    assert model(x).shape == expected.shape and model(x).stride() == expected.stride()


def _other_base(model: Any) -> None:
    model.base_model.model.second.weight.data[1, 2] += 1e-3


def _other_factor(model: Any) -> None:
    model.base_model.model.first.lora_A.default.weight.data.mul_(1.001)


def _other_magnitude(model: Any) -> None:
    model.base_model.model.first.lora_magnitude_vector.default.weight.data[0] = 9


def _other_scaling(model: Any) -> None:
    model.base_model.model.first.set_scale("default", 0.5)


def _other_dtype(model: Any) -> None:
    model.base_model.model.first.base_layer.to(torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_other_base, "second \\(base weight\\)"),
        (_other_factor, "first \\(lora_A\\)"),
        (_other_magnitude, "first \\(magnitude\\)"),
        (_other_scaling, "first \\(scaling\\)"),
        (_other_dtype, "first \\(base weight\\)"),
    ],
)
def test_a_stale_file_is_refused(change: Any, named: str, tmp_path: Path) -> None:
    model = peft_perceptron()
    dorafx.export_scales(model, tmp_path)
    change(model)
    with pytest.raises(DorafxError, match=named):
        dorafx.apply_scales(model, tmp_path)
    assert not any("dorafx" in name for m in model.modules() for name in m.__dict__), "nothing is left behind"
    dorafx.export_scales(model, tmp_path)
    dorafx.apply_scales(model, tmp_path)


def test_the_file_of_another_model(tmp_path: Path) -> None:
    dorafx.export_scales(peft_model(), tmp_path)
    with pytest.raises(DorafxError, match=r"has no scale of base_model.model.first"):
        dorafx.apply_scales(peft_perceptron(), tmp_path)
    torch.manual_seed(0)
    fewer = get_peft_model(base_model(), lora_config(target_modules=["q_proj"])).eval()
    with pytest.raises(DorafxError, match=r"also has .* and 3 more"):
        dorafx.apply_scales(fewer, tmp_path)


# -- afterwards --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_other_base, "second.*overwritten|second.*written"),
        (_other_factor, "first.*overwritten"),
        (_other_magnitude, "first.*overwritten"),
        (_other_scaling, "scaling is 0.75, and was 1.5 when"),
        (lambda m: m.to(torch.float64), "its scale cannot be used: a parameter"),
        (lambda m: m.train(), "training mode"),
        (lambda m: m.load_state_dict({k: v + 1 for k, v in m.state_dict().items()}), "written"),
    ],
)
@torch.no_grad()
def test_what_changes_afterwards_raises(change: Any, named: str, tmp_path: Path) -> None:
    model = peft_perceptron()
    dorafx.export_scales(model, tmp_path)
    dorafx.apply_scales(model, tmp_path)
    call(model, model)
    change(model)
    x = torch.randn(3, 24).to(model.base_model.model.first.weight.dtype)
    with pytest.raises(DorafxError, match=f"{named}.*dorafx.restore"):
        model(x)
    stock = copy.deepcopy(dorafx.restore(model))
    assert torch.equal(model(x), stock(x))


def test_no_gradient_is_lost(tmp_path: Path) -> None:
    model = peft_perceptron()
    dorafx.export_scales(model, tmp_path)
    dorafx.apply_scales(model, tmp_path)
    with pytest.raises(DorafxError, match=r"no_grad"):
        call(model, model)
    with torch.inference_mode():
        call(model, model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    # Gradients of the input, through frozen adapters, are those of PEFT.
    x = torch.randn(3, 24, requires_grad=True)
    (found,) = torch.autograd.grad(model(x).sum(), x)
    dorafx.restore(model)
    (expected,) = torch.autograd.grad(model(x).sum(), x)
    assert_close(found, expected, 2e-6)


@torch.no_grad()
def test_several_adapters(tmp_path: Path) -> None:
    """Each has a file and a scaling of its own, alone and active together; one without scales computes its norm."""
    model = peft_perceptron()
    model.add_adapter("second", lora_config(r=6, lora_alpha=3, target_modules=["first"], task_type=None))
    model.add_adapter("third", lora_config(r=2, target_modules=["second"], task_type=None))
    randomise(model, seed=4).eval()
    active = (["default"], ["second"], ["third"], ["default", "second"], ["second", "third"])
    expected = []
    for names in active:
        model.base_model.set_adapter(names)
        expected.append(call(model, model))
    with pytest.raises(ValueError, match=r"name one adapter"):
        dorafx.export_scales(model)
    for name in ("default", "second"):
        dorafx.export_scales(model, tmp_path / f"{name}.safetensors", name)
        dorafx.apply_scales(model, tmp_path / f"{name}.safetensors")
    with pytest.raises(DorafxError, match=r"'second' has scales already"):
        dorafx.apply_scales(model, tmp_path / "second.safetensors")
    with pytest.raises(ValueError, match=r"no adapter 'fourth'.*'third'"):
        dorafx.apply_scales(model, tmp_path / "second.safetensors", "fourth")
    for names, stock in zip(active, expected):
        model.base_model.set_adapter(names)
        assert_close(call(model, model), stock, 2e-6)
    with model.disable_adapter():
        assert_close(call(model, model), call(model.base_model.model, model), 1e-6)
    dorafx.restore(model)


@torch.no_grad()
def test_copies_are_plain_peft(tmp_path: Path) -> None:
    model = peft_perceptron()
    expected = call(model, model)
    dorafx.export_scales(model, tmp_path)
    dorafx.apply_scales(model, tmp_path)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(call(twin, twin), expected)
        assert {type(m) for m in twin.modules()} == {type(m) for m in peft_perceptron().modules()}
    assert b"dorafx" not in pickle.dumps(model).replace(b"_dorafx_scales", b"")
    model.save_pretrained(tmp_path / "saved")
    assert_close(call(model, model), expected, 2e-6)


def test_beside_optimize(tmp_path: Path) -> None:
    model = peft_perceptron()
    dorafx.export_scales(model, tmp_path)
    dorafx.apply_scales(model, tmp_path)
    with pytest.raises(DorafxError, match=r"scales are applied"):
        dorafx.optimize(model)
    dorafx.optimize(dorafx.restore(model), codegen="eager")
    with pytest.raises(DorafxError, match=r"optimized"):
        dorafx.apply_scales(model, tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("scope", ["modules", "model"])
def test_parts_of_models(scope: str, tmp_path: Path) -> None:
    """What is done to a part is undone with the whole; scales are not applied inside of an optimized model."""
    model = peft_perceptron()
    part = model.base_model.model
    expected = call(model, model)
    dorafx.export_scales(part, tmp_path)
    dorafx.apply_scales(part, tmp_path)
    assert scaled_adapters(model) == ["default"]
    dorafx.restore(model)
    assert not scaled_adapters(model)
    dorafx.optimize(model, codegen="eager", scope=scope)
    for inner in (part, part.first):
        dorafx.export_scales(inner, tmp_path)
        with pytest.raises(DorafxError, match=r"one that contains it, is optimized"):
            dorafx.apply_scales(inner, tmp_path)
        dorafx.restore(inner)
        assert is_optimized(model), "a part does not undo what was done to the whole"
    dorafx.restore(model)
    for first, second in ((model, part), (part, model)):
        dorafx.optimize(first, codegen="eager", scope=scope)
        dorafx.optimize(second, codegen="eager", scope=scope)
        call(model, model)
        assert dorafx.restore(model) is model
        assert not any(
            "dorafx" in name or "compiled" in name for m in model.modules() for name in m.__dict__ if m.__dict__[name]
        )
        assert torch.equal(call(model, model), expected)
    dorafx.apply_scales(dorafx.restore(model), _exported(model, tmp_path))
    with pytest.raises(TypeError, match=r"restore takes an nn.Module, not str"):
        dorafx.restore("model")  # type: ignore[type-var]


def _exported(model: Any, folder: Path) -> Path:
    dorafx.export_scales(model, folder)
    return folder


@torch.no_grad()
def test_compiled_they_compute_as_peft_does(tmp_path: Path) -> None:
    model = peft_perceptron()
    expected = call(model, model)
    dorafx.export_scales(model, tmp_path)
    dorafx.apply_scales(model, tmp_path)
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True})
    assert_close(call(compiled, model), expected, 1e-5)
    assert sorted(r.site for r in rewrite_log().rewrites) == dora_sites(model)


@torch.no_grad()
def test_generate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model(layers=2)
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    ids = torch.tensor([[3, 5, 7]])
    expected = model.generate(input_ids=ids, **settings)
    dorafx.export_scales(model, tmp_path)
    dorafx.apply_scales(model, tmp_path)
    norms = norms_of(monkeypatch)
    assert torch.equal(model.generate(input_ids=ids, **settings), expected)
    assert not norms


# -- what cannot be exported ------------------------------------------------------------------------------------------


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"export_scales takes an nn.Module, not str"):
        dorafx.export_scales("model")  # type: ignore[arg-type]
    with pytest.raises(DorafxError, match=r"use_dora=True"):
        dorafx.export_scales(
            get_peft_model(Perceptron(), lora_config(use_dora=False, target_modules=["first"], task_type=None))
        )
    model = peft_perceptron()
    with pytest.raises(ValueError, match=r"no adapter 'other'.*'default'"):
        dorafx.export_scales(model, adapter="other")
    dorafx.export_scales(model, tmp_path)
    with pytest.raises(DorafxError, match=r"model.eval"):
        dorafx.apply_scales(model.train(), tmp_path)
    model.eval().merge_adapter()
    for function in (dorafx.export_scales, dorafx.apply_scales):
        with pytest.raises(DorafxError, match=r"unmerge_adapter"):
            function(model, tmp_path)
    model.unmerge_adapter()
    with pytest.raises(DorafxError, match=r"not in memory"):
        dorafx.export_scales(model.to("meta"))
