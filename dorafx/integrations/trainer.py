"""A callback for the Trainer of transformers, and for those that are derived from it (TRL's)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers.trainer_callback import TrainerCallback as _TrainerCallback
from transformers.utils import logging

from dorafx.api import checked_options, optimize, restore
from dorafx.capture.in_place import OPTIMIZED, is_optimized
from dorafx.log import Record, rewrite_log
from dorafx.scope import adapted_modules

# A child of transformers' root logger, whose level is what ``TrainingArguments(log_level=…)`` sets.
_logger = logging.get_logger("transformers.dorafx")
_NAMED = 3
"""How many modules a message names."""


class TrainerCallback(_TrainerCallback):
    """Optimize the model that a ``transformers.Trainer`` (or TRL's ``SFTTrainer``, ``GRPOTrainer``, …) trains.

    ``Trainer(…, callbacks=[dorafx.TrainerCallback()])`` is the only change. The model is passed to [`dorafx.optimize`][] when training begins,
    inside of what accelerate wrapped around it, and to [`dorafx.restore`][] when it ends. Evaluations and checkpoints in between need
    nothing more: the ``state_dict``, and what is saved, are the same. After the first step transformers' logger gets one line: at level
    INFO if every DoRA layer was rewritten, else a WARNING that names what was not.

    A model that cannot be optimized, or has no DoRA, is trained as it is, with a warning. A model that you have optimized yourself is left
    to you. After an exception in training the model stays optimized until [`dorafx.restore`][] is called or the next ``train()`` ends. If that
    has another callback, the model is restored when it begins, and optimized anew with that callback's options; so is one that an earlier
    callback kept.
    ``dorafx.TrainerCallback`` imports transformers when it is first used; ``import dorafx`` alone does not.

    Args:
        keep: leave the model optimized after training, to generate with it, say. ``dorafx.restore(trainer.model)`` undoes it.
        scope: as for [`dorafx.optimize`][]. ``"auto"`` wants adapter layers of PEFT with DoRA; for DoRA of other libraries write
            ``"model"``.
        codegen: as for [`dorafx.optimize`][].
        norm: as for [`dorafx.optimize`][].
        compose: as for [`dorafx.optimize`][].
        norm_reuse: as for [`dorafx.optimize`][].
        zero_rows: as for [`dorafx.optimize`][].
        verify: as for [`dorafx.optimize`][].
        strict: as for [`dorafx.optimize`][]; and what is a warning otherwise (no DoRA, a failing ``optimize``) raises.
        skip: as for [`dorafx.optimize`][].
        only: as for [`dorafx.optimize`][].
        explain: as for [`dorafx.optimize`][].
        dynamic: as for [`dorafx.optimize`][].
        mode: as for [`dorafx.optimize`][].

    Raises:
        ValueError: an unknown scope or option value, when the callback is made.
    """

    def __init__(
        self,
        *,
        keep: bool = False,
        scope: str = "auto",
        codegen: str = "inductor",
        norm: str = "auto",
        compose: str = "auto",
        norm_reuse: str = "auto",
        zero_rows: str = "peft",
        verify: bool = False,
        strict: bool = False,
        skip: str | Sequence[str] = (),
        only: str | Sequence[str] = (),
        explain: str | os.PathLike[str] = "",
        dynamic: bool | None = None,
        mode: str | None = None,
    ) -> None:
        if not isinstance(keep, bool):
            raise ValueError(f"keep: {keep!r} is not True or False")
        switches: dict[str, Any] = {
            "codegen": codegen, "norm": norm, "compose": compose, "norm_reuse": norm_reuse, "zero_rows": zero_rows, "verify": verify,
            "strict": strict, "skip": skip, "only": only, "explain": explain,
        }  # fmt: skip
        checked_options(scope, **switches)
        self.keep = keep
        self.strict = strict
        self.options: dict[str, Any] = {
            "scope": scope, **switches, "dynamic": dynamic, "mode": mode
        }  # fmt: skip
        self._model: torch.nn.Module | None = None
        """The model that this callback optimized."""
        self._undo: Any = None
        """What :func:`optimize` left on it."""
        self._waits = False
        """Whether the summary has yet to be logged."""
        self._sites = 0
        self._start = 0
        self._misses = 0

    # -- what the Trainer calls ---------------------------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Optimize the model."""
        if model is None:
            return
        inner = _unwrapped(model)
        if self._model is not None and self._model is not inner:
            self._restore()  # of an earlier training, whose model is another
        if not self._is_mine(inner):
            for module in list(inner.modules()):
                if getattr(module.__dict__.get(OPTIMIZED), "by_callback", False):
                    restore(module)  # an exception ended the training of another callback, or it kept the model
        if is_optimized(inner):
            return  # by this callback, which kept it or whose training was started again; or by the user
        self._start, self._misses = len(rewrite_log().records), 0
        self._sites = len(adapted_modules(inner))
        self._waits = self._optimize(args, state, inner)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what was rewritten, once."""
        if self._waits:
            self._waits = False
            self._summarise(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Restore the model."""
        if (
            self._model is not None and len(_missed(self._records())) > self._misses
        ):  # by evaluations, or by other shapes
            self._summarise(state)
        self._waits = False
        if not self.keep:
            self._restore()

    # -- the work -----------------------------------------------------------------------------------------------------

    def _optimize(self, args: Any, state: Any, model: torch.nn.Module) -> bool:
        """Returns whether there will be something to summarise."""
        if getattr(args, "torch_compile", False):
            backend = getattr(args, "torch_compile_backend", None)
            if backend == "dorafx":
                return True  # the Trainer has compiled the whole model with it
            self._refuse(
                state,
                f"the Trainer compiles the model itself (torch_compile_backend={backend!r}), so that dorafx sees none of it: leave "
                'torch_compile out, or import dorafx before and write torch_compile_backend="dorafx"',
            )
            return False
        if not self._sites and self.options["scope"] == "auto":
            self._refuse(
                state,
                "the model has no adapter layer of PEFT with DoRA (LoraConfig(use_dora=True)), and is trained as it is; for DoRA of another "
                'library write dorafx.TrainerCallback(scope="model")',
            )
            return False
        try:
            optimize(model, **self.options)
        except Exception as error:
            if self.strict:
                raise
            self._refuse(state, f"the model is trained as it is: {type(error).__name__}: {error}")
            return False
        self._model, self._undo = model, model.__dict__[OPTIMIZED]
        self._undo.by_callback = True
        return True

    def _refuse(self, state: Any, why: str) -> None:
        if self.strict:
            raise ValueError(f"dorafx.TrainerCallback(strict=True): {why}")
        if _speaks(state):
            _logger.warning("dorafx: %s", why)

    def _restore(self) -> None:
        if self._model is not None and self._is_mine(self._model):
            restore(self._model)
        self._model = self._undo = None

    def _is_mine(self, model: torch.nn.Module) -> bool:
        """Whether a model is as this callback optimized it."""
        return self._undo is not None and model.__dict__.get(OPTIMIZED) is self._undo

    def _records(self) -> list[Record]:
        records = rewrite_log().records
        return records[self._start :] if self._start <= len(records) else records  # somebody cleared the log

    def _summarise(self, state: Any) -> None:
        records = self._records()
        rewritten = {r.site for r in records if r.status == "rewritten"}
        missed = _missed(records)
        self._misses = len(missed)
        if not _speaks(state):
            return
        left = max(self._sites - len(rewritten), 0) if not missed else 0
        line = f"dorafx: {_count(len(rewritten), 'DoRA layer')} rewritten"
        if rewritten and not missed and not left:
            megabytes = sum(r.dense_bytes_avoided or 0 for r in {r.site: r for r in records}.values()) / 2**20
            _logger.info("%s, none left out; %.1f MiB of dense intermediates avoided a forward", line, megabytes)
            return
        if missed:
            line += (
                f", {_count(len(missed), 'place')} left as it was"
                if len(missed) == 1
                else f", {len(missed)} places left as they were"
            )
            line += ": " + "; ".join(f"{site or 'the model'}: {why}" for site, why in list(missed.items())[:_NAMED])
        elif left:
            line += f" of {self._sites}, the others never reached dorafx as a graph"
        else:
            line += ": no DoRA computation was found in the model"
        _logger.warning("%s. print(dorafx.rewrite_log()) says more.", line)


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside of what accelerate wrapped around it: DistributedDataParallel, DeepSpeed's engine, a compiled module."""
    from accelerate.utils import extract_model_from_parallel

    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner if isinstance(inner, torch.nn.Module) else model


def _missed(records: list[Record]) -> dict[str, str]:
    return {r.site: r.reason or "" for r in records if r.status == "missed"}


def _speaks(state: Any) -> bool:
    return bool(getattr(state, "is_world_process_zero", True))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
