"""Whatever a program writes in place, its rewrite has the same values, gradients, layouts and aliases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from written_programs import Factors, program_of, statements

import dorafx
from dorafx import rewrite_log

Program = Callable[[Factors, torch.Tensor], Any]


def seen(run: Callable[[torch.Tensor], Any], p: Factors, strides: bool = True) -> tuple[list[Any], list[Any]]:
    """What a caller can tell of a program: values, layouts, whether they require gradients and which share memory; and the gradients."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=generator).requires_grad_()
    torch.manual_seed(3)
    outputs = run(x)
    leaves = [x, *(t for t in p.parameters() if t.requires_grad)]
    loss = sum(y.sin().sum() for y in outputs if y.requires_grad)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if isinstance(loss, torch.Tensor) else []
    storages = [y.untyped_storage()._cdata for y in outputs]
    objects = [id(y) for y in outputs]
    facts = [
        [
            (tuple(y.shape), y.dtype, y.requires_grad, y.stride() if strides else None, storages.index(s), objects.index(id(y)))
            for y, s in zip(outputs, storages)
        ],
        [y.detach().clone() for y in outputs],
    ]
    return facts, list(gradients)


def difference(wanted: tuple[list[Any], list[Any]], got: tuple[list[Any], list[Any]]) -> str:
    """What differs; empty where nothing does."""
    (facts, values), gradients = wanted
    (new_facts, new_values), new_gradients = got
    if facts != new_facts:
        return f"{new_facts} instead of {facts}"
    pairs = [("values", a, b) for a, b in zip(values, new_values)]
    pairs += [("gradients", a, b) for a, b in zip(gradients, new_gradients)]
    for what, a, b in pairs:
        if (a is None) != (b is None):
            return f"gradient flow: {b} instead of {a}"
        if a is not None and not torch.allclose(a, b, rtol=1e-9, atol=1e-9, equal_nan=True):
            return f"{what}: {b} instead of {a}"
    return "" if len(gradients) == len(new_gradients) else "gradient flow"


def captured(program: Program, p: Factors, capture: str) -> tuple[Any, Any] | None:
    """The program as it is captured, and its rewrite; None where the tracer does not take it."""
    x = torch.randn(2, 3, 5, dtype=torch.float64).requires_grad_()
    if capture in ("eager", "inductor"):
        torch._dynamo.reset()
        options = {"dorafx.codegen": capture, "dorafx.compose": "auto"}
        compiled = torch.compile(lambda x: program(p, x), backend="dorafx", dynamic=False, options=options)
        return (lambda x: program(p, x)), compiled
    if capture == "export":
        module = _Module(program, p)
        try:
            exported = torch.export.export(module, (x,))
        except Exception:
            return None
        original, new = exported.module(), dorafx.rewrite(exported).module()
        return _with_parameters_of(p, original), _with_parameters_of(p, new)
    names = [name for name, _ in p.named_parameters()]

    def functional(x: torch.Tensor, *parameters: torch.Tensor) -> Any:
        return torch.func.functional_call(_Module(program, p), {f"p.{n}": t for n, t in zip(names, parameters)}, (x,))

    try:
        gm = make_fx(functional, tracing_mode=capture)(x, *p.parameters())
    except RuntimeError:
        return None
    new = dorafx.rewrite(gm)
    return (lambda x: gm(x, *p.parameters())), (lambda x: new(x, *p.parameters()))


class _Module(torch.nn.Module):
    def __init__(self, program: Program, p: Factors) -> None:
        super().__init__()
        self.program, self.p = program, p

    def forward(self, x: torch.Tensor) -> Any:
        return self.program(self.p, x)


def _with_parameters_of(p: Factors, module: torch.nn.Module) -> Callable[[torch.Tensor], Any]:
    """An exported module, whose parameters are those that it was exported with."""
    return lambda x: torch.func.functional_call(module, {f"p.{n}": t for n, t in p.named_parameters()}, (x,))


def wrong(program: Program, capture: str) -> str | None:
    """What a rewrite of a program changes; empty where nothing, None where it is no program."""
    p = Factors()
    rewrite_log().clear()
    try:
        seen(lambda x: program(p, x), p)
        pair = captured(program, p, capture)
        wanted = seen(pair[0], p, capture != "inductor") if pair else None
    except Exception:
        return None
    if pair is None or wanted is None:
        return None
    if any("internal failure" in r.reason for r in rewrite_log().records):
        return rewrite_log().records[0].reason
    return difference(wanted, seen(pair[1], p, capture != "inductor"))


def smaller(lines: list[str], capture: str) -> tuple[list[str], str]:
    """The fewest statements that still go wrong, and how."""
    fault = wrong(program_of(lines), capture) or ""
    i = 0
    while i < len(lines) - 1:
        fewer = lines[:i] + lines[i + 1 :]
        found = wrong(program_of(fewer), capture)
        if found:
            lines, fault, i = fewer, found, 0
        else:
            i += 1
    return lines, fault


def fuzz(seeds: range, capture: str) -> tuple[int, int]:
    """Check the programs of these seeds; how many there are, and in how many of them something was rewritten."""
    checked = rewritten = 0
    for seed in seeds:
        lines = statements(seed)
        fault = wrong(program_of(lines), capture)
        if fault is None:
            continue
        checked += 1
        rewritten += bool(rewrite_log().rewrites)
        if fault:
            found, how = smaller(lines, capture)
            pytest.fail("\n    ".join([f"seed {seed}, {capture}: {how}", *found]))
    return checked, rewritten


COUNTS = {"eager": 40, "inductor": 2, "real": 20, "fake": 30, "export": 10}


@pytest.mark.parametrize("capture", COUNTS)
def test_random_programs(capture: str) -> None:
    checked, rewritten = fuzz(range(COUNTS[capture]), capture)
    assert checked >= COUNTS[capture] // 3, "most programs raise"
    assert rewritten > 0 or capture == "inductor", "nothing was rewritten, so nothing was checked"


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("capture", COUNTS)
def test_many_random_programs(capture: str) -> None:
    fuzz(range(1000, 1000 + 50 * COUNTS[capture]), capture)


def compose(p: Factors, x: torch.Tensor, n: torch.Tensor) -> torch.Tensor:
    return p.m / n * (F.linear(x, p.W) + 0.7 * F.linear(F.linear(x, p.A), p.B)) + p.b


def norm(p: Factors) -> torch.Tensor:
    return (p.W + 0.7 * (p.B @ p.A)).norm(dim=1)
