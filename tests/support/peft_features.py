"""Features of PEFT beyond forward and backward: what a test declares of one, and a stock model beside an equal one under dorafx."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
import torch
from integration_support import assert_close, dora_sites, lora_config, randomise, tokens
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

import dorafx
from dorafx import rewrite_log

Outcome = Literal["works", "PEFT refuses", "parity with an upstream bug"]
SECTIONS = (
    "Hot swapping",
    "Adapters",
    "Merging",
    "Configurations",
    "Initialisations",
    "Optimizers",
    "Averages and other writers",
)


@dataclass(frozen=True)
class Feature:
    """A row of the page: what was tested, what happens, one line of what to know, and the test."""

    section: str
    name: str
    outcome: Outcome
    note: str
    test: str


FEATURES: dict[str, Feature] = {}
"""By name."""


@dataclass(frozen=True)
class Way:
    """How dorafx is switched on."""

    how: str
    codegen: str

    @property
    def name(self) -> str:
        return f"{self.how}-{self.codegen}"


WAYS = [Way(how, codegen) for codegen in ("eager", "inductor") for how in ("optimize", "backend")]


def feature(
    section: str,
    name: str,
    outcome: Outcome,
    note: str,
    *,
    inductor: bool = False,
    codegens: tuple[str, ...] = ("eager", "inductor"),
) -> Callable[[Any], Any]:
    """Declare that a test, which takes a ``way``, is of this feature. It is run by ``optimize`` with eager codegen by default, and also with
    Inductor if ``inductor``; all other ways are slow tests. ``codegens``: those that make a difference."""
    assert section in SECTIONS, section

    def declare(test: Any) -> Any:
        assert name not in FEATURES, name
        FEATURES[name] = Feature(section, name, outcome, note, f"{test.__module__}.py::{test.__name__}")
        by_default = {"optimize-eager"}
        if inductor:
            by_default.add("optimize-inductor")
        cases = [
            pytest.param(way, id=way.name, marks=() if way.name in by_default else pytest.mark.slow)
            for way in WAYS
            if way.codegen in codegens
        ]
        return pytest.mark.parametrize("way", cases)(test)

    return declare


def optimizer_rows(section: str, rows: dict[str, tuple[Outcome, str]], test: Any) -> None:
    """Declare the cases of a parametrised test as rows of their own."""
    for name, (outcome, note) in rows.items():
        assert name not in FEATURES, name
        FEATURES[name] = Feature(section, name, outcome, note, f"{test.__module__}.py::{test.__name__}")


STARTS = ("token", "prompt", "prefill", "training")
"""What a change may be followed by first: a decoding step, a prompt of eight tokens (still few), one of many, a training step."""


@dataclass
class Twin:
    """A stock model, and an equal one under dorafx. Everything is done to both.

    Args:
        way: how dorafx is switched on.
        build: makes a model; the same one at each call.
        options: of dorafx.
    """

    way: Way
    build: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 2e-5

    def __post_init__(self) -> None:
        self.stock, self.model = self.build(), self.build()
        self.same_state()
        self.call = self.switched_on(self.model)

    def switched_on(self, model: Any) -> Callable[..., Any]:
        """What to call, for ``model`` to be run by dorafx."""
        if self.way.how == "optimize":
            return dorafx.optimize(model, codegen=self.way.codegen, **self.options)
        options = {"dorafx.codegen": self.way.codegen, **{f"dorafx.{k}": v for k, v in self.options.items()}}
        return torch.compile(model, backend="dorafx", options=options)

    def pairs(self) -> tuple[tuple[Any, Callable[..., Any]], ...]:
        """Each model, and what to call it by."""
        return (self.stock, self.stock), (self.model, self.call)

    # -- doing the same to both ----------------------------------------------------------------------------------------

    def do(self, change: Callable[[Any], Any]) -> tuple[Any, Any]:
        """Apply ``change`` to each model, with the same random numbers."""
        results = []
        for model, _ in self.pairs():
            torch.manual_seed(5)
            results.append(change(model))
        return results[0], results[1]

    def refused(self, change: Callable[[Any, Callable[..., Any]], Any]) -> Exception | None:
        """``change(model, call)`` raises the same error for both, or none for either; that of stock PEFT."""
        errors: list[Exception | None] = []
        for model, call in self.pairs():
            torch.manual_seed(5)
            try:
                change(model, call)
            except Exception as error:
                errors.append(error)
            else:
                errors.append(None)
        stock, ours = errors
        assert type(stock) is type(ours), errors
        assert str(stock) == str(ours)
        return stock

    # -- comparing -----------------------------------------------------------------------------------------------------

    def same_state(self) -> None:
        """Both models have the same parameters, which need gradients alike."""
        ours = dict(self.model.named_parameters())
        assert [n for n, _ in self.stock.named_parameters()] == list(ours)
        for name, p in self.stock.named_parameters():
            assert p.requires_grad == ours[name].requires_grad, name
            assert_close(ours[name].detach(), p.detach(), self.tolerance, name)

    def outputs(self, *shape: int, tolerance: float | None = None) -> None:
        """The outputs for ``shape`` tokens, under ``no_grad``."""
        with torch.no_grad():
            expected = output(self.stock, self.stock, *shape)
            assert_close(
                output(self.call, self.model, *shape), expected, tolerance or self.tolerance, f"{shape} tokens"
            )

    def token(self) -> None:
        """Two decoding steps: the second computes no norm."""
        self.outputs(1, 1)
        computed = rewrite_log().norms.computed
        self.outputs(1, 1)
        assert rewrite_log().norms.computed == computed, "a decoding step computed norms that had not changed"

    def prompt(self) -> None:
        self.outputs(1, 8)

    def prefill(self) -> None:
        self.outputs(3, 5)
        self.outputs(3, 5)

    def training(self) -> None:
        """A forward in training mode, and its gradients."""
        modes = [[m.training for m in model.modules()] for model, _ in self.pairs()]
        found = []
        for model, call in self.pairs():
            model.train()
            model.zero_grad()
            torch.manual_seed(11)
            y = output(call, model, 3, 5)
            if y.requires_grad:
                y.float().sin().sum().backward()
            found.append((y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
            model.zero_grad()
        (expected, gradients), (actual, ours) = found
        assert_close(actual, expected, self.tolerance, "in training")
        assert gradients.keys() == ours.keys()
        for name, gradient in gradients.items():
            assert_close(ours[name], gradient, 10 * self.tolerance, f"gradient of {name}")
        for (model, _), before in zip(self.pairs(), modes):
            for module, training in zip(model.modules(), before):
                module.training = training

    def check(self, start: str = "token") -> None:
        """All of it, beginning with ``start``."""
        first = STARTS.index(start)
        for step in (*STARTS[first:], *STARTS[:first]):
            getattr(self, step)()

    def warm(self) -> Twin:
        """All of it, and every DoRA layer is rewritten."""
        self.check()
        self.rewritten()
        return self

    def rewritten(self, *but: str) -> None:
        """Every DoRA layer is in the log, rewritten; none was missed, ``but`` for reasons of these kinds."""
        misses = [record for record in rewrite_log().misses if record.kind not in but]
        assert not misses, [(r.site, r.reason) for r in misses]
        sites = {record.site for record in rewrite_log().rewrites}
        missing = [s for s in dora_sites(self.model) if not any(s == site or s.endswith("." + site) for site in sites)]
        assert not missing, (missing, sites)

    @contextlib.contextmanager
    def without_recompilation(self) -> Iterator[None]:
        """What is called inside was compiled before."""
        with torch._dynamo.config.patch(error_on_recompile=True):
            yield


WIDTH = 24


class Layers(nn.Module):
    """Two linear layers of one shape with biases, ``[.., 24] -> [.., 24]``: one compilation serves both."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.silu(self.first(x)))


def layers() -> Layers:
    """The base model of most tests; the same one at each call."""
    torch.manual_seed(0)
    model = Layers()
    randomise(model)
    return model


def config(**changes: Any) -> LoraConfig:
    return lora_config(**{"target_modules": ["first", "second"], "task_type": None, **changes})


def adapted(**changes: Any) -> Any:
    """The base model with DoRA on both layers, magnitudes away from the norms, in evaluation mode."""
    model = get_peft_model(layers(), config(**changes))
    perturb(model)
    return model.eval()


def add(model: Any, name: str, seed: int = 5, **changes: Any) -> None:
    """Another adapter with weights of its own."""
    torch.manual_seed(seed)
    model.add_adapter(name, config(**{"r": 3, **changes}))
    perturb(model, name, seed)


def perturb(model: Any, name: str = "default", seed: int = 1) -> None:
    """Other weights for one adapter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator).to(p)
            if f"lora_B.{name}." in key:
                p.copy_(0.2 * noise)
            elif f"lora_magnitude_vector.{name}." in key:
                p.mul_(1 + 0.2 * noise)


def output(call: Callable[..., Any], model: Any, batch: int, length: int) -> torch.Tensor:
    """``call`` (the model or what was compiled of it) on tokens, or what stands for them."""
    if any(isinstance(module, Layers) for module in model.modules()):
        return call(torch.randn((batch, length, WIDTH), generator=torch.Generator().manual_seed(6)))
    result: torch.Tensor = call(input_ids=tokens(batch, length), use_cache=False).logits
    return result


def lora_layers(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, LoraLayer)]


def trained(model: Any) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def in_fp64(model: Any) -> Any:
    """A copy in fp64, without what compiles it."""
    return copy.deepcopy(model).double()
