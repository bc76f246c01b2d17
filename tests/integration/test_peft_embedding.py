"""PEFT's DoRA on embeddings: the linear form with one-hot rows as activations, and column norms of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import (
    assert_same_run,
    base_model,
    compile_eagerly,
    lora_config,
    randomise,
    rewritten_sites,
    run,
    tokens,
)
from peft import get_peft_model
from torch.nn import functional as F
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import dorafx
from dorafx import rewrite_log


def adapted(kind: str, targets: list[str], **lora: Any) -> Any:
    if kind == "gemma3":
        torch.manual_seed(0)
        base: Any = Gemma3ForCausalLM(
            Gemma3TextConfig(
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=4,
                num_key_value_heads=2,
                head_dim=8,
                vocab_size=61,
            )
        )
    else:
        base = base_model(kind)
    model = randomise(get_peft_model(base, lora_config(target_modules=targets, **lora)))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_embedding" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model.train()


MODELS = {
    "llama": ("llama", ["embed_tokens", "q_proj"]),
    "gpt2 tied": ("gpt2", ["wte", "c_attn"]),
    "gemma3 scaled": ("gemma3", ["embed_tokens", "v_proj"]),
}


@pytest.mark.default_cases("dtype0-gpt2 tied", "dtype0-gemma3 scaled")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_and_gradients(name: str, dtype: torch.dtype) -> None:
    model = adapted(*MODELS[name]).to(dtype)
    expected = run(model, lambda: model(input_ids=tokens()).logits)
    compiled = compile_eagerly(model, **{"dorafx.verify": True})
    actual = run(model, lambda: compiled(input_ids=tokens()).logits)
    assert_same_run(actual, expected, 1e-5 if dtype == torch.float32 else 0.05)
    assert_embedding_rewritten(model)


def assert_embedding_rewritten(model: Any) -> None:
    assert not rewrite_log().misses
    embeddings = [r for r in rewrite_log().rewrites if r.pattern == "embedding"]
    assert len(embeddings) == 1
    assert embeddings[0].d_in == 61, "the vocabulary is what the norm sums over"
    assert embeddings[0].norm_placement == "prologue"
    assert len(rewritten_sites()) == 2


@pytest.mark.slow
def test_inductor() -> None:
    model = adapted(*MODELS["llama"])
    expected = run(model, lambda: model(input_ids=tokens()).logits)
    compiled = torch.compile(model, backend="dorafx", fullgraph=True, options={"dorafx.strict": True})
    assert_same_run(run(model, lambda: compiled(input_ids=tokens()).logits), expected)
    assert_embedding_rewritten(model)


def test_optimize_and_generate() -> None:
    model = adapted(*MODELS["llama"]).eval()
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=tokens(), **settings)
    dorafx.optimize(model, codegen="eager", strict=True)
    assert torch.equal(model.generate(input_ids=tokens(), **settings), expected)
    assert {r.pattern for r in rewrite_log().rewrites} == {"embedding", "linear"}
    assert rewrite_log().norms.reused > 0


Tables = dict[str, torch.Tensor]


def _direct(t: Tables, i: torch.Tensor) -> torch.Tensor:
    n = (t["E"] + 1.5 * (t["A"] @ t["B"]).detach()).norm(dim=0).detach()
    return t["m"] / n * (F.embedding(i, t["E"]) + 1.5 * F.embedding(i, t["A"]) @ t["B"])


def _separate(t: Tables, i: torch.Tensor) -> torch.Tensor:
    g = t["m"] / torch.linalg.vector_norm(t["E"] + 1.5 * t["A"] @ t["B"], dim=0)
    return g * torch.embedding(t["E"], i) + g * (F.embedding(i, t["A"], padding_idx=0) @ t["B"]) * 1.5


def _other_indices(t: Tables, i: torch.Tensor) -> torch.Tensor:
    """The adapter looks up other rows than the base: the same values times the same scaling, so a rewrite is right."""
    g = t["m"] / (t["E"] + 1.5 * t["A"] @ t["B"]).norm(dim=0).detach()
    return g * (F.embedding(i, t["E"]) + 1.5 * F.embedding(i.flip(0), t["A"]) @ t["B"])


def _other_table(t: Tables, i: torch.Tensor) -> torch.Tensor:
    g = t["m"] / (t["E"] + 1.5 * t["A"] @ t["B"]).norm(dim=0).detach()
    return g * (F.embedding(i, t["E"] * 2) + 1.5 * F.embedding(i, t["A"]) @ t["B"])


def _row_norm(t: Tables, i: torch.Tensor) -> torch.Tensor:
    """A norm a token, looked up: not an embedding DoRA, and not a composition that is known."""
    n = (t["E"] + 1.5 * t["A"] @ t["B"]).norm(dim=1)
    return F.embedding(i, t["E"]) / n[i][..., None]


@pytest.mark.parametrize(
    ("program", "pattern"),
    [
        (_direct, "embedding"),
        (_separate, "embedding"),
        (_other_indices, "embedding"),
        (_other_table, "norm_only"),
        (_row_norm, "norm_only"),
    ],
)
def test_spellings(program: Callable[[Tables, torch.Tensor], torch.Tensor], pattern: str) -> None:
    generator = torch.Generator().manual_seed(0)

    def parameter(*shape: int) -> torch.Tensor:
        return torch.nn.Parameter(torch.randn(*shape, dtype=torch.float64, generator=generator))

    tables = {
        "E": parameter(20, 6).requires_grad_(False),
        "A": parameter(20, 3),
        "B": parameter(3, 6),
        "m": parameter(6),
    }
    leaves = [p for p in tables.values() if p.requires_grad]
    i = torch.tensor([[0, 3, 19], [3, 0, 7]])
    compiled = torch.compile(
        lambda i: program(tables, i), backend="dorafx", fullgraph=True, options={"dorafx.codegen": "eager"}
    )
    expected, actual = program(tables, i), compiled(i)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(expected.sin().sum(), leaves, allow_unused=True)
    got = torch.autograd.grad(actual.sin().sum(), leaves, allow_unused=True)
    for one, other in zip(got, wanted):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    assert {r.pattern for r in rewrite_log().rewrites} == {pattern}
    assert not rewrite_log().misses


def test_a_table_that_is_rescaled_by_its_look_up_is_left_alone() -> None:
    """``max_norm`` writes to the table."""
    table = torch.nn.Parameter(torch.randn(20, 6), requires_grad=False)
    a, b, m = torch.randn(20, 3), torch.randn(3, 6), torch.rand(6)
    start = table.detach().clone()

    def program(i: torch.Tensor) -> torch.Tensor:
        y = F.embedding(i, table, max_norm=1.0)
        n = (table + a @ b).norm(dim=0).detach()
        return m / n * (y + F.embedding(i, a) @ b)

    i = torch.tensor([1, 5, 7])
    expected = program(i)
    with torch.no_grad():
        table.copy_(start)
    actual = torch.compile(program, backend="dorafx", options={"dorafx.codegen": "eager"})(i)
    torch.testing.assert_close(actual, expected)
