"""One token of a model whose key-value cache is filled: the step that generation repeats."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from ..implementations import Figures, Task, build_model
from ..models import Size
from ..steps import Step, time_steps
from .model import TrainingStep, token_ids


def measure(task: Task) -> Figures:
    """Seconds of a step without gradients, always at the same position of a static cache, so that all calls have one shape."""
    size = Size(**task.parameters["size"])
    model = build_model(task, size).eval()
    return time_steps(task, [_one_token(task, model, task.compiled(model), size)])


def overhead(task: Task) -> Figures:
    """For a common model: seconds of a token, as in :func:`measure`, and of a training step."""
    size = Size(**task.parameters["size"])
    model = build_model(task, size).eval()
    call = task.compiled(model)
    token = _one_token(task, model, call, size)
    training = TrainingStep(task, model, call, token_ids(task, size.tokens))
    return time_steps(task, [token, Step("training step", training, model.train)])


def _one_token(task: Task, model: Any, call: Any, size: Size) -> Step:
    """The measured step; ``call`` is the model or its compiled form."""
    cache, rewind, position = _filled_cache(task, model, size)
    token = token_ids(task, 1)

    @torch.no_grad()
    def step() -> Any:
        return call(input_ids=token, past_key_values=cache, use_cache=True, **position)

    def before() -> None:
        model.eval()
        rewind()

    return Step("one token", step, before, warm_up=3)


def _filled_cache(task: Task, model: Any, size: Size) -> tuple[Any, Any, dict[str, torch.Tensor]]:
    """A static cache after a prefill of ``size.tokens`` (eager, as it is not measured); a function that resets it to this state after a
    step; and the arguments by which older versions of transformers know the position of the next token."""
    from transformers import StaticCache
    from transformers.models.llama.modeling_llama import LlamaModel

    cache = StaticCache(config=model.config, max_cache_len=size.tokens + 1)
    position: dict[str, torch.Tensor] = {}
    takes_position = "cache_position" in inspect.signature(LlamaModel.forward).parameters
    with torch.no_grad():
        if takes_position:
            position["cache_position"] = torch.arange(size.tokens, device=task.clock.device)
        task.under_autocast(model)(
            input_ids=token_ids(task, size.tokens), past_key_values=cache, use_cache=True, **position
        )
    if takes_position:
        position["cache_position"] = torch.tensor([size.tokens], device=task.clock.device)

    def rewind() -> None:
        for layer in cache.layers:
            length: Any = getattr(layer, "cumulative_length", None)
            if length is not None:
                length.fill_(size.tokens)

    return cache, rewind, position
