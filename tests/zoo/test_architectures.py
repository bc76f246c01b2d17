"""Ten architectures: one graph, every DoRA layer rewritten once, and errors no larger than the original's."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dorafx import explain, rewrite_log
from models import ARCHITECTURES, build, dora_sites

NAMES = sorted(ARCHITECTURES)


def in_double(model: Any) -> Any:
    return copy.deepcopy(model).double()


def run(call: Any, model: Any, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits and gradients of one call."""
    out = call(**inputs)
    out.loss.backward()
    gradients = {n: p.grad.detach().double() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return out.logits.detach().double(), gradients


def squared_error(got: dict[str, torch.Tensor], exact: dict[str, torch.Tensor]) -> float:
    """Over all tensors, each relative to its own size, so that small gradients count like large ones."""
    return sum(float((got[n] - exact[n]).pow(2).sum() / exact[n].pow(2).sum().clamp_min(1e-30)) for n in exact)


@pytest.mark.parametrize("name", NAMES)
def test_graphs_and_rewrites(name: str) -> None:
    """As many graphs as plain LoRA; every DoRA module rewritten exactly once; nothing missed."""
    inputs = ARCHITECTURES[name].inputs()
    plain = explain(build(name, use_dora=False), **inputs)
    model = build(name)
    found = explain(model, **inputs)
    assert found.graph_count <= plain.graph_count
    assert sorted(r.site for r in found.rewrites) == dora_sites(model)
    assert {r.pattern for r in found.rewrites} == {"linear"}
    assert all(r.reason == "" for r in found.rewrites)
    assert found.misses == []


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("name", NAMES)
def test_accuracy_in_fp32(name: str, dropout: float) -> None:
    """Against the same program in fp64, dorafx errs no more than the original does, in logits and every gradient.

    Both errors are a few units of rounding, so each is summed over the tensors of three runs on scaled inputs; what
    remains is a bound on the mean, with the rule's 5 % and the smallest error that fp32 can be blamed for.
    """
    model = build(name, lora_dropout=dropout)
    exact_model = in_double(model)
    compiled = torch.compile(model, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True})
    ours = stock = ours_logits = stock_logits = 0.0
    for seed in range(3):
        inputs = ARCHITECTURES[name].inputs()
        key = "input_ids" if "input_ids" in inputs else "pixel_values"
        inputs[key] = inputs[key].roll(seed, -1)
        wide = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        # A dropout mask does not depend on the dtype that it is drawn for only where it is drawn in one: eval.
        for m in (model, exact_model):
            m.eval()
        exact = run(exact_model, exact_model, wide)
        original, rewritten = run(model, model, inputs), run(compiled, model, inputs)
        ours += squared_error(rewritten[1], exact[1])
        stock += squared_error(original[1], exact[1])
        ours_logits += squared_error({"": rewritten[0]}, {"": exact[0]})
        stock_logits += squared_error({"": original[0]}, {"": exact[0]})
        assert set(rewritten[1]) == set(original[1])
    floor = torch.finfo(torch.float32).eps ** 2
    assert ours**0.5 <= 1.05 * stock**0.5 + floor**0.5, (ours / stock) ** 0.5
    assert ours_logits**0.5 <= 1.05 * stock_logits**0.5 + floor**0.5, (ours_logits / stock_logits) ** 0.5
    assert {r.site for r in rewrite_log().rewrites} == set(dora_sites(model))


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
    torch.testing.assert_close(rewritten[0], original[0], rtol=1e-4, atol=1e-5)
    for n, wanted in original[1].items():
        torch.testing.assert_close(rewritten[1][n], wanted, rtol=1e-3, atol=1e-5, msg=lambda text, n=n: f"{n}: {text}")
    assert {r.pattern for r in rewrite_log().rewrites} == {"linear_dropout"}
    assert {r.site for r in rewrite_log().rewrites} == set(dora_sites(model))


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_flops_of_a_forward(name: str) -> None:
    """LoRA's FLOPs plus 2·d_out·d_in·r a module, exactly; the original takes more than that again."""
    inputs = {k: v for k, v in ARCHITECTURES[name].inputs().items() if k != "labels"}
    counts = {}
    for what, use_dora, backend in (("lora", False, None), ("stock", True, None), ("dorafx", True, "dorafx")):
        model = build(name, use_dora=use_dora).eval()
        call = torch.compile(model, backend=backend, options={"dorafx.codegen": "eager"}) if backend else model
        with torch.no_grad():
            call(**inputs)
            with FlopCounterMode(display=False) as counter:
                call(**inputs)
        counts[what] = counter.get_total_flops()
    norms = sum(2 * r.d_out * r.d_in * r.rank for r in rewrite_log().rewrites)
    assert norms == sum(r.flops_after for r in rewrite_log().rewrites)
    assert counts["dorafx"] == counts["lora"] + norms
    assert counts["stock"] > counts["dorafx"] + norms / 2


def test_no_dense_intermediate_is_left() -> None:
    """The graph for codegen holds the norm and the composition as operators; no identity, nothing of the delta's shape."""
    model = build("llama").eval()
    seen: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, example_inputs: Any) -> Any:
        from dorafx.backend import rewrite_graph_module
        from dorafx.options import Options

        seen.append(rewrite_graph_module(gm, Options(strict=True)))
        return gm.forward

    torch.compile(model, backend=keep, fullgraph=True)(**ARCHITECTURES["llama"].inputs())
    (gm,) = seen
    shapes = {(r.d_out, r.d_in) for r in rewrite_log().rewrites}
    shapes |= {(b, a) for a, b in shapes}
    weights = {n for n in gm.graph.nodes if n.op == "placeholder"}
    targets = [str(n.target) for n in gm.graph.nodes]
    assert not any("eye" in t for t in targets)
    assert sum("row_norm" in t for t in targets) == sum("dorafx.compose" in t for t in targets) == len(dora_sites(model))
    for node in gm.graph.nodes:
        value = node.meta.get("example_value")
        if node not in weights and isinstance(value, torch.Tensor) and tuple(value.shape) in shapes:
            # Only a layer's own view of its weight may have the weight's shape.
            assert all(a in weights for a in node.all_input_nodes), (node.format_node(), tuple(value.shape))


def test_ten_steps_of_training() -> None:
    """Losses of ten AdamW steps from the same seed agree within 1e-5 in fp32."""
    losses = {}
    for compiled in (False, True):
        model = build("llama").train()
        call = torch.compile(model, backend="dorafx") if compiled else model
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        inputs = ARCHITECTURES["llama"].inputs()
        losses[compiled] = []
        for _ in range(10):
            loss = call(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[compiled].append(loss.item())
    assert losses[True][0] > losses[True][-1]
    assert losses[True] == pytest.approx(losses[False], abs=1e-5)
