"""The composition ``g ⊙ (base + s·lora)`` alone, with ``g = m / n``, for given base and lora."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import dorafx.ops  # noqa: F401  (registers the operators)

from ..implementations import Figures, Task

_SCALE = 2.0


def _dorafx(base: Tensor, lora: Tensor, m: Tensor, n: Tensor, kernel: str = "auto") -> Tensor:
    return torch.ops.dorafx.compose(base, lora, m / n, None, _SCALE, base.dtype, kernel)  # type: ignore[no-any-return]


def _stock(base: Tensor, lora: Tensor, m: Tensor, n: Tensor) -> Tensor:
    """PEFT adds DoRA's part to the output of the base layer, which contains ``base`` already."""
    g = (m / n).view(1, -1)
    return base + ((g - 1) * base + g * lora * _SCALE)


def _lora(base: Tensor, lora: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return base + lora * _SCALE


FORMS = {"dorafx": _dorafx, "peft": _stock, "peft-inductor": _stock, "lora": _lora}


def measure(task: Task) -> Figures:
    """Seconds of a forward without gradients, and of a forward with its backward to base, lora and magnitude."""
    tokens, d_out = task.parameters["tokens"], task.parameters["d_out"]
    base, lora, upstream = (task.random(tokens, d_out) for _ in range(3))
    norm = task.random(1, d_out)[0].abs() + 1
    magnitude = norm * 1.01
    form = task.compiled(
        functools.partial(_dorafx, kernel="triton")
        if task.name == "dorafx" and task.compose == "triton"
        else FORMS[task.name]
    )

    @torch.no_grad()
    def forward() -> Tensor:
        return form(base, lora, magnitude, norm)  # type: ignore[no-any-return]

    figures = task.clock.figures("forward", forward, cold=True)
    trained = [t.requires_grad_() for t in ((base, lora) if task.name == "lora" else (base, lora, magnitude))]

    def both() -> tuple[Tensor, ...]:
        return torch.autograd.grad(form(base, lora, magnitude, norm), trained, upstream)

    step: Callable[[], tuple[Tensor, ...]] = both
    return {**figures, **task.clock.figures("forward + backward", step, cold=True)}
