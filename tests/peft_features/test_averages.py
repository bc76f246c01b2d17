"""Averages of parameters, and whatever else writes to them or puts others in their place."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from integration_support import assert_close
from peft_features import STARTS, Twin, Way, adapted, feature, layers, output, trained
from torch import nn, optim
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

import dorafx
from dorafx import rewrite_log

SECTION = "Averages and other writers"


def _step(model: Any, call: Any, optimizer: Any, k: int) -> None:
    x = torch.randn(3, 5, 24, generator=torch.Generator().manual_seed(k))
    model.train()
    call(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def _averaged(twin: Twin, averages: list[Any], calls: list[Any]) -> None:
    """Some training steps; after each the model and its average are compared with stock PEFT's."""
    optimizers = [optim.AdamW(trained(m), 1e-2, fused=True) for m, _ in twin.pairs()]
    for k in range(3):
        for (m, call), optimizer, average in zip(twin.pairs(), optimizers, averages):
            _step(m, call, optimizer, k)
            average.update_parameters(m)
            average.eval()
        twin.outputs(1, 1, tolerance=1e-4)
        with torch.no_grad():
            for shape in ((1, 1), (1, 1), (3, 5)):
                expected, actual = (output(call, average.module, *shape) for call, average in zip(calls, averages))
                assert_close(actual, expected, 1e-4, f"average after {k}")


@feature(
    SECTION,
    "`AveragedModel` made before `optimize`",
    "works",
    "`optimize` the average's `.module` by itself.",
)
def test_averaged_before(way: Way) -> None:
    averages = [AveragedModel(adapted(), multi_avg_fn=get_ema_multi_avg_fn(0.5)) for _ in range(2)]
    twin = Twin(way, adapted)
    _averaged(twin, averages, [averages[0].module, twin.switched_on(averages[1].module)])


@feature(
    SECTION,
    "`AveragedModel` of an optimized model",
    "works",
    "The average is a copy with stock PEFT's parameter names, not compiled. `optimize` its `.module`.",
)
def test_averaged_after(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    averages = [AveragedModel(m, avg_fn=get_ema_avg_fn(0.5)) for m, _ in twin.pairs()]
    assert [n for n, _ in averages[0].named_parameters()] == [n for n, _ in averages[1].named_parameters()]
    _averaged(twin, averages, [average.module for average in averages])
    _averaged(twin, averages, [averages[0].module, twin.switched_on(averages[1].module)])


def _swapped_in(way: Way, write: Callable[[list[Any], list[torch.Tensor]], None]) -> None:
    """An average written into the model and taken out again, between forwards of each kind."""
    twin = Twin(way, adapted).warm()
    optimizers = [optim.AdamW(trained(m), 1e-2, fused=True) for m, _ in twin.pairs()]
    averages = [[p.detach().clone() for p in trained(m)] for m, _ in twin.pairs()]
    twin.tolerance = 1e-4
    for k, start in enumerate(STARTS):
        for (m, call), optimizer, average in zip(twin.pairs(), optimizers, averages):
            _step(m, call, optimizer, k)
            torch._foreach_lerp_(average, [p.detach() for p in trained(m)], 0.3)
        live = [[p.detach().clone() for p in trained(m)] for m, _ in twin.pairs()]
        for (m, _), average in zip(twin.pairs(), averages):
            write(trained(m), [v.clone() for v in average])
        twin.check(start)
        for (m, _), values in zip(twin.pairs(), live):
            write(trained(m), values)
        twin.token()


def _each(write: Callable[[Any, torch.Tensor], None]) -> Callable[[list[Any], list[torch.Tensor]], None]:
    def write_all(parameters: list[Any], values: list[torch.Tensor]) -> None:
        for p, v in zip(parameters, values):
            write(p, v)

    return write_all


@feature(
    SECTION,
    "`p.data.copy_(v)`",
    "works",
    "Moves no version counter; seen by content. On a GPU without Triton: `dorafx.invalidate(model)`.",
)
def test_data_copied(way: Way) -> None:
    _swapped_in(way, _each(lambda p, v: p.data.copy_(v)))


@feature(
    SECTION,
    "`p.data = v`, `p.data.swap`, pairs of `.data` exchanged",
    "works",
    "The same parameter with new memory.",
)
def test_data_replaced(way: Way) -> None:
    def exchanged(p: Any, v: torch.Tensor) -> None:
        other = nn.Parameter(v)
        p.data, other.data = other.data, p.data

    _swapped_in(way, _each(exchanged))


@feature(SECTION, "`torch._foreach_copy_` of `.data`", "works", "As `copy_`, for all at once.")
def test_foreach_copied(way: Way) -> None:
    _swapped_in(way, lambda ps, vs: torch._foreach_copy_([p.data for p in ps], vs))


@feature(SECTION, "`torch._foreach_copy_` under `no_grad`, `p.copy_(v)`", "works", "Moves version counters.")
def test_foreach_copied_without_gradients(way: Way) -> None:
    def write(ps: list[Any], vs: list[torch.Tensor]) -> None:
        with torch.no_grad():
            torch._foreach_copy_(ps, vs)

    _swapped_in(way, write)


@feature(SECTION, "`vector_to_parameters`", "works", "All parameters become views of one vector: `p.data = …`.")
def test_vector(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    for k, start in enumerate(STARTS):

        def write(m: Any, k: int = k) -> None:
            vector = parameters_to_vector(trained(m)).detach()
            vector_to_parameters(vector * (1 + 0.1 * (k + 1)), trained(m))

        twin.do(write)
        twin.check(start)


@feature(
    SECTION,
    "`load_state_dict(assign=True)`",
    "works",
    "New parameter objects: one guard fails, and no norm is outdated.",
)
def test_assigned(way: Way) -> None:
    source = adapted()
    twin = Twin(way, adapted).warm()
    for k, start in enumerate(STARTS):
        with torch.no_grad():
            for p in source.parameters():
                p.mul_(1 + 0.05 * (k + 1))
        twin.do(lambda m: m.load_state_dict({n: v.clone() for n, v in source.state_dict().items()}, assign=True))
        twin.check(start)


@feature(
    SECTION,
    "`torch.utils.swap_tensors`",
    "works",
    "Of factors, magnitude and weight, after decoding. dorafx holds no reference to a plain parameter that would "
    "forbid it.",
)
def test_swap_tensors(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    for k, start in enumerate(STARTS):

        def swapped(m: Any, k: int = k) -> None:
            generator = torch.Generator().manual_seed(60 + k)
            layer = m.base_model.model.first
            for p in (
                layer.lora_A["default"].weight,
                layer.lora_B["default"].weight,
                layer.lora_magnitude_vector["default"].weight,
                layer.base_layer.weight,
            ):
                new = 0.2 * torch.randn(p.shape, generator=generator) + 0.5
                torch.utils.swap_tensors(p, nn.Parameter(new, requires_grad=p.requires_grad))

        refused = twin.refused(lambda m, _, swapped=swapped: swapped(m))
        assert refused is None, refused
        twin.check(start)


@feature(
    SECTION,
    "`torch.func.functional_call` with an average",
    "works",
    "Parameters are replaced for one call; afterwards the module has its own.",
)
def test_functional_call(way: Way) -> None:
    twin = Twin(way, adapted).warm()
    other = {n: 1.1 * p.detach() for n, p in twin.stock.named_parameters()}
    x = torch.randn(1, 1, 24)
    for _ in range(3):
        with torch.no_grad():
            expected = torch.func.functional_call(twin.stock, other, (x,))
            actual = torch.func.functional_call(twin.model, other, (x,))
        assert_close(actual, expected, 2e-5)
        twin.token()


@feature(
    SECTION,
    "`numpy`, `set_`, one element of `.data`",
    "works",
    "Writes into small tensors that move no counter. In a large weight a decoding step compares samples only: "
    "`dorafx.invalidate(model)`.",
)
def test_unseen_writes(way: Way) -> None:
    twin = Twin(way, adapted).warm()

    def by_numpy(m: Any) -> None:
        m.base_model.model.first.lora_B["default"].weight.detach().numpy()[:] *= 2

    def one_element(m: Any) -> None:
        m.base_model.model.second.lora_A["default"].weight.data[1, 3] += 1

    def set_(m: Any) -> None:
        p = m.base_model.model.second.lora_B["default"].weight
        with torch.no_grad():
            p.set_((1.5 * p).detach().clone())

    for write, start in zip((by_numpy, one_element, set_), STARTS):
        twin.do(write)
        twin.check(start)


def test_a_stale_norm_would_be_seen() -> None:
    """The checks above compare what a kept norm would make different: with the store's eyes shut they fail."""
    twin = Twin(Way("optimize", "eager"), adapted).warm()
    stale = copy.deepcopy(twin.stock)
    twin.do(lambda m: m.base_model.model.first.lora_B["default"].weight.data.mul_(2))
    x = torch.randn(1, 1, 24)
    with torch.no_grad():
        assert (stale(x) - twin.stock(x)).abs().max() > 1e-2
        before = rewrite_log().norms.computed
        twin.token()
        assert rewrite_log().norms.computed == before + 1, "of the layer that was written"
    dorafx.restore(twin.model)
    assert output(layers(), twin.stock, 1, 1).shape == (1, 1, 24)
