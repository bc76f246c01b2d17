"""Optimizers by name: after each step what is computed is what stock PEFT computes in the same state, whichever forward comes first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from peft_features import STARTS, Twin, Way, adapted, feature, optimizer_rows, output, trained
from torch import nn, optim

SECTION = "Optimizers"


def _torch(name: str, **options: Any) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        return getattr(optim, name)(trained(model), **{"lr": 1e-2, **options})

    return make


def _muon(model: Any) -> Any:
    """Matrices by Muon, the magnitudes by AdamW, as Muon takes matrices only."""
    matrices = [p for p in trained(model) if p.dim() == 2]
    vectors = [p for p in trained(model) if p.dim() != 2]
    return Several(optim.Muon(matrices, lr=1e-2), optim.AdamW(vectors, lr=1e-2))


class Several:
    """Optimizers of parts of the parameters."""

    def __init__(self, *optimizers: Any) -> None:
        self.optimizers = optimizers

    def step(self, *args: Any) -> None:
        for optimizer in self.optimizers:
            optimizer.step(*args)

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


class Own:
    """An optimizer that is no ``torch.optim.Optimizer`` and writes past every counter, like DeepSpeed's."""

    def __init__(self, model: Any) -> None:
        self.parameters = trained(model)

    def step(self) -> None:
        for p in self.parameters:
            if p.grad is not None:
                p.data.add_(p.grad, alpha=-0.05)

    def zero_grad(self) -> None:
        for p in self.parameters:
            p.grad = None


class InBackward:
    """A step of each parameter when its gradient is there (LOMO, APOLLO; torch's own recipe)."""

    def __init__(self, model: Any) -> None:
        for p in trained(model):
            p.register_post_accumulate_grad_hook(self._hook(optim.SGD([p], 0.05, momentum=0.5)))

    @staticmethod
    def _hook(optimizer: Any) -> Any:
        def step(p: Any) -> None:
            optimizer.step()
            optimizer.zero_grad()

        return step

    def step(self) -> None: ...

    def zero_grad(self) -> None: ...


def _bitsandbytes(name: str, **options: Any) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        import bitsandbytes

        return getattr(bitsandbytes.optim, name)(trained(model), **{"lr": 1e-2, **options})

    return make


def _torchao(name: str) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        import torchao.optim

        return getattr(torchao.optim, name)(trained(model), lr=1e-2)

    return make


def _schedule_free(name: str, **options: Any) -> Callable[[Any], Any]:
    def make(model: Any) -> Any:
        schedulefree = pytest.importorskip("schedulefree")
        return getattr(schedulefree, name)(trained(model), **{"lr": 1e-2, **options})

    return make


def _prodigy(model: Any) -> Any:
    prodigyopt = pytest.importorskip("prodigyopt")
    return prodigyopt.Prodigy(trained(model), d0=1e-3)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    **{
        f"torch.optim.{name}": _torch(name)
        for name in (
            "ASGD",
            "Adadelta",
            "Adafactor",
            "Adagrad",
            "Adam",
            "AdamW",
            "Adamax",
            "NAdam",
            "RAdam",
            "RMSprop",
            "Rprop",
            "SGD",
        )
    },
    "torch.optim.LBFGS": _torch("LBFGS", lr=0.1, max_iter=3),
    "torch.optim.Muon": _muon,
    **{f"torch.optim.{name}, fused": _torch(name, fused=True) for name in ("Adagrad", "Adam", "AdamW", "SGD")},
    **{
        f"torch.optim.{name}, foreach": _torch(name, foreach=True)
        for name in ("Adadelta", "AdamW", "NAdam", "RMSprop", "SGD")
    },
    "bitsandbytes AdamW8bit": _bitsandbytes("AdamW8bit", min_8bit_size=16),
    "bitsandbytes PagedAdamW": _bitsandbytes("PagedAdamW"),
    "bitsandbytes Lion8bit": _bitsandbytes("Lion8bit", lr=1e-3, min_8bit_size=16),
    "torchao AdamW8bit": _torchao("AdamW8bit"),
    "torchao AdamW4bit": _torchao("AdamW4bit"),
    "schedulefree AdamWScheduleFree": _schedule_free("AdamWScheduleFree"),
    "schedulefree AdamWScheduleFree, foreach off": _schedule_free("AdamWScheduleFree", foreach=False),
    "schedulefree SGDScheduleFree": _schedule_free("SGDScheduleFree"),
    "prodigyopt Prodigy": _prodigy,
    "LoRA+ (`create_loraplus_optimizer`)": lambda m: create_loraplus_optimizer(
        m, optim.AdamW, lr=1e-3, loraplus_lr_ratio=16
    ),
    "Riemannian (`create_riemannian_optimizer`)": lambda m: create_riemannian_optimizer(m, optim.AdamW, lr=1e-3),
    "an optimizer of one's own that writes `p.data`": Own,
    "a step in the backward (`register_post_accumulate_grad_hook`)": InBackward,
}

# What to know of each. Of versions: those of pyproject.toml.
_COUNTERS = "The step is seen by the parameters' version counters."
_PAST = "Moves no version counter; seen by a hook on the step, and by content."
NOTES: dict[str, str] = {
    name: _PAST if "fused" in name else _COUNTERS for name in OPTIMIZERS if name.startswith("torch.optim.")
} | {
    "torch.optim.LBFGS": "Its closure runs several forwards and backwards a step.",
    "torch.optim.Muon": "It takes only matrices: the magnitudes need another optimizer.",
    "bitsandbytes AdamW8bit": "Writes with its own kernels; seen by the step and by content.",
    "bitsandbytes PagedAdamW": "As the one above; its state may leave the device.",
    "bitsandbytes Lion8bit": "As the one above.",
    "torchao AdamW8bit": "Compiles its step by Inductor; parameters are plain tensors.",
    "torchao AdamW4bit": "As the one above.",
    "schedulefree AdamWScheduleFree": "`optimizer.eval()` and `.train()` write other parameters; the next forward uses these.",
    "schedulefree AdamWScheduleFree, foreach off": "As the one above.",
    "schedulefree SGDScheduleFree": "As the one above.",
    "prodigyopt Prodigy": "Adapts its learning rate.",
    "LoRA+ (`create_loraplus_optimizer`)": "Other learning rates for A and B.",
    "Riemannian (`create_riemannian_optimizer`)": "Changes the gradients of A and B before the step.",
    "an optimizer of one's own that writes `p.data`": _PAST,
    "a step in the backward (`register_post_accumulate_grad_hook`)": "Parameters change during the backward; the norms of that forward do not.",
}
# Each step of these is so coarse that rounding decides between two values of a state.
COARSE = ("8bit", "4bit", "Rprop", "Lion", "Muon", "Adafactor")


def _step(model: Any, call: Any, optimizer: Any, k: int) -> None:
    model.train()
    if hasattr(optimizer, "train"):
        optimizer.train()
    generator = torch.Generator().manual_seed(50 + k)
    x, target = (torch.randn(3, 5, 24, generator=generator) for _ in range(2))

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = nn.functional.mse_loss(call(x), target)
        loss.backward()
        return loss

    if isinstance(optimizer, optim.LBFGS):
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    optimizer.zero_grad()
    model.eval()


def _check(way: Way, name: str) -> None:
    """Three steps, each followed first by another forward. Both models then have the parameters of the one under dorafx: what is compared
    is the forward in one state, not how far rounding takes two trainings apart, which is bounded besides."""
    twin = Twin(way, adapted)
    twin.warm()
    make = OPTIMIZERS[name]
    optimizers = [make(m) for m, _ in twin.pairs()]
    coarse = any(word in name for word in COARSE)
    for k, start in enumerate(STARTS):
        before = [p.detach().clone() for p in trained(twin.model)]
        for (m, call), optimizer in zip(twin.pairs(), optimizers):
            _step(m, call, optimizer, k)
        assert any(not torch.equal(p, q) for p, q in zip(trained(twin.model), before)), "the step changed nothing"
        _compare(twin, start, coarse)
        if hasattr(optimizers[0], "eval"):
            for optimizer in optimizers:
                optimizer.eval()
            _compare(twin, start, coarse)
            for optimizer in optimizers:
                optimizer.train()
            _compare(twin, "token", coarse)


def _compare(twin: Twin, start: str, coarse: bool) -> None:
    """Compare with stock PEFT in the state of the model under dorafx; and the states."""
    stock = [p.detach().clone() for p in trained(twin.stock)]
    with torch.no_grad():
        for p, q in zip(trained(twin.stock), trained(twin.model)):
            if not coarse:
                torch.testing.assert_close(q, p, rtol=5e-3, atol=5e-3)
            p.copy_(q)
    if start == "training":
        twin.outputs(3, 5)
    else:
        getattr(twin, start)()
    twin.token()
    with torch.no_grad():
        for p, value in zip(trained(twin.stock), stock):
            p.copy_(value)


DEFAULT = [
    "torch.optim.AdamW",
    "torch.optim.AdamW, fused",
    "torch.optim.AdamW, foreach",
    "torch.optim.Muon",
    "bitsandbytes AdamW8bit",
    "schedulefree AdamWScheduleFree",
    "prodigyopt Prodigy",
    "an optimizer of one's own that writes `p.data`",
    "a step in the backward (`register_post_accumulate_grad_hook`)",
]


@pytest.mark.default_cases(*DEFAULT)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer(name: str) -> None:
    with _quiet():
        _check(Way("optimize", "eager"), name)


@pytest.mark.slow
@pytest.mark.parametrize("way", [Way("backend", "eager"), Way("optimize", "inductor")], ids=lambda way: way.name)
@pytest.mark.parametrize("name", DEFAULT)
def test_optimizer_in_other_ways(name: str, way: Way) -> None:
    with _quiet():
        _check(way, name)


@contextlib.contextmanager
def _quiet() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


optimizer_rows(
    SECTION, {f"`{n}`" if n.startswith("torch.") else n: ("works", NOTES[n]) for n in OPTIMIZERS}, test_optimizer
)


@feature(
    SECTION,
    "LoRA-FA (`create_lorafa_optimizer`)",
    "PEFT refuses",
    "PEFT 0.21.2's own step fails with a TypeError where a magnitude is trained beside A and B, with and without "
    "dorafx.",
)
def test_lora_fa(way: Way) -> None:
    twin = Twin(way, adapted).warm()

    def train(m: Any, call: Any) -> None:
        optimizer = create_lorafa_optimizer(m, r=4, lora_alpha=6, lr=1e-3)
        _step(m, call, optimizer, 0)

    error = twin.refused(train)
    assert isinstance(error, TypeError), error
    twin.do(lambda m: m.eval())
    twin.do(lambda m: m.zero_grad())
    twin.check()


@feature(
    SECTION,
    "Gradient accumulation",
    "works",
    "Micro-batches reuse the norms of the first one, until the step.",
)
def test_accumulation(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    optimizers = [optim.AdamW(trained(m), 1e-2, fused=True) for m, _ in twin.pairs()]
    for k in range(3):
        for (m, call), optimizer in zip(twin.pairs(), optimizers):
            m.train()
            for part in range(3):
                x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(10 * k + part))
                call(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            m.eval()
        _compare(twin, STARTS[k], False)


@feature(
    SECTION,
    "`GradScaler` whose step is skipped for an infinity",
    "works",
    "No parameter changes, and the next forward uses the same ones.",
)
def test_grad_scaler(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    optimizers = [optim.AdamW(trained(m), 1e-2) for m, _ in twin.pairs()]
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1) for _ in twin.pairs()]
    for k in range(4):
        for (m, call), optimizer, scaler in zip(twin.pairs(), optimizers, scalers):
            m.train()
            scaler.scale(output(call, m, 3, 5).square().mean()).backward()
            if k == 2:
                trained(m)[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trained(m), 1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            m.eval()
        _compare(twin, STARTS[k], False)
    assert scalers[0].get_scale() == scalers[1].get_scale()
