"""``dorafx check ADAPTER --base DIR``: every kind of problem planted in files that PEFT and transformers saved, and a clean adapter."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import dorafx
from dorafx.cli.main import main
from dorafx.preflight import check_files, peft_files, stored
from dorafx.preflight.findings import KINDS
from dorafx.preflight.layer import Weight

TARGETS = ["q_proj", "k_proj", "down_proj"]
Q = "model.layers.0.self_attn.q_proj"
K = "model.layers.1.self_attn.k_proj"


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": 96, "tie_word_embeddings": False, **changes}))


def trained(model: nn.Module, seed: int = 1) -> Any:
    """Factors and magnitudes away from their initialisation."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "magnitude" in name:
                p.mul_(1 + 0.1 * torch.rand(p.shape, generator=g))
            elif "lora_" in name:
                p.copy_(0.1 * torch.randn(p.shape, generator=g))
    return model


def adapted(base: Any, **lora: Any) -> Any:
    return trained(
        get_peft_model(
            base, LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, "use_dora": True, **lora})
        )
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base in several files, a copy in one, and an adapter of it."""
    folder = tmp_path_factory.mktemp("saved")
    llama().save_pretrained(folder / "base", max_shard_size="40KB")
    llama().save_pretrained(folder / "single")
    adapted(llama()).save_pretrained(folder / "adapter")
    assert len(list((folder / "base").glob("*.safetensors"))) == 3
    return folder


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved / "adapter", tmp_path / "adapter"))


def key(site: str, part: str) -> str:
    return f"base_model.model.{site}.{part}"


def change(adapter: Path, mutate: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> None:
    file, config_file = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors, config = load_file(file), json.loads(config_file.read_text())
    mutate(tensors, config)
    save_file({name: t.contiguous() for name, t in tensors.items()}, file)
    config_file.write_text(json.dumps(config))


@pytest.mark.parametrize("base", ["base", "single", "single/model.safetensors"])
def test_clean(saved: Path, base: str, capsys: pytest.CaptureFixture[str]) -> None:
    report = check_files(saved / "adapter", saved / base)
    assert report.findings == [] and report.clean and report and report.layers == report.checked == 6
    assert main(["check", str(saved / "adapter"), "--base", str(saved / base), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"clean": True, "layers": 6, "checked": 6, "findings": []}


def set_rows(part: str, site: str, rows: Any, value: float) -> Callable[..., None]:
    def mutate(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[key(site, part)][rows] = value

    return mutate


def drop(part: str) -> Callable[..., None]:
    return lambda tensors, config: tensors.pop(key(Q, part))


def option(name: str, value: Any) -> Callable[..., None]:
    return lambda tensors, config: config.update({name: value})


def reshaped(site: str, part: str, *shape: int) -> Callable[..., None]:
    def mutate(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        tensors[key(site, part)] = torch.ones(shape)

    return mutate


def half(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[key(Q, "lora_magnitude_vector")] = tensors[key(Q, "lora_magnitude_vector")].double()


def elsewhere(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"):
        tensors[key("model.layers.7.self_attn.q_proj", part)] = tensors.pop(key(Q, part))


def without(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    for part in ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector"):
        del tensors[key(Q, part)]


def no_rank(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    tensors[key(Q, "lora_A.weight")] = torch.ones(0, 32)
    tensors[key(Q, "lora_B.weight")] = torch.ones(32, 0)


PLANTED: dict[str, tuple[Callable[..., Any], str, str, str]] = {
    "no magnitude": (drop("lora_magnitude_vector"), "missing-magnitude", Q, "no magnitude"),
    "no factor": (drop("lora_B.weight"), "missing-factor", Q, "no factor B"),
    "negative": (set_rows("lora_magnitude_vector", Q, [3, 4], -1.0), "negative-magnitude", Q, "2 of 32 magnitudes are negative: rows 3 to 4"),
    "zero": (set_rows("lora_magnitude_vector", Q, [9], 0.0), "zero-magnitude", Q, "1 of 32 magnitudes are zero where the norm is not: row 9"),
    "nan": (set_rows("lora_magnitude_vector", Q, [0], float("nan")), "non-finite-magnitude", Q, "row 0"),
    "factor inf": (set_rows("lora_A.weight", Q, [0], float("inf")), "non-finite-factor", Q, "factor A"),
    "overflow": (set_rows("lora_B.weight", Q, [5], 1e38), "overflowing-norm", Q, "beyond float32's largest number"),
    "length": (reshaped(Q, "lora_magnitude_vector", 31), "magnitude-shape", Q, "31 entries, the layer 32 outputs"),
    "axis": (reshaped(K, "lora_magnitude_vector", 1, 32), "magnitude-axis", K, "each of 32 inputs, not for each of 16 outputs"),
    "rank": (option("r", 8), "rank", Q, "have rank 4, the configuration says 8"),
    "rank pattern": (option("rank_pattern", {"q_proj": 2}), "rank", Q, "the configuration says 2"),
    "pattern of nothing": (option("alpha_pattern", {"o_proj": 2}), "scaling", "", "alpha_pattern has 'o_proj'"),
    "no scaling": (option("lora_alpha", 0), "scaling", Q, "its scaling is 0"),
    "shape": (reshaped(Q, "lora_A.weight", 4, 48), "shape", Q, "weight (32, 32), B (32, 4), A (4, 48)"),
    "ranks": (reshaped(Q, "lora_A.weight", 3, 32), "shape", Q, "different ranks"),
    "target": (elsewhere, "missing-target", "model.layers.7.self_attn.q_proj", "the base has no"),
    "untouched": (without, "untouched-target", Q, "has no tensors for this layer"),
    "rank 0": (no_rank, "rank", Q, "its factors have rank 0"),
    "no such target": (option("target_modules", [*TARGETS, "query"]), "missing-target", "", "'query'"),
    "dtype": (half, "mixed-dtype", Q, "the magnitude is float64, the base float32"),
    "no dora": (option("use_dora", False), "ignored-magnitude", Q, "use_dora is not true"),
    "lora_bias": (option("lora_bias", True), "refused", "", "lora_bias"),
    "alora": (option("alora_invocation_tokens", [1, 2]), "refused", "", "aLoRA"),
    "a vector": (reshaped(Q, "lora_A.weight", 32), "shape", Q, "no matrices"),
    "other tensors": (lambda t, c: t.update({"extra": torch.ones(1)}), "unknown-tensor", "", "extra"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_planted(name: str, adapter: Path, saved: Path) -> None:
    mutate, kind, site, text = PLANTED[name]
    change(adapter, mutate)
    report = check_files(adapter, saved / "base")
    found = [f for f in report.findings if f.kind == kind and f.site == site]
    assert len(found) == 1 and text in found[0].text, report.findings
    assert found[0].advice and kind in str(report) and report.clean == (KINDS[kind][0] == "note")
    others = {f.kind for f in report.findings if f.site == site} - {kind}
    assert others <= {"rank", "scaling", "overflowing-norm", "shape"}, others


def test_rows_of_zeros(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Padded vocabulary and a pruned row, in several files; the factor has nothing there, as PEFT initialises it."""
    base = llama()
    with torch.no_grad():
        base.lm_head.weight[90:] = 0
        base.model.layers[1].self_attn.q_proj.weight[5] = 0
        base.model.layers[0].mlp.down_proj.weight[7] = 0  # but the adapter has something here
        base.model.embed_tokens.weight[:, 2] = 0
        base.model.embed_tokens.weight[90:] = 0  # rows of an embedding are no rows of its norm
    model = adapted(base, target_modules=["q_proj", "down_proj", "lm_head", "embed_tokens"])
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name and "lm_head" in name:
                p[90:] = 0
            elif "layers.1.self_attn.q_proj.lora_B" in name:
                p[5] = 0
            elif "lora_embedding_B" in name:
                p[2] = 0
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    unloaded = llama()
    unloaded.load_state_dict(model.get_base_model().state_dict(), strict=False)
    state = {
        k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items() if "lora_" not in k
    }
    unloaded.load_state_dict(state)
    unloaded.save_pretrained(tmp_path / "base", max_shard_size="40KB")
    expected = {
        "lm_head": tuple(range(90, 96)),
        "model.layers.1.self_attn.q_proj": (5,),
        "model.embed_tokens": (2,),
        "model.layers.0.mlp.down_proj": (7,),
    }
    report = check_files(tmp_path / "adapter", tmp_path / "base")
    assert {f.site: f.rows for f in report.problems} == expected
    # PEFT's initialisation makes that magnitude 0; the factors have something in the row.
    assert {f.site: f.kind for f in report.problems} == {
        **dict.fromkeys(expected, "zero-norm"),
        "model.layers.0.mlp.down_proj": "zero-magnitude",
    }
    live = dorafx.check(model)
    assert {f.site.removeprefix("base_model.model."): f.rows for f in live.problems} == expected
    assert main(["check", str(tmp_path / "adapter"), "--base", str(tmp_path / "base")]) == 1
    assert (
        "lm_head: 6 of 96 rows of W + s·B·A have a norm of zero: rows 90 to 95 [zero-norm]" in capsys.readouterr().out
    )


def test_norms_are_those_of_peft(tmp_path: Path) -> None:
    """Scaling, patterns, rslora, fan_in_fan_out, embeddings and convolutions: an adapter at its initialisation is found to be there,
    although its factors are not zero."""
    from transformers import GPT2Config, GPT2LMHeadModel

    class Convolutions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.grouped = nn.Conv1d(6, 8, 3), nn.Conv2d(6, 8, 3), nn.Conv2d(8, 8, 3, groups=2)

    torch.manual_seed(0)
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=40, n_positions=16))
    cases: list[tuple[str, Any, dict[str, Any], int]] = [
        ("llama", llama(), {"target_modules": [*TARGETS, "embed_tokens"], "use_rslora": True, "rank_pattern": {"q_proj": 2},
                            "alpha_pattern": {r"layers\.1\..*k_proj": 9}}, 7),
        ("gpt2", gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc", "wte"], "fan_in_fan_out": True}, 9),
        ("convolutions", Convolutions(), {"target_modules": ["one", "two", "grouped"]}, 3),
    ]  # fmt: skip
    for name, base, lora, layers in cases:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "base").mkdir()
        if hasattr(base, "save_pretrained"):
            base.save_pretrained(folder / "base")
        else:
            save_file(base.state_dict(), folder / "base" / "model.safetensors")
        # With random factors the magnitudes are the norms of W + s·B·A, not of W.
        config = LoraConfig(r=4, lora_alpha=6, use_dora=True, init_lora_weights=False, **lora)
        model = get_peft_model(base, config)
        model.save_pretrained(folder / "adapter", save_embedding_layers=False)
        for report in (check_files(folder / "adapter", folder / "base"), dorafx.check(model)):
            assert report.clean and {f.kind for f in report.findings} == {"untrained"}, report
            assert len(report.findings) == report.layers == report.checked == layers, name


def test_dtypes(saved: Path, tmp_path: Path) -> None:
    base = llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[3] *= 1e-8
        base.model.layers[0].self_attn.q_proj.weight[4] *= 1e-5
        base.model.layers[0].self_attn.q_proj.weight[6] *= 1e7
    model = adapted(base)
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight[[3, 4]] = 0
    model.save_pretrained(tmp_path / "adapter")
    state = {
        k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items() if "lora_" not in k
    }
    plain = llama()
    plain.load_state_dict(state)
    plain.save_pretrained(tmp_path / "base")
    assert check_files(tmp_path / "adapter", tmp_path / "base").clean
    report = check_files(tmp_path / "adapter", tmp_path / "base", torch.float16)
    found = {f.kind: f for f in report.problems}
    assert {kind: f.rows for kind, f in found.items()} == {
        "zero-norm": (3,),
        "tiny-norm": (4,),
        "overflowing-norm": (6,),
    }
    assert "zero in float16" in found["zero-norm"].text
    assert main(["check", str(tmp_path / "adapter"), "--base", str(tmp_path / "base"), "--dtype", "bfloat16"]) == 0
    # What PEFT does with an adapter that is wider than its base.
    plain.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    report = check_files(tmp_path / "adapter", tmp_path / "half")
    assert {f.kind for f in report.findings} == {"mixed-dtype"} and report.clean
    assert "the factors are float32 and the magnitude is float32, the base bfloat16" in report.notes[0].text


def gpt2(layers: int = 2) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(n_embd=24, n_layer=layers, n_head=2, vocab_size=40, n_positions=16)
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False))


def initialised(base: Any, folder: Path, **lora: Any) -> Any:
    """An adapter whose magnitudes are the norms of ``W + s·B·A``, with factors that are not zero."""
    base.save_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(r=4, lora_alpha=6, use_dora=True, init_lora_weights=False, **lora))
    model.save_pretrained(folder / "adapter", save_embedding_layers=False)
    return model


@pytest.mark.parametrize(
    "targets", [["c_proj", "lm_head"], ["lm_head", "c_proj"], ["attn.c_proj"], ["c_attn", "attn.c_proj", "lm_head"]]
)
def test_weights_that_are_stored_transposed(targets: list[str], tmp_path: Path) -> None:
    """A square Conv1D beside a Linear: what PEFT saves as fan_in_fan_out is that of the last layer it made."""
    model = initialised(gpt2(), tmp_path, target_modules=targets)
    for flag in (False, True):
        config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
        (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "fan_in_fan_out": flag}))
        report = check_files(tmp_path / "adapter", tmp_path / "base")
        assert {f.kind for f in report.findings} == {"untrained"} and report.checked == report.layers, report
        assert len(report.findings) == len(dorafx.check(model).findings)
    # Without a config.json of the base, layers of the same name show it, if one of them is not square.
    (tmp_path / "base" / "config.json").unlink()
    report = check_files(tmp_path / "adapter", tmp_path / "base")
    square = 0 if "c_proj" in targets else 2
    assert report.checked == report.layers - square and not any("magnitude" in f.kind for f in report.findings)
    unread = [f for f in report.problems if f.kind == "unread"]
    assert len(unread) == square and all("stored transposed" in f.text and "attn.c_proj" in f.site for f in unread)


def test_square_linears_of_unknown_models(saved: Path, adapter: Path) -> None:
    """fan_in_fan_out=True cannot be right for a Linear, for which PEFT takes it back."""
    change(adapter, option("fan_in_fan_out", True))
    report = check_files(adapter, saved / "single")
    assert report.findings == [] and report.checked == 6


@pytest.mark.parametrize(
    ("lora", "said"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' makes PEFT change the base weight"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"layer_replication": [(0, 2), (0, 2)]}, "layer_replication builds another model"),
    ],
)
def test_bases_that_peft_changes(lora: dict[str, Any], said: str, tmp_path: Path) -> None:
    """The files do not hold the weights that the norms are of, so no norm is claimed to be checked."""
    base = llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[3] = 0
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, **lora)
    if "init_lora_weights" in lora:
        plain = load_file(tmp_path / "base" / "model.safetensors")
        assert not torch.equal(
            model.get_base_model().model.layers[1].mlp.down_proj.weight, plain["model.layers.1.mlp.down_proj.weight"]
        )
    model.save_pretrained(tmp_path / "adapter")
    report = check_files(tmp_path / "adapter", tmp_path / "base")
    assert report.checked == 0 and report.layers == (12 if "layer_replication" in lora else 6)
    assert {f.kind for f in report.findings} == {"unread"} and all(said in f.text for f in report.findings)
    assert "dorafx.check(model)" in report.findings[0].advice and not report.clean
    assert dorafx.check(model).checked == report.layers


@pytest.mark.parametrize("init", ["loftq", "corda"])
def test_other_initialisations_that_change_the_base(init: str, adapter: Path, saved: Path) -> None:
    change(adapter, option("init_lora_weights", init))
    report = check_files(adapter, saved / "base")
    assert report.checked == 0 and {f.kind for f in report.findings} == {"unread"}


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "lora_ga"])
def test_initialisations_that_leave_the_base(init: Any, adapter: Path, saved: Path) -> None:
    change(adapter, option("init_lora_weights", init))
    assert check_files(adapter, saved / "base").checked == 6


def test_a_half_precision_base_with_peft_s_adapter(tmp_path: Path) -> None:
    """PEFT keeps adapters in fp32, and takes the norm in it: rows that are small in fp16 are not."""
    base = llama()
    with torch.no_grad():
        base.model.layers[0].self_attn.q_proj.weight[3] *= 1e-5
        base.model.layers[0].self_attn.q_proj.weight[4] = 60000
    base.half().save_pretrained(tmp_path / "base")
    model = adapted(base)
    q = model.base_model.model.model.layers[0].self_attn.q_proj
    with torch.no_grad():
        q.lora_B["default"].weight[[3, 4]] = 0
        q.lora_magnitude_vector["default"].weight.fill_(1.0)
    assert q.lora_A["default"].weight.dtype == torch.float32
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        assert q(torch.full((1, 32), 1e-3, dtype=torch.float16))[0, [3, 4]].isfinite().all()
    for report in (check_files(tmp_path / "adapter", tmp_path / "base"), dorafx.check(model)):
        assert {f.kind for f in report.findings} == {"mixed-dtype"} and report.clean
    report = check_files(tmp_path / "adapter", tmp_path / "base", torch.float16)
    assert {f.kind: f.rows for f in report.problems} == {"tiny-norm": (3,), "overflowing-norm": (4,)}
    adapted_half = {k: v.half() for k, v in load_file(tmp_path / "adapter" / "adapter_model.safetensors").items()}
    save_file(adapted_half, tmp_path / "adapter" / "adapter_model.safetensors")
    report = check_files(tmp_path / "adapter", tmp_path / "base")
    assert {f.kind for f in report.problems} == {"tiny-norm", "overflowing-norm"}


def test_gpt2_as_the_hub_has_it(tmp_path: Path) -> None:
    """Without ``transformer.`` in front."""
    initialised(gpt2(), tmp_path, target_modules=["c_attn", "wte", "wpe"])
    file = tmp_path / "base" / "model.safetensors"
    save_file({k.removeprefix("transformer."): v for k, v in load_file(file).items()}, file)
    report = check_files(tmp_path / "adapter", tmp_path / "base")
    assert {f.kind for f in report.findings} == {"untrained"} and report.checked == report.layers == 4


def test_weights_that_the_model_lacks(saved: Path, adapter: Path, tmp_path: Path) -> None:
    """Checkpoints of some models hold layers that are built for training only; that is no problem of the adapter."""
    tensors = load_file(saved / "single" / "model.safetensors")
    tensors["model.layers.2.self_attn.q_proj.weight"] = torch.randn(32, 32)
    save_file(tensors, tmp_path / "model.safetensors")
    report = check_files(adapter, tmp_path / "model.safetensors")
    assert report.clean and [f.kind for f in report.findings] == ["untouched-target"]


def test_weights_that_are_not_finite(saved: Path, adapter: Path, tmp_path: Path) -> None:
    tensors = load_file(saved / "single" / "model.safetensors")
    tensors[f"{Q}.weight"][2, 5] = float("nan")
    tensors[f"{Q}.weight"][4, 5] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors")
    (problem,) = check_files(adapter, tmp_path / "model.safetensors").problems
    assert problem.kind == "non-finite-weight" and problem.rows == (2, 4) and problem.count == 2


def test_other_names_in_the_base(saved: Path, tmp_path: Path) -> None:
    """A body saved without its head; a base inside of another; a head that is tied."""
    tensors = load_file(saved / "single" / "model.safetensors")
    for name, renamed in (
        ("body", {k.removeprefix("model."): v for k, v in tensors.items() if k != "lm_head.weight"}),
        ("inside", {f"language_model.{k}": v for k, v in tensors.items()}),
    ):
        (tmp_path / name).mkdir()
        save_file(renamed, tmp_path / name / "model.safetensors")
        assert check_files(saved / "adapter", tmp_path / name).findings == []
    # As checkpoints of Qwen2-VL, and the model that transformers makes of one, call the layers.
    renamed = {
        k.replace("model.layers", "model.language_model.layers"): v
        for k, v in load_file(saved / "adapter" / "adapter_model.safetensors").items()
    }
    save_file(renamed, tmp_path / "images.safetensors")
    seeing = {k.replace("model.", "model.visual."): v + 1 for k, v in tensors.items() if k != "lm_head.weight"}
    save_file({**tensors, **seeing}, tmp_path / "base.safetensors")
    report = check_files(tmp_path / "images.safetensors", tmp_path / "base.safetensors")
    assert report.checked == 6 and [f.kind for f in report.findings] == ["assumed-scaling"]
    save_file(seeing, tmp_path / "other.safetensors")
    report = check_files(tmp_path / "images.safetensors", tmp_path / "other.safetensors")
    assert report.checked == 0 and {f.kind for f in report.problems} == {"missing-target"}
    tied = llama(tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    model = adapted(tied, target_modules=["lm_head"])
    model.save_pretrained(tmp_path / "head", save_embedding_layers=False)
    report = check_files(tmp_path / "head", tmp_path / "tied")
    assert report.findings == [] and report.checked == 1


def test_embeddings_that_were_saved_with_the_adapter(tmp_path: Path) -> None:
    """PEFT loads them over the base's, so the norms are theirs."""
    model = adapted(llama(), target_modules=["embed_tokens", "q_proj"])
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    assert any("base_layer" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    other = llama()
    with torch.no_grad():
        other.model.embed_tokens.weight[:, 3] = 0
    other.save_pretrained(tmp_path / "base")
    report = check_files(tmp_path / "adapter", tmp_path / "base")
    assert report.findings == [] and report.checked == 3


def test_quantised_bases(saved: Path, adapter: Path, tmp_path: Path) -> None:
    """What cannot be read is said, and is not clean; what PEFT refuses is an error."""
    tensors = load_file(saved / "single" / "model.safetensors")
    config = json.loads((saved / "single" / "config.json").read_text())
    for method, refused in (("bitsandbytes", False), ("gptq", True)):
        folder = tmp_path / method
        folder.mkdir()
        packed = dict(tensors)
        weight = packed.pop(f"{Q}.weight")
        if method == "bitsandbytes":
            packed[f"{Q}.weight"] = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
            packed[f"{Q}.weight.absmax"] = torch.zeros(16)
        else:
            packed[f"{Q}.qweight"] = torch.zeros(4, 32, dtype=torch.int32)
        save_file(packed, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
        report = check_files(adapter, folder)
        (unread,) = [f for f in report.problems if f.kind == "unread"]
        assert unread.site == Q and "its norms are not checked" in unread.text
        assert report.checked == 5 and report.layers == 6
        assert any(f.kind == "refused" for f in report.findings) == refused


def test_what_peft_refuses_is_refused() -> None:
    """The table of refusals is the installed PEFT's."""
    import inspect

    from peft.tuners.lora import aqlm, awq, eetq, gptq

    for option, value in (("lora_bias", True), ("megatron_config", {"a": 1})):
        assert option in peft_files._REFUSED
        with pytest.raises(ValueError, match=r"(?i)dora"):
            LoraConfig(use_dora=True, **{option: value})
    for option, value in (("alora_invocation_tokens", [1]), ("target_parameters", ["weight"])):
        assert option in peft_files._REFUSED
        targets = [] if option == "target_parameters" else ["0"]
        with pytest.raises(ValueError, match=r"(?i)variant|dora"):
            get_peft_model(
                nn.Sequential(nn.Linear(4, 4)), LoraConfig(use_dora=True, target_modules=targets, **{option: value})
            )
    for module in (aqlm, awq, eetq, gptq):
        assert module.__name__.rsplit(".", 1)[-1] in peft_files.REFUSED_QUANTIZATION
        assert "does not support DoRA" in inspect.getsource(module)

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)

    with pytest.raises(ValueError, match="does not support DoRA"):
        get_peft_model(Attention(), LoraConfig(use_dora=True, target_modules=["attention"]))


def test_a_multihead_attention(tmp_path: Path) -> None:
    attention = nn.MultiheadAttention(8, 2)
    (tmp_path / "base").mkdir()
    save_file({f"encoder.{k}": v for k, v in attention.state_dict().items()}, tmp_path / "base" / "model.safetensors")
    factors = {
        "lora_A.weight": torch.ones(2, 8),
        "lora_B.weight": torch.ones(24, 2),
        "lora_magnitude_vector": torch.ones(24),
    }
    save_file({f"base_model.model.encoder.{k}": v for k, v in factors.items()}, tmp_path / "adapter_model.safetensors")
    report = check_files(tmp_path / "adapter_model.safetensors", tmp_path / "base")
    assert [f.kind for f in report.problems] == ["refused"] and "MultiheadAttention" in report.problems[0].text


# -- files of sd-scripts and LyCORIS ------------------------------------------------------------------------------------


def kohya(folder: Path, by_input: bool = False, zero: bool = False) -> tuple[Path, Path]:
    """A pipeline's folders, and a file of LyCORIS that adapts two layers of it."""
    g = torch.Generator().manual_seed(0)
    linear, conv, text = (torch.randn(*shape, generator=g) for shape in ((24, 16), (8, 6, 3, 3), (16, 16)))
    up = 0.1 * torch.randn(24, 4, generator=g)
    if zero:
        linear[3], up[3] = 0, 0
    for component, weights in (
        ("unet", {"down_blocks.0.attn.to_q.weight": linear, "conv_in.weight": conv}),
        ("text_encoder", {"encoder.to_q.weight": text}),
        ("text_encoder_2", {"encoder.to_q.weight": text + 1}),
    ):
        (folder / "base" / component).mkdir(parents=True)
        name = "diffusion_pytorch_model" if component == "unet" else "model"
        save_file(weights, folder / "base" / component / f"{name}.safetensors")
    to_q, conv_in, of_text = "lora_unet_down_blocks_0_attn_to_q", "lora_unet_conv_in", "lora_te2_encoder_to_q"
    down = 0.1 * torch.randn(4, 16, generator=g)
    adapted = linear + 0.5 * up @ down
    save_file(
        {
            f"{to_q}.lora_down.weight": down,
            f"{to_q}.lora_up.weight": up,
            f"{to_q}.alpha": torch.tensor(2.0),
            f"{to_q}.dora_scale": adapted.norm(dim=0, keepdim=True) if by_input else adapted.norm(dim=1, keepdim=True),
            f"{conv_in}.lora_down.weight": torch.zeros(4, 6, 3, 3),
            f"{conv_in}.lora_up.weight": torch.zeros(8, 4, 1, 1),
            f"{conv_in}.dora_scale": conv.flatten(1).norm(dim=1).view(-1, 1, 1, 1),
            f"{of_text}.lora_down.weight": torch.zeros(4, 16),
            f"{of_text}.lora_up.weight": torch.zeros(16, 4),
            f"{of_text}.dora_scale": (text + 1).norm(dim=1, keepdim=True),
        },
        folder / "style.safetensors",
    )
    return folder / "style.safetensors", folder / "base"


@pytest.mark.parametrize("by_input", [False, True])
def test_kohya(tmp_path: Path, by_input: bool) -> None:
    """Scaling, axes and the parts of a pipeline are right if magnitudes that are the norms are found to be."""
    adapter, base = kohya(tmp_path, by_input)
    report = check_files(adapter, base)
    assert report.layers == report.checked == 3
    sites = {"unet.down_blocks.0.attn.to_q", "unet.conv_in", "text_encoder_2.encoder.to_q"}
    assert {f.site for f in report.notes if f.kind == "untrained"} == sites
    assert [f.kind for f in report.problems] == (["magnitude-axis"] if by_input else [])


def test_kohya_rows_of_zeros_and_other_bases(tmp_path: Path) -> None:
    adapter, base = kohya(tmp_path, zero=True)
    report = check_files(adapter, base)
    assert [(f.kind, f.rows) for f in report.findings if "zero" in f.kind] == [("zero-norm-with-epsilon", (3,))]
    assert report.clean
    report = check_files(adapter, base / "text_encoder")
    assert "missing-target" in {f.kind for f in report.problems} and "layout" in report.problems[0].text


# -- what is read, and bad input ----------------------------------------------------------------------------------------


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


@pytest.fixture
def blocks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Receives the bytes of every block of a weight that is read."""
    sizes: list[int] = []
    original = stored.Tensors.weight

    def counted(self: Any, name: str) -> Any:
        weight = original(self, name)
        if isinstance(weight, str):
            return weight

        def rows(first: int, last: int) -> torch.Tensor:
            block = weight.rows(first, last)
            sizes.append(block.numel() * block.element_size())
            return block

        return Weight(weight.shape, weight.dtype, rows)

    monkeypatch.setattr(stored.Tensors, "weight", counted)
    return sizes


def test_a_base_is_read_by_blocks_of_what_is_adapted(tmp_path: Path, blocks: list[int]) -> None:
    """A base of 4 GiB, of which one matrix of 64 MiB is adapted."""
    sparse(tmp_path / "model.safetensors", {"other.weight": (1 << 20, 1 << 11), "head.weight": (1 << 16, 512)})
    factors = {
        "lora_A.weight": torch.ones(2, 512),
        "lora_B.weight": torch.zeros(1 << 16, 2),
        "lora_magnitude_vector": torch.ones(1 << 16),
    }
    factors["lora_B.weight"][1:] = 1.0
    save_file({f"base_model.model.head.{k}": v for k, v in factors.items()}, tmp_path / "adapter.safetensors")
    report = check_files(tmp_path / "adapter.safetensors", tmp_path / "model.safetensors")
    assert [(f.kind, f.rows) for f in report.problems] == [("zero-norm", (0,))]
    assert sum(blocks) == 2 * (1 << 16) * 512 and max(blocks) <= 8 << 20 and len(blocks) >= 8


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lora_alpha", None, "lora_alpha is None, not a finite number"),
        ("lora_alpha", "x", "lora_alpha is 'x'"),
        ("lora_alpha", True, "lora_alpha is True"),
        ("r", None, "r is None, not a positive whole number"),
        ("rank_pattern", ["q_proj"], "rank_pattern is a list, not an object"),
        ("rank_pattern", {"q_proj": 0}, "rank_pattern['q_proj'] is 0, not a positive whole number"),
        ("rank_pattern", {"q_proj": None}, "rank_pattern['q_proj'] is None"),
        ("rank_pattern", {"q_proj": "a"}, "rank_pattern['q_proj'] is 'a'"),
        ("alpha_pattern", {"q_proj": None}, "alpha_pattern['q_proj'] is None, not a finite number"),
        ("alpha_pattern", {"*.q_proj": 2}, "alpha_pattern has '*.q_proj', which is no regular expression (nothing to repeat at position 0)"),
        ("base_model_name_or_path", None, "the base model is not named by the adapter: give its folder"),
        ("base_model_name_or_path", "some/where", "the base model 'some/where', which adapter_config.json names, is no folder here: give"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_settings(
    name: str, value: Any, message: str, adapter: Path, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change(adapter, option(name, value))
    base = [] if name == "base_model_name_or_path" else ["--base", str(saved / "base")]
    assert main(["check", str(adapter), *base]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and "adapter" in captured.err
    assert captured.err.count("\n") == 1 and not captured.out


def test_files_without_what_they_should_hold(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    save_file({}, tmp_path / "empty" / "model.safetensors")
    for path in (tmp_path / "empty", tmp_path / "empty" / "model.safetensors"):
        with pytest.raises(ValueError, match=r"empty.* holds no tensor"):
            check_files(adapter, path)
    style, base = kohya(tmp_path)
    tensors = load_file(style)
    tensors["lora_unet_down_blocks_0_attn_to_q.alpha"] = torch.ones(3)
    save_file(tensors, style)
    with pytest.raises(ValueError, match=r"style.safetensors: lora_unet.*\.alpha has 3 entries"):
        check_files(style, base)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "there is no adapter 'nowhere'"),
        (["{saved}/base", "--base", "{saved}/base"], "safetensors files and no adapter_config.json"),
        (["{saved}/adapter", "--base", "nowhere"], "there is no base model 'nowhere'"),
        (["{saved}/adapter", "--base", "{saved}"], "has no safetensors file"),
        (["{saved}/adapter"], "give its folder with --base"),
        ([""], "adapter is empty"),
        (["{saved}/adapter", "--base", ""], "base is empty"),
        (["{saved}", "--base", "{saved}/base"], "holds adapters in folders of their own: check adapter"),
        (["{saved}/adapter", "--base", "{saved}/single/config.json"], "not a safetensors file"),
    ],
)
def test_bad_input(saved: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *(a.format(saved=saved) for a in arguments)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_bad_files(adapter: Path, saved: Path, tmp_path: Path) -> None:
    def refuses(match: str, mutate: Callable[..., Any] | None = None) -> None:
        folder = Path(shutil.copytree(saved / "adapter", tmp_path / f"copy {match[:12]}"))
        if mutate is not None:
            change(folder, mutate)
        with pytest.raises(ValueError, match=match):
            check_files(folder, saved / "base")

    refuses("peft_type is 'LOHA'", option("peft_type", "LOHA"))
    refuses("r is 'four'", option("r", "four"))

    def plain(tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
        config["use_dora"] = False
        for name in [n for n in tensors if "magnitude" in n]:
            del tensors[name]

    refuses("is no DoRA adapter", plain)
    refuses("no tensors named lora_A", lambda tensors, config: (tensors.clear(), tensors.update(x=torch.ones(1))))
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        check_files(adapter, saved / "base")
    (adapter / "adapter_model.safetensors").write_bytes(b"no such file")
    shutil.copy(saved / "adapter" / "adapter_config.json", adapter)
    with pytest.raises(ValueError, match="not a safetensors file"):
        check_files(adapter, saved / "base")
    broken = Path(shutil.copytree(saved / "base", tmp_path / "broken"))
    next(iter(sorted(broken.glob("*.safetensors")))).unlink()
    with pytest.raises(ValueError, match="which is not there"):
        check_files(saved / "adapter", broken)
