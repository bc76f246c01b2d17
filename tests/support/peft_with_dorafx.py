"""A pytest plugin that switches dorafx on in every DoRA model of PEFT that the tests make: ``pytest -p peft_with_dorafx``.

``PEFT_DORAFX_CODEGEN`` names the codegen (``"eager"`` by default), ``PEFT_DORAFX_COUNTS`` a file for the number of models and rewrites.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import PeftMixedModel, PeftModel

import dorafx
from dorafx.scope import adapted_modules

_CODEGEN = os.environ.get("PEFT_DORAFX_CODEGEN", "eager")
_models = 0


def _optimized(model: torch.nn.Module) -> None:
    global _models
    dorafx.restore(model)
    if adapted_modules(model):
        dorafx.optimize(model, codegen=_CODEGEN)
        _models += 1


def _then_optimize(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method of a PEFT model after which adapters may be there that were not."""

    @functools.wraps(method)
    def call(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        result = method(self, *args, **kwargs)
        _optimized(self)
        return result

    return call


for _kind in (PeftModel, PeftMixedModel):
    for _name in ("__init__", "add_adapter"):
        setattr(_kind, _name, _then_optimize(getattr(_kind, _name)))

_inject = peft.inject_adapter_in_model


def _inject_and_optimize(*args: Any, **kwargs: Any) -> Any:
    model = _inject(*args, **kwargs)
    _optimized(model)
    return model


peft.inject_adapter_in_model = _inject_and_optimize


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = os.environ.get("PEFT_DORAFX_COUNTS")
    if path:
        log = dorafx.rewrite_log()
        counts = {"models": _models, "rewritten": len(log.rewrites), "missed": sorted({r.kind for r in log.misses})}
        Path(path).write_text(json.dumps(counts), encoding="utf-8")


@pytest.fixture(autouse=True)
def _compiles_anew() -> Any:
    yield
    torch._dynamo.reset()
