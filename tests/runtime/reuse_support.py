"""A decoder: a stock model and what dorafx compiled of it, called with one token and compared.

Inputs of one token are decoding steps: their norms are reused. A test asserts by the counters that reuse was in play,
changes something, and compares with the stock model afterwards.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from integration_support import assert_close, compile_eagerly, peft_perceptron, run

from dorafx import rewrite_log

LAYERS = 2  # of the perceptron


def one_token(seed: int = 6) -> torch.Tensor:
    return torch.randn((1, 24), generator=torch.Generator().manual_seed(seed))


def prompt() -> torch.Tensor:
    return torch.randn((3, 5, 24), generator=torch.Generator().manual_seed(7))


class Decoder:
    """A stock model and what dorafx compiled of it."""

    def __init__(self, model: Any = None, **options: Any) -> None:
        self.model = peft_perceptron() if model is None else model
        self.compiled = compile_eagerly(self.model, **options)

    def step(self, x: torch.Tensor | None = None, tolerance: float = 1e-5) -> None:
        x = one_token() if x is None else x
        with torch.no_grad():
            assert_close(self.compiled(x), self.model(x), tolerance)

    def prefill(self, record: bool) -> None:
        """A prompt; with ``record`` forward and backward."""
        if not record:
            return self.step(prompt())
        expected = run(self.model, lambda: self.model(prompt()))
        actual = run(self.model, lambda: self.compiled(prompt()))
        assert_close(actual.output, expected.output, 1e-5)
        for name, gradient in expected.gradients.items():
            assert_close(actual.gradients[name], gradient, 1e-4, name)

    def warm(self) -> Decoder:
        """Two steps: the second reuses every norm."""
        self.step()
        before = counts()
        self.step()
        assert counts() == (before[0], before[1] + LAYERS)
        return self


def counts() -> tuple[int, int]:
    return rewrite_log().norms.computed, rewrite_log().norms.reused


def parameters(model: Any) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def shift(p: torch.Tensor) -> torch.Tensor:
    return p + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))


def overwrite(p: torch.Tensor) -> None:
    """A write that moves no counter and replaces no memory."""
    p.data.copy_(shift(p.data))


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1),
    "adamw foreach": lambda ps: torch.optim.AdamW(ps, lr=0.1, foreach=True),
    "adamw fused": lambda ps: torch.optim.AdamW(ps, lr=0.1, fused=True),
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.5),
    "sgd fused": lambda ps: torch.optim.SGD(ps, lr=0.5, fused=True),
}
