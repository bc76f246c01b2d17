"""The Trainer's own switch for compiling, and one line before the Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import dorafx
from dorafx import rewrite_log

pytest.importorskip("accelerate")
ROWS = torch.randint(0, 67, (8, 12), generator=torch.Generator().manual_seed(0))


def adapted() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=67,
    )
    lora = LoraConfig(r=4, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(LlamaForCausalLM(config), lora)


def trainer(model: Any, folder: Path, **changes: Any) -> Trainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=3,
        per_device_train_batch_size=4,
        logging_steps=1,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        **changes,
    )
    return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ROWS])


def losses(run: Trainer) -> list[float]:
    run.train()
    return [float(entry["loss"]) for entry in run.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_the_switch(tmp_path: Path) -> None:
    """Accepted where dorafx is imported (``tests/integrations/test_dynamo_backend.py``): the whole model is compiled with it."""
    expected = losses(trainer(adapted(), tmp_path))
    run = trainer(adapted(), tmp_path, torch_compile_backend="dorafx")
    assert losses(run) == pytest.approx(expected, abs=1e-3)
    assert len({r.site for r in rewrite_log().rewrites}) == 7 and not rewrite_log().misses


@pytest.mark.slow
def test_one_line_before_the_trainer_does_the_same(tmp_path: Path) -> None:
    expected = losses(trainer(adapted(), tmp_path))
    model = adapted()
    found = losses(trainer(dorafx.optimize(model, codegen="eager"), tmp_path))
    assert len(rewrite_log().rewrites) >= 7 and not rewrite_log().misses
    assert found == pytest.approx(expected, abs=1e-3)
    assert len(expected) == 3 and expected[0] != expected[-1]
