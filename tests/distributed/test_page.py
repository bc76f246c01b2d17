"""``examples/guide/distributed.md`` says what runs, and its numbers are those of its script."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
from distributed_support import SITES, STEPS, check, launch
from pages import is_current

EXAMPLES = Path(__file__).parents[2] / "examples"


def _costs() -> Any:
    spec = importlib.util.spec_from_file_location("distributed_costs", EXAMPLES / "benchmarks" / "distributed_costs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    __import__("sys").modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.page
def test_the_page_holds_what_the_script_prints() -> None:
    page, tables = EXAMPLES / "guide" / "distributed.md", _costs().tables(rank=16, tokens=8192)
    written = page.read_text(encoding="utf-8")
    head = tables.split("\n", 1)[0]
    assert written.count(f"\n{head}\n") == 1
    is_current(page, written[: written.index(f"\n{head}\n") + 1] + tables + "\n")


def test_parameters_are_counted_as_peft_makes_them() -> None:
    """A Llama of the script's formulas against one of transformers and PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    costs = _costs()
    model = costs.Model("tiny", costs.Preset(32, 48, 4, 2, 8, 3), 61, 4)
    with torch.device("meta"):
        base = LlamaForCausalLM(
            LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_hidden_layers=3,
                vocab_size=61,
                tie_word_embeddings=False,
            )
        )
    matrices = sum(p.numel() for p in base.parameters() if p.dim() == 2)
    assert model.frozen == matrices
    adapted = get_peft_model(base, LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"))
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert model.trained == sum(p.numel() for p in trained.values())
    assert model.rows == sum(p.numel() for name, p in trained.items() if "magnitude" in name)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_functions_for_data_and_full_sharding(tmp_path: Path) -> None:
    results = launch("worker_page.py", tmp_path)
    ddp, fsdp = check(results, "data parallel"), check(results, "fully sharded")
    assert ddp["losses"] < 1e-6 and ddp["gradients"] < 1e-5 and ddp["parameters"] < 1e-4
    # Gathered in bf16.
    assert fsdp["losses"] < 0.02 and fsdp["gradients"] < 0.1
    for found in (ddp, fsdp):
        assert found["patterns"] == ["linear"] and not found["misses"]
        assert found["computed"] == SITES * STEPS


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_function_for_tensor_parallelism(tmp_path: Path) -> None:
    found = check(launch("worker_page.py", tmp_path, processes=4), "tensor parallel")
    assert found["output"] < 1e-5 and found["gradients"] < 1e-5
    assert found["patterns"] == ["linear"] and not found["misses"]
    assert found["computed"] == SITES
