"""HF ``generate()``: seconds for each new token, with its dynamic and with its static cache."""

from __future__ import annotations

import time
from typing import Any

import torch

from ..implementations import Figures, Task, build_model
from ..models import Size
from .model import token_ids

NEW_TOKENS = 24
_WARM_UP = 8
"""Tokens that compile: a dynamic cache grows, and with the second length the compiler makes shapes dynamic."""


def measure(task: Task) -> Figures:
    """Seconds from one new token to the next after a prompt of ``size.tokens``. Compiled implementations are compiled in place, as by
    ``dorafx.optimize``: ``generate`` of a PEFT model does not call a whole model that ``torch.compile`` returns."""
    size = Size(**task.parameters["size"])
    model = build_model(task, size).eval()
    task.compile_in_place(model)
    ids = token_ids(task, size.tokens)
    return {f"a token, {kind} cache": ("s", _between_tokens(task, model, ids, kind)) for kind in ("dynamic", "static")}


class _TokenTimes:
    """A stopping criterion that never stops, and records when ``generate`` calls it, after each new token."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.seconds_at: list[float] = []

    def __call__(self, ids: torch.Tensor, scores: Any, **unused: Any) -> torch.Tensor:
        self.task.clock.synchronise()
        self.seconds_at.append(time.perf_counter())
        return torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)


def _between_tokens(task: Task, model: Any, ids: torch.Tensor, kind: str) -> list[float]:
    from transformers import StoppingCriteriaList

    # No end token, so that every call generates the same number; generate must not compile the model's forward.
    options = {
        "max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, "use_cache": True,
        "disable_compile": True, "cache_implementation": kind,
    }  # fmt: skip
    intervals: list[float] = []
    for warming in (True, False):
        start = time.perf_counter()
        while not intervals or time.perf_counter() - start < task.clock.seconds:
            token_times = _TokenTimes(task)
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                **options,
                stopping_criteria=StoppingCriteriaList([token_times]),
            )
            if warming:
                break
            intervals += [
                after - before
                for before, after in zip(token_times.seconds_at[_WARM_UP:], token_times.seconds_at[_WARM_UP + 1 :])
            ]
    return intervals
