"""What is measured: cases, presets, anchors, and wrong values as the command line reports them."""

from __future__ import annotations

from pathlib import Path

import pytest

from dorafx.bench.plan import ANCHORS, SUITES, Settings, anchors_of, cases_of
from dorafx.bench.shapes import PRESETS, Shape, parse_shape
from dorafx.cli import main


@pytest.mark.parametrize(
    ("name", "billions"), [("llama-3-8b", 6.98), ("qwen3-32b", 31.2), ("mistral-small-24b", 22.2), ("gemma3-27b", 25.6)]
)
def test_presets_have_the_published_number_of_weights(name: str, billions: float) -> None:
    """Weights in the decoders' linears: what the models' cards give without embeddings, to three digits."""
    preset = PRESETS[name]
    weights = preset.layers * sum(d_out * d_in for d_out, d_in in preset.linears().values())
    assert weights / 1e9 == pytest.approx(billions, abs=0.05)
    assert sum(len(s.label.split("/")) for s in preset.shapes()) == 7


def test_norm_covers_sizes_and_ranks() -> None:
    cases = cases_of("norm", Settings(("norm",)))
    sides = {(c.parameters["d_out"], c.parameters["rank"]) for c in cases}
    assert sides == {(d, r) for d in (1024, 2048, 4096, 8192) for r in (8, 64, 384)}
    own = cases_of("norm", Settings(("norm",), shapes=("8x16:4", "Llama-3-8B"), rank=(2, 3)))
    assert own[0].parameters == {"d_out": 8, "d_in": 16, "rank": 4}
    assert len(own) == 1 + 2 * len(PRESETS["llama-3-8b"].shapes())
    assert own[1].label == "4096x4096 r2 (llama-3-8b q/o)"


def test_compose_has_one_case_for_each_width() -> None:
    widths = [c.parameters["d_out"] for c in cases_of("compose", Settings(("compose",), shapes=("qwen3-32b",)))]
    assert sorted(widths) == [1024, 5120, 8192, 25600]


def test_models_take_presets_cut_to_the_layers() -> None:
    (case,) = cases_of("model", Settings(("model",), shapes=("gemma3-27b",), layers=(2,), rank=(16,)))
    size = case.parameters["size"]
    assert (size["hidden"], size["head_dim"], size["layers"], size["rank"]) == (5376, 128, 2, 16)
    per_token = 2 * 2 * sum(d_out * d_in for d_out, d_in in PRESETS["gemma3-27b"].linears().values())
    assert case.work["prefill"].flops == pytest.approx(1024 * per_token, rel=0.03)


def test_every_case_comes_once() -> None:
    memory = cases_of("memory", Settings(("memory",), layers=(2, 4)))
    assert [c.label.split(",")[0] for c in memory] == ["2816x1024 r128", "hidden 1024", "hidden 1024"]
    assert len(cases_of("norm", Settings(("norm",), shapes=("8x8", "8x8:8"), rank=(8,)))) == 1


def test_the_least_work_is_what_the_formulas_say() -> None:
    (norm,) = cases_of("norm", Settings(("norm",), shapes=("8x16:4",)))
    assert norm.work["time"].flops == 2 * 8 * 16 * 4
    assert norm.work["time"].bytes == 4 * (8 * 16 + 4 * (8 + 16)) + 4 * 8
    for weights, packed in (("nf4", 64 * 64 / 2 + 64 * 4), ("bnb8", 64 * 64 + 64 * 4), ("affine", 64 * 64 + 128 * 3)):
        (norm,) = cases_of("norm", Settings(("norm",), shapes=("64x64:4",), dtype="bfloat16", weights=weights))
        assert norm.work["time"].bytes == packed + 2 * 4 * 128 + 4 * 64
    (layer,) = cases_of("layer", Settings(("layer",), shapes=("8x16:4",), tokens=3))
    assert layer.work["forward"].flops == 2 * 3 * (8 * 16 + 4 * (8 + 16))
    (compose,) = cases_of("compose", Settings(("compose",), hidden=(8,), tokens=3, dtype="bfloat16"))
    assert compose.work["forward"].bytes == 3 * 3 * 8 * 2


def test_every_suite_says_what_it_can_be_compared_with() -> None:
    for name, suite in SUITES.items():
        assert set(suite.default) <= set(suite.allowed) <= set(ANCHORS)
        assert anchors_of(name, ()) == suite.default and anchors_of(name, ["none"]) == ()
        refused = set(ANCHORS) - set(suite.allowed)
        assert bool(suite.why) == bool(refused)
        for anchor in refused:
            with pytest.raises(ValueError, match=f"{anchor} makes no sense in the suite {name} .*allowed are"):
                anchors_of(name, [anchor])


def test_shapes_by_hand() -> None:
    assert parse_shape("12X34:5") == Shape(12, 34, 5)
    assert parse_shape("12x34") == Shape(12, 34)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a suite: norm, compose, layer"),
        (["norms"], "'norms' is not one of norm, compose"),
        (["norm", "--against", "paper"], "'paper' is not one of peft, peft-inductor, dense, chunked, lora, merged"),
        (["norm", "--against", "lora"], "allowed are peft, peft-inductor, dense, chunked"),
        (["norm", "memory", "--against", "peft", "merged"], "makes no sense in the suite norm"),
        (["compile", "--against", "peft"], "allowed are peft-inductor, lora"),
        (["pass", "--against", "lora"], "(it has no pass); allowed are none"),
        (["norm", "--shapes", "8"], "'8' is not one of llama-3-8b, qwen3-32b, mistral-small-24b, gemma3-27b, nor"),
        (["norm", "--shapes", "0x8"], "nor of the form D_OUTxD_IN"),
        (["model", "--shapes", "8x8"], "'8x8' is not one of llama-3-8b"),
        (["model", "--hidden", "100"], "hidden must be a multiple of 64"),
        (["norm", "--dtype", "int8"], "'int8' is not one of float32, bfloat16, float16, float64"),
        (["norm", "--device", "tpu"], "'tpu' is not cpu, cuda or cuda:NUMBER"),
        (["norm", "--device", "cuda:99"], "CUDA devices here; cpu is allowed"),
        (["norm", "--hidden", "64", "--shapes", "8x8"], "give one of them"),
        (["norm", "--rank", "0"], "--rank must be at least 1"),
        (["norm", "--rounds", "0"], "--rounds must be at least 1"),
        (["norm", "--micro-batches", "0"], "--micro-batches must be at least 1"),
        (["norm", "--seconds", "nan"], "--seconds must be a number of seconds"),
        (["norm", "--threads", "-1"], "--threads must be at least 1"),
        (["norm", "--mode", "fast"], "'fast' is not one of default, reduce-overhead"),
        (["norm", "--mode", "max-autotune", "--codegen", "eager"], "give one of them"),
        (["layer", "--compose", "cuda"], "'cuda' is not one of auto, accumulated, epilogue, triton, triton_linear"),
        (["norm", "--compose", "epilogue"], "--compose epilogue goes with the suites compose, layer"),
        (["pass", "--checkpointing"], "--checkpointing goes with the suites model, memory, compile, not with pass"),
        (
            ["model", "decode", "--micro-batches", "2"],
            "--micro-batches 2 goes with the suites model, memory, compile, not",
        ),
        (["model", "--autocast"], "--autocast is for --dtype bfloat16 or float16, not float32"),
        (
            ["layer", "--autocast", "--dtype", "bfloat16"],
            "--autocast goes with the suites model, decode, not with layer",
        ),
        (["norm", "--codegen", "eager"], "--codegen eager goes with the suites compose, layer"),
        (["pass", "--mode", "max-autotune"], "--mode max-autotune goes with the suites norm, compose"),
        (
            ["norm", "--scope", "auto"],
            "--scope auto goes with the suites model, decode, compile, generate, not with norm",
        ),
        (["compose", "--compose", "triton_linear"], "which has no products; allowed are auto, triton"),
        (["layer", "--compose", "triton", "--device", "cpu"], "--compose triton needs a CUDA device"),
        (["norm", "--weights", "int4"], "'int4' is not one of dense, nf4, bnb8, affine"),
        (["layer", "--weights", "nf4"], "--weights nf4 goes with the suite norm alone"),
        (["norm", "--weights", "nf4", "--dtype", "float64"], "a dtype other than float64"),
        (["norm", "--weights", "nf4", "--hidden", "96"], "groups of 64 in a row, which do not divide 96"),
        (["norm", "--codegen", "nonsense"], "unknown backend 'nonsense'; known are"),
        (["norm", "-o", "no/such/folder/x.json"], "no/such/folder/x.json"),
        (["gpu", "norm", "--device", "cpu"], "leave the others out"),
        (["gpu", "--device", "cpu", "--part", "macro"], "--part: 'macro' is not one of micro, model, decode, tune"),
        (["gpu", "--device", "cpu", "--budget", "0"], "--budget must be a number of seconds above 0"),
        (["gpu", "--device", "cpu", "--against", "peft"], "leave --against out"),
        (
            ["gpu", "--device", "cpu", "--peer-path", "."],
            "--peer-path: . has neither peft/tuners/lora/dora_fused.py nor",
        ),
        (["gpu", "--device", "cuda:99"], "CUDA devices here"),
        (["norm", "--quick"], "--quick goes with dorafx bench gpu"),
        (["norm", "--budget", "5"], "--budget goes with dorafx bench gpu"),
        (["--plot", "absent.json"], "absent.json"),
        (["--plot", "a.json", "--table", "a.json"], "give one of them"),
        (["norm", "--table", "a.json"], "leave the suites out"),
        (["norm", "--markdown"], "--markdown goes with --table FILE"),
        (["--table", "a.json", "-o", "b.json"], "leave -o out"),
    ],
)
def test_wrong_values_are_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert len(error.splitlines()) == 1
