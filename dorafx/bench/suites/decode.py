"""One token of a model whose key-value cache is filled: the step that generation repeats."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..implementations import Task, build_model
from ..models import Size
from .model import token_ids

__all__ = ["measure"]


def measure(task: Task) -> dict[str, tuple[str, list[float]]]:
    """Seconds of a step without gradients, always at the same place of a static cache, so that every call has one shape."""
    size = Size(**task.parameters["size"])
    model = build_model(task, size).eval()
    call = task.compiled(model)
    cache, rewind, where = _filled_cache(task, model, size)
    token = token_ids(task, 1)

    @torch.no_grad()
    def step() -> Any:
        return call(input_ids=token, past_key_values=cache, use_cache=True, **where)

    return {"one token": ("s", task.clock.samples(step, rewind, warm_up=3))}


def _filled_cache(task: Task, model: Any, size: Size) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A static cache after a prefill of ``size.tokens`` (eager: it is not measured); a function that takes it back there
    after a step; and the arguments that tell older versions of transformers where the next token goes."""
    from transformers import StaticCache
    from transformers.models.llama.modeling_llama import LlamaModel

    cache = StaticCache(config=model.config, max_cache_len=size.tokens + 1)
    where: dict[str, torch.Tensor] = {}
    told = "cache_position" in inspect.signature(LlamaModel.forward).parameters
    with torch.no_grad():
        if told:
            where["cache_position"] = torch.arange(size.tokens, device=task.clock.device)
        model(input_ids=token_ids(task, size.tokens), past_key_values=cache, use_cache=True, **where)
    if told:
        where["cache_position"] = torch.tensor([size.tokens], device=task.clock.device)

    def rewind() -> None:
        for layer in cache.layers:
            length: Any = getattr(layer, "cumulative_length", None)
            if length is not None:
                length.fill_(size.tokens)

    return cache, rewind, where
