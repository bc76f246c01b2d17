"""``dorafx.TrainerCallback``: the only change to a training with transformers or TRL."""

from __future__ import annotations

import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from integration_support import (
    VOCABULARY,
    Perceptron,
    assert_close,
    base_model,
    call,
    dora_sites,
    lora_config,
    peft_model,
    randomise,
    rewritten_sites,
)
from peft import get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import TrainerCallback as Callback

import dorafx
from dorafx import rewrite_log
from dorafx.capture.in_place import is_optimized

pytest.importorskip("accelerate")
ROWS = torch.randint(1, VOCABULARY, (16, 9), generator=torch.Generator().manual_seed(2))
DATA = [{"input_ids": row, "labels": row} for row in ROWS]


class Seen(Callback):
    """What a model is like at each event."""

    def __init__(self) -> None:
        self.optimized: dict[str, list[bool]] = {}

    def _note(self, event: str, model: Any) -> None:
        self.optimized.setdefault(event, []).append(is_optimized(model))

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._note("step", model)

    def on_evaluate(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._note("evaluate", model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self._note("save", model)


def trainer(model: Any, folder: Path, *callbacks: Any, evaluate: bool = False, **changes: Any) -> Trainer:
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "logging_steps": 1,
        "learning_rate": 5e-3,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
        **changes,
    }
    if evaluate:
        settings |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    arguments = TrainingArguments(str(folder), **settings)
    return Trainer(
        model, arguments, train_dataset=DATA, eval_dataset=DATA[:5] if evaluate else None, callbacks=list(callbacks)
    )


def logged(run: Trainer, name: str = "loss") -> list[float]:
    return [float(entry[name]) for entry in run.state.log_history if name in entry]


def callback(**changes: Any) -> Any:
    return dorafx.TrainerCallback(**{"codegen": "eager", **changes})


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What transformers' logger gets; it hands nothing on to the root, where pytest listens."""
    logger = logging.getLogger("transformers.dorafx")
    logger.addHandler(caplog.handler)
    logger.setLevel(logging.INFO)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(logging.NOTSET)


def said(lines: pytest.LogCaptureFixture) -> list[tuple[str, str]]:
    # A record that is handed on to the root after all is caught twice.
    records = {id(r): r for r in lines.records if r.name == "transformers.dorafx"}
    return [(r.levelname, r.getMessage()) for r in records.values()]


# -- the same training -------------------------------------------------------------------------------------------------


@pytest.mark.default_cases("checkpointing-eager")
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_trains_alike(codegen: str, checkpointing: bool, tmp_path: Path, lines: Any) -> None:
    settings: dict[str, Any] = {"gradient_checkpointing": checkpointing, "evaluate": True}
    if checkpointing:
        settings["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    dropout = 0.1 if codegen == "eager" else 0.0  # Inductor draws other random numbers
    stock = trainer(peft_model(lora_dropout=dropout), tmp_path / "stock", **settings)
    stock.train()
    model, seen = peft_model(lora_dropout=dropout), Seen()
    attributes = {n: dict(m.__dict__) for n, m in model.named_modules()}
    ours = trainer(model, tmp_path / "ours", callback(codegen=codegen), seen, **settings)
    ours.train()
    assert len(logged(stock)) == 4 and logged(stock)[0] - logged(stock)[-1] > 1e-3
    assert logged(ours) == pytest.approx(logged(stock), abs=1e-5)
    assert logged(ours, "eval_loss") == pytest.approx(logged(stock, "eval_loss"), abs=1e-5)
    assert set(rewritten_sites()) == set(dora_sites(model)) and not rewrite_log().misses
    assert seen.optimized == {"step": [True] * 4, "evaluate": [True] * 2, "save": [True] * 2}
    assert not is_optimized(model)
    left = {n: m.__dict__.keys() - attributes[n].keys() for n, m in model.named_modules()}
    assert not any("dorafx" in name or "compiled" in name for names in left.values() for name in names), left
    assert [level for level, _ in said(lines)] == ["INFO"]
    assert f"{len(dora_sites(model))} DoRA layers rewritten, none left out" in said(lines)[0][1]


@pytest.mark.slow
def test_checkpoints_are_those_of_the_restored_model(tmp_path: Path) -> None:
    """Saving needs no restoring: the same files, byte for byte, and what is pickled loads without dorafx."""
    model = peft_model()
    run = trainer(model, tmp_path, callback(keep=True))
    run.train()
    assert is_optimized(model)
    saved: dict[str, dict[str, bytes]] = {}
    for when in ("optimized", "restored"):
        model.save_pretrained(tmp_path / when)
        torch.save(model.state_dict(), tmp_path / when / "state.pt")
        saved[when] = {p.name: p.read_bytes() for p in sorted((tmp_path / when).iterdir())}
        pickled = pickle.dumps(model)
        assert b"dorafx" not in pickled.replace(b"_dorafx_restore", b"")
        dorafx.restore(model)
    assert saved["optimized"] == saved["restored"] and "adapter_model.safetensors" in saved["restored"]


@pytest.mark.slow
def test_best_model_and_resuming(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "evaluate": True}
    found = []
    for name, callbacks in {"stock": (), "ours": (callback(),)}.items():
        # A rate at which the last model is not the best one.
        run = trainer(peft_model(), tmp_path / name, *callbacks, learning_rate=0.3, greater_is_better=True, **settings)
        run.train()
        best = Path(str(run.state.best_model_checkpoint)).name
        again = trainer(peft_model(), tmp_path / name, *callbacks, learning_rate=0.3, **settings)
        again.train(resume_from_checkpoint=str(tmp_path / name / "checkpoint-2"))
        found.append((best, run, again))
    (best, run, again), (ours_best, ours, ours_again) = found
    assert best == ours_best
    assert logged(ours) == pytest.approx(logged(run), rel=1e-4)
    assert logged(ours_again)[-2:] == pytest.approx(logged(run)[-2:], rel=1e-4)
    assert_close(call(ours.model, ours.model), call(run.model, run.model), 1e-3)
    assert not is_optimized(ours.model) and not is_optimized(ours_again.model)


@pytest.mark.slow
@pytest.mark.parametrize("keep", [False, True])
def test_two_trainings(keep: bool, tmp_path: Path, lines: Any) -> None:
    stock = trainer(peft_model(), tmp_path / "stock")
    ours = trainer(peft_model(), tmp_path / "ours", callback(keep=keep))
    for run in (stock, ours):
        run.train()
        run.train()
    assert logged(ours) == pytest.approx(logged(stock), abs=1e-5)
    assert is_optimized(ours.model) == keep
    assert [level for level, _ in said(lines)] == ["INFO"] * (1 if keep else 2)
    assert dorafx.restore(ours.model) is ours.model and not is_optimized(ours.model)


@pytest.mark.slow
def test_a_model_of_each_run(tmp_path: Path) -> None:
    """``model_init`` makes a new model for each run; the one before is restored."""
    models: list[Any] = []

    def make() -> Any:
        models.append(peft_model())
        return models[-1]

    arguments = TrainingArguments(
        str(tmp_path), max_steps=1, report_to="none", save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    run = Trainer(model_init=make, args=arguments, train_dataset=DATA, callbacks=[callback(keep=True)])
    run.train()
    run.train()
    assert [is_optimized(model) for model in models[-2:]] == [False, True]


@pytest.mark.slow
def test_an_optimized_model_is_left_to_its_owner(tmp_path: Path) -> None:
    model = dorafx.optimize(peft_model(), codegen="eager")
    trainer(model, tmp_path, callback()).train()
    assert is_optimized(model)


def test_after_an_exception(tmp_path: Path) -> None:
    """The next training, and ``restore``, find the model optimized."""

    class Stop(Callback):
        times = 0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.times += 1
            if self.times == 2:
                raise KeyboardInterrupt

    run = trainer(peft_model(), tmp_path, callback(), Stop())
    with pytest.raises(KeyboardInterrupt):
        run.train()
    assert is_optimized(run.model)
    run.train()
    assert not is_optimized(run.model)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["an exception", "keep"])
def test_another_callback_takes_over(how: str, tmp_path: Path) -> None:
    """What an earlier callback left optimized is optimized anew, with the options of the new one, and restored."""

    class Stop(Callback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    def zero_row(model: Any) -> Any:
        layer = next(m for m in model.modules() if len(getattr(m, "lora_magnitude_vector", ())))
        with torch.no_grad():
            layer.weight[3], layer.lora_B["default"].weight[3] = 0, 0
        return model

    model = peft_model()
    first = callback(keep=how == "keep")
    run = trainer(model, tmp_path, first, *([] if how == "keep" else [Stop()]), max_steps=1)
    if how == "keep":
        run.train()
    else:
        with pytest.raises(KeyboardInterrupt):
            run.train()
    assert is_optimized(model)
    zero_row(model)
    run = trainer(model, tmp_path, callback(zero_rows="finite", keep=True))
    run.train()
    assert all(torch.isfinite(torch.tensor(logged(run)))) and all(p.isfinite().all() for p in model.parameters())
    # The first one no longer has anything to do with the model.
    other = peft_model()
    trainer(other, tmp_path, first, max_steps=1).train()
    assert is_optimized(model) and is_optimized(other) == (how == "keep")
    trainer(model, tmp_path, callback(zero_rows="finite"), max_steps=1).train()
    assert not is_optimized(model)


def test_inside_of_a_wrapper(tmp_path: Path) -> None:
    """The callback is also called by loops whose model is wrapped: here by DistributedDataParallel."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = peft_model().train()
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        expected = call(wrapped, model)
        ours = callback()
        ours.on_train_begin(None, None, None, model=wrapped)
        assert "_dorafx_restore" in model.__dict__
        output = call(wrapped, model)
        output.sum().backward()
        ours.on_step_end(None, None, None, model=wrapped)
        ours.on_train_end(None, None, None, model=wrapped)
    finally:
        torch.distributed.destroy_process_group()
    assert_close(output, expected, 1e-5)
    assert not is_optimized(model)
    assert set(rewritten_sites()) == set(dora_sites(model))


FULLY_SHARDED = """
import copy, sys
import torch
import torch.distributed as dist
from integration_support import assert_close, call, dora_sites, peft_model, rewritten_sites
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
import dorafx

dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
model = peft_model(layers=2).train()
stock = copy.deepcopy(model)
for block in model.base_model.model.model.layers:
    fully_shard(block, mesh=mesh)
fully_shard(model, mesh=mesh)
callback = dorafx.TrainerCallback(codegen="eager", strict=True)
callback.on_train_begin(None, None, None, model=model)
for _ in range(2):
    ours, theirs = call(model, model), call(stock, stock)
    assert_close(ours, theirs, 1e-5)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), stock.parameters()):
        if q.grad is not None:
            assert_close(p.grad.full_tensor(), q.grad, 1e-4, name)
callback.on_step_end(None, None, None)
assert set(rewritten_sites()) == set(dora_sites(model)) and not dorafx.rewrite_log().misses
callback.on_train_end(None, None, None)
assert not any("dorafx" in name for m in model.modules() for name in m.__dict__)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_model_that_is_sharded_already(tmp_path: Path) -> None:
    """FSDP2, in a process of its own, as it changes what dorafx may keep in the whole process."""
    support = str(Path(__file__).parents[1] / "support")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULLY_SHARDED, str(tmp_path / "store")],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": support},
    )
    assert done.returncode == 0, done.stderr[-3000:]


# -- what cannot be optimized -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_without_dora(tmp_path: Path, lines: Any) -> None:
    for model in (get_peft_model(base_model(), lora_config(use_dora=False)), base_model()):
        stock = trainer(copy.deepcopy(model), tmp_path / "stock")
        ours = trainer(model, tmp_path / "ours", callback())
        stock.train()
        ours.train()
        assert logged(ours) == logged(stock)
    assert [level for level, _ in said(lines)] == ["WARNING"] * 2
    assert "use_dora=True" in said(lines)[0][1] and 'scope="model"' in said(lines)[0][1]
    with pytest.raises(ValueError, match="use_dora=True"):
        trainer(base_model(), tmp_path, callback(strict=True)).train()


def test_the_whole_model_without_dora(tmp_path: Path, lines: Any) -> None:
    trainer(base_model(), tmp_path, callback(scope="model")).train()
    assert [level for level, _ in said(lines)] == ["WARNING"] and "no DoRA computation" in said(lines)[0][1]


def test_what_is_left_out_is_named(tmp_path: Path, lines: Any) -> None:
    class Other(torch.nn.Module):
        """DoRA with a delta of another form."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.weight = torch.nn.Parameter(torch.randn(9, 8), requires_grad=False)
            self.a, self.b = torch.nn.Parameter(torch.randn(2, 8)), torch.nn.Parameter(torch.randn(9, 2))
            self.magnitude = torch.nn.Parameter(torch.rand(9))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            norm = (self.weight + torch.tanh(self.b @ self.a)).norm(dim=1).detach()
            y = self.magnitude / norm * (x @ self.weight.T + x @ self.a.T @ self.b.T)
            return {"loss": y.square().mean()}

    run = trainer(Other(), tmp_path, callback(scope="model"))
    run.train_dataset = [{"x": torch.randn(8)} for _ in range(8)]
    run.train()
    ((level, line),) = said(lines)
    assert level == "WARNING" and "tanh" in line and "left as it was" in line


@pytest.mark.slow
def test_a_failing_optimize(tmp_path: Path, lines: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("dorafx.integrations.trainer.optimize", fails)
    run = trainer(peft_model(), tmp_path, callback())
    run.train()
    assert len(logged(run)) == 4
    assert said(lines) == [("WARNING", "dorafx: the model is trained as it is: RuntimeError: no such luck")]
    with pytest.raises(RuntimeError, match="no such luck"):
        trainer(peft_model(), tmp_path, callback(strict=True)).train()


def test_a_scope_that_the_model_has_not(tmp_path: Path, lines: Any) -> None:
    model = randomise(get_peft_model(Perceptron(), lora_config(target_modules=["first"], task_type=None)))
    run = callback(scope="blocks")
    run.on_train_begin(None, None, None, model=model)
    assert not is_optimized(model) and "_repeated_blocks" in said(lines)[0][1]


@pytest.mark.slow
def test_beside_another_compiler(tmp_path: Path, lines: Any) -> None:
    run = trainer(peft_model(), tmp_path, callback(), torch_compile=True, torch_compile_backend="eager")
    run.train()
    assert len(logged(run)) == 4 and not rewrite_log().records
    assert "torch_compile_backend='eager'" in said(lines)[0][1]


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"scope": "layers"}, ["layers", "blocks"]),
        ({"codegen": ""}, ["codegen"]),
        ({"norm": "dense"}, ["dense", "tiled"]),
        ({"keep": 1}, ["keep", "True"]),
    ],
    ids=str,
)
def test_wrong_values(wrong: dict[str, Any], named: list[str]) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is looked at below)
        dorafx.TrainerCallback(**wrong)
    assert all(word in str(caught.value) for word in named)


# -- TRL ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [True])
def test_supervised_fine_tuning_with_trl(checkpointing: bool, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {w: i for i, w in enumerate(["<pad>", "<unk>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>")
    texts = Dataset.from_dict({"text": [" ".join(f"w{int(t) % 50}" for t in row) for row in ROWS]})
    losses = []
    for name, callbacks in {"stock": [], "ours": [callback()]}.items():
        arguments = SFTConfig(
            str(tmp_path / name),
            max_steps=3,
            per_device_train_batch_size=4,
            learning_rate=5e-3,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
            save_strategy="no",
            gradient_checkpointing=checkpointing,
        )
        run = SFTTrainer(
            model=base_model(),
            args=arguments,
            train_dataset=texts,
            processing_class=fast,
            peft_config=lora_config(),
            callbacks=callbacks,
        )
        run.train()
        losses.append(logged(run))
    assert len(losses[0]) == 3 and losses[0][0] - losses[0][-1] > 1e-3
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    assert set(rewritten_sites()) == set(dora_sites(run.model)) and not rewrite_log().misses
    assert not is_optimized(run.model)


# -- the import --------------------------------------------------------------------------------------------------------


def test_transformers_is_imported_on_use_only() -> None:
    program = """
import json, sys
import dorafx
from dorafx import *
before = [name for name in ("transformers", "accelerate", "peft", "dorafx.backend") if name in sys.modules]
listed = "TrainerCallback" in dir(dorafx)
callback = dorafx.TrainerCallback()
import transformers
print(json.dumps([before, listed, isinstance(callback, transformers.TrainerCallback)]))
try:
    dorafx.TrainerCallbacks
except AttributeError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert json.loads(first) == [[], True, True]
    assert second == "module 'dorafx' has no attribute 'TrainerCallbacks'"
