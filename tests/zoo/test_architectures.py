"""Ten architectures: as many graphs as plain LoRA, every DoRA layer rewritten once, nothing dense left in the graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import ARCHITECTURES, build, dora_sites
from running import Collecting, roots, run

from dorafx import explain, rewrite_log

NAMES = sorted(ARCHITECTURES)


def same_sites(sites: list[str], model: Any) -> bool:
    """Whether each DoRA module is there once, with or without the prefix of PEFT's wrapper."""
    inner = "base_model.model."
    return sorted(inner + s.removeprefix(inner) for s in sites) == dora_sites(model)


@pytest.mark.default_cases("llama")
@pytest.mark.parametrize("name", NAMES)
def test_graphs_and_rewrites(name: str) -> None:
    """As many graphs and breaks as plain LoRA; every DoRA module rewritten exactly once; nothing missed."""
    inputs = ARCHITECTURES[name].inputs()
    plain = explain(build(name, use_dora=False), **inputs)
    model = build(name)
    found = explain(model, **inputs)
    assert found.graph_count <= plain.graph_count
    assert found.graph_break_count <= plain.graph_break_count
    assert len(dora_sites(model)) > 0
    assert same_sites([r.site for r in found.rewrites], model)
    assert {r.pattern for r in found.rewrites} == {"linear"}
    assert all(r.reason == "" for r in found.rewrites)
    assert found.misses == []


@pytest.mark.default_cases("llama-fp32")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_graph_for_codegen(name: str, dtype: torch.dtype) -> None:
    """One graph, with one norm and one composition a layer as operators; no identity, nothing of the delta's shape but
    what is made of the weight alone (transposes and casts for the GEMM)."""
    model = build(name, dtype=dtype).eval()
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in ARCHITECTURES[name].inputs().items()}
    if name != "t5":
        del inputs["labels"]
    graphs = Collecting()
    with torch.no_grad():
        torch.compile(model, backend=graphs, fullgraph=True, dynamic=False)(**inputs)
    assert len(graphs.graphs) == 1
    assert same_sites([r.site for r in rewrite_log().rewrites], model)
    targets = [str(n.target) for n in graphs.nodes()]
    assert not any("eye" in t for t in targets)
    assert sum("dorafx.row_norm" in t for t in targets) == len(dora_sites(model))
    assert sum("dorafx.compose" in t for t in targets) == len(dora_sites(model))
    shapes = {(r.d_out, r.d_in) for r in rewrite_log().rewrites}
    shapes |= {(b, a) for a, b in shapes}
    for node in graphs.nodes():
        value = node.meta.get("example_value")
        if isinstance(value, torch.Tensor) and tuple(value.shape) in shapes:
            (weight,) = roots(node)
            assert "lora" not in weight.name, (node.format_node(), tuple(value.shape))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_training_with_dropout_is_the_same_program(name: str) -> None:
    """Same seed, same masks: the rewritten program in training differs from the original by rounding only."""
    model = build(name, lora_dropout=0.2).train()
    inputs = ARCHITECTURES[name].inputs()
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True})
    torch.manual_seed(5)
    original = run(model, model, inputs)
    torch.manual_seed(5)
    rewritten = run(compiled, model, inputs)
    torch.testing.assert_close(rewritten.logits, original.logits, rtol=1e-4, atol=1e-5)
    assert rewritten.gradients.keys() == original.gradients.keys()
    for n, wanted in original.gradients.items():
        got = rewritten.gradients[n]
        torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-5, msg=lambda text, n=n: f"{n}: {text}")
    assert {r.pattern for r in rewrite_log().rewrites} == {"linear_dropout"}
    assert same_sites([r.site for r in rewrite_log().rewrites], model)
