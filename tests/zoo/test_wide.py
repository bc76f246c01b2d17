"""Twenty-six more architectures: graphs, rewrites, values and gradients; ``examples/guide/zoo.md`` is the table of them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from models import ARCHITECTURES, build, dora_sites
from pages import is_current
from running import InDouble, relative_squares, run
from wide_models import WIDE

from dorafx import explain, rewrite_log

TABLE = Path(__file__).parents[2] / "examples" / "guide" / "zoo.md"
EVERY = {**ARCHITECTURES, **WIDE}
NO_FP64 = ("mixtral", "qwen2_moe")
"""The grouped product of their experts has no fp64 kernel to compare with."""

_HEAD = """# Architectures

Which model families were tested, and whether every DoRA layer of them is rewritten. For anybody who asks whether dorafx
works with a model. For a family that is not listed, `dorafx explain` answers in seconds.

- The models are tiny and random, from transformers and diffusers, with PEFT's DoRA on every linear layer; in ResNet,
  ConvNeXt, UNet and the spectrogram transformer also on convolutions.
- Graphs and graph breaks are those of one training forward, beside those of the same model with plain LoRA.
- For Llama, Mistral, Qwen2, Gemma3, Phi3, GPT-2, OPT, BERT, T5 and ViT the tests also hold that a forward costs exactly
  LoRA's FLOPs plus `2·d_out·d_in·r` a layer, and that errors of logits and gradients against fp64 are at most 1.05
  times the original's (geometric mean over draws of weights and inputs).

Written by `DORAFX_WRITE_PAGES=1 pytest -m page`; the same test without the variable fails where this page is not
current.

| architecture | DoRA modules | rewritten | missed | patterns | graphs (LoRA) | breaks (LoRA) |
|---|---|---|---|---|---|---|
"""


@pytest.fixture(autouse=True)
def _known(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, architecture in WIDE.items():
        monkeypatch.setitem(ARCHITECTURES, name, architecture)


def needs(name: str) -> None:
    if name in ("unet", "dit"):
        pytest.importorskip("diffusers")


def explained(name: str) -> tuple[Any, Any, Any]:
    inputs = EVERY[name].inputs()
    plain = explain(build(name, use_dora=False), **inputs)
    torch._dynamo.reset()
    model = build(name)
    return plain, explain(model, **inputs), model


def recalled(found: Any, model: Any) -> set[str]:
    """DoRA modules that were rewritten, by the ends of their names."""
    sites = {r.site for r in found.rewrites}
    return {want for want in dora_sites(model) if any(want == s or want.endswith("." + s) for s in sites)}


@pytest.mark.default_cases("resnet")
@pytest.mark.parametrize("name", sorted(WIDE))
def test_graphs_and_rewrites(name: str) -> None:
    """As many graphs and breaks as plain LoRA at most; every DoRA module rewritten whole, and once."""
    needs(name)
    plain, found, model = explained(name)
    assert found.graph_count <= plain.graph_count
    assert found.graph_break_count <= plain.graph_break_count
    assert found.misses == [] and all(r.reason == "" for r in found.rewrites)
    assert recalled(found, model) == set(dora_sites(model))
    assert len(found.rewrites) == len(dora_sites(model))
    assert {r.pattern for r in found.rewrites} <= {"linear", "convolution"}


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", sorted(WIDE))
def test_same_program(name: str, training: bool) -> None:
    """Logits and the gradient of every trained parameter, in inference mode and in training mode."""
    needs(name)
    model = build(name).train(training)
    inputs = EVERY[name].inputs()
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True})
    original, rewritten = run(model, model, inputs), run(compiled, model, inputs)
    torch.testing.assert_close(rewritten.logits, original.logits, rtol=1e-4, atol=1e-4)
    assert rewritten.gradients.keys() == original.gradients.keys()
    for n, wanted in original.gradients.items():
        got = rewritten.gradients[n]
        scale = float(wanted.abs().max())
        torch.testing.assert_close(
            got, wanted, rtol=1e-3, atol=1e-3 * scale + 1e-6, msg=lambda text, n=n: f"{n}: {text}"
        )
    assert rewrite_log().rewrites and not rewrite_log().misses


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("training", [False, True])
def test_errors_against_fp64(training: bool) -> None:
    """The error against fp64, over the original's: the geometric mean over architectures, of logits and of gradients, is at
    most 1.05. One draw of one model scatters by its rounding's luck; the mean does not."""
    logs: dict[str, list[float]] = {"logits": [], "gradients": []}
    for name in sorted(set(WIDE) - set(NO_FP64)):
        needs(name)
        torch._dynamo.reset()
        inputs = EVERY[name].inputs()
        model = build(name).train(training)
        double = build(name).double().train(training)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        with InDouble():
            exact = run(double, double, wide)
        compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager"})
        original = relative_squares(run(model, model, inputs), exact)
        rewritten = relative_squares(run(compiled, model, inputs), exact)
        logs["logits"].append(math.log(rewritten["logits"] / original["logits"]) / 2)
        kinds = [what for what in original if what != "logits"]
        pooled = [sum(errors[what] for what in kinds) for errors in (rewritten, original)]
        logs["gradients"].append(math.log(pooled[0] / pooled[1]) / 2)
    means = {what: math.exp(sum(values) / len(values)) for what, values in logs.items()}
    print(means)
    assert all(mean <= 1.05 for mean in means.values()), means


@pytest.mark.page
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_table_is_current() -> None:
    rows = []
    for name in sorted(EVERY):
        needs(name)
        torch._dynamo.reset()
        plain, found, model = explained(name)
        patterns = sorted({r.pattern for r in found.rewrites})
        cells = (
            name,
            len(dora_sites(model)),
            len(recalled(found, model)),
            len(found.misses),
            ", ".join(patterns),
            f"{found.graph_count} ({plain.graph_count})",
            f"{found.graph_break_count} ({plain.graph_break_count})",
        )
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    text = _HEAD + "\n".join(rows) + "\n"
    is_current(TABLE, text)
