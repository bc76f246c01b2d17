"""Whatever a program writes in place, its rewrite has the same values, gradients, layouts and aliases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from same_results import defects
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
            (
                tuple(y.shape),
                y.dtype,
                y.requires_grad,
                y.stride() if strides else None,
                storages.index(s),
                objects.index(id(y)),
            )
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
    if found := defects(rewrite_log().records):
        return found[0]
    try:
        got = seen(pair[1], p, capture != "inductor")
    except torch._dynamo.exc.TorchDynamoException:
        if refused_by_dynamo(program, p):
            return None
        raise
    return difference(wanted, got)


def refused_by_dynamo(program: Program, p: Factors) -> bool:
    """Whether a program that runs does not compile, with no backend of ours in it: torch's fake tensors cannot do all of what is written."""
    torch._dynamo.reset()
    try:
        seen(torch.compile(lambda x: program(p, x), backend="eager", dynamic=False), p)
    except torch._dynamo.exc.TorchDynamoException:
        return True
    return False


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


COUNTS = {"eager": 25, "real": 12, "fake": 20, "export": 6}


@pytest.mark.parametrize("capture", COUNTS)
def test_random_programs(capture: str) -> None:
    checked, rewritten = fuzz(range(COUNTS[capture]), capture)
    assert checked >= COUNTS[capture] // 6, "most programs raise"
    assert rewritten > 0, "nothing was rewritten, so nothing was checked"


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize(("capture", "count"), [*((c, 60 * n) for c, n in COUNTS.items()), ("inductor", 100)])
def test_many_random_programs(capture: str, count: int) -> None:
    fuzz(range(1000, 1000 + count), capture)


WHOLE, PART, NONE = ["linear"], ["norm_only"], list[str]()
PROGRAMS: dict[str, tuple[Program, list[str]]] = {}


def writes(expected: list[str]) -> Callable[[Program], Program]:
    """Register a program, with the patterns of its records."""

    def register(fn: Program) -> Program:
        PROGRAMS[fn.__name__] = fn, expected
        return fn

    return register


def norm(p: Factors) -> torch.Tensor:
    return (p.W + 0.7 * (p.B @ p.A)).norm(dim=1)


def base(p: Factors, x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, p.W)


def lora(p: Factors, x: torch.Tensor) -> torch.Tensor:
    return 0.7 * F.linear(F.linear(x, p.A), p.B)


@writes(WHOLE)
def detached_before_between_and_after(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x)
    first = y.detach().sum()
    y.add_(lora(p, x))
    second = y.detach().pow(2).mean()
    y.mul_(p.m / norm(p).detach())
    return y, y.detach(), first, second, y + p.b


@writes(WHOLE)
def detached_on_the_way(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x)
    y.add_(lora(p, x))
    logged = y.detach().pow(2).mean()
    return p.m / norm(p).detach() * y + p.b, logged


@writes(PART)
def detached_alias_read_after_the_write(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x)
    alias = y.detach()
    y.add_(lora(p, x))
    return p.m / norm(p) * y, alias.sum()


@writes(PART)
def written_through_the_detached(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x) + lora(p, x)
    y.detach().mul_(0.5)
    return (p.m / norm(p) * y,)


@writes(WHOLE)
def detached_alone_goes_on(p: Factors, x: torch.Tensor) -> Any:
    g = (p.m / norm(p)).detach()
    g *= 2.0
    return (g * (base(p, x) + lora(p, x)),)


@writes(WHOLE)
def magnitude_detached_in_place(p: Factors, x: torch.Tensor) -> Any:
    g = p.m.clamp(0, 5)
    g.detach_()
    return (g / norm(p) * (base(p, x) + lora(p, x)),)


@writes(WHOLE)
def read_before_it_is_detached_in_place(p: Factors, x: torch.Tensor) -> Any:
    g = p.m * 2.0 + 1.0
    before = g.sum()
    g.detach_()
    return g / norm(p) * (base(p, x) + lora(p, x)), before


@writes(PART)
def view_of_what_is_detached_in_place(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x) + lora(p, x)
    view = y[0]
    y.detach_()
    return p.m / norm(p) * y, view.sum()


@writes(WHOLE)
def transposed_in_place(p: Factors, x: torch.Tensor) -> Any:
    adapted = p.A.T @ p.B.T
    adapted.t_()
    adapted.mul_(0.7).add_(p.W)
    return (p.m / adapted.norm(dim=1) * (base(p, x) + lora(p, x)),)


@writes(WHOLE)
def axis_added_in_place(p: Factors, x: torch.Tensor) -> Any:
    g = p.m / norm(p)
    total = g.sum()
    g.unsqueeze_(0)
    return g * (base(p, x) + lora(p, x)), total


@writes(PART)
def view_read_after_the_write(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x)
    view = y[0]
    y += lora(p, x)
    return p.m / norm(p) * y, view.sin()


@writes(WHOLE)
def view_read_before_the_write(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x)
    read = y[0].sum()
    y += lora(p, x)
    return p.m / norm(p) * y, read


@writes(WHOLE)
def view_goes_on(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x).view(-1, 6)
    y += lora(p, x).view(-1, 6)
    y *= p.m / norm(p)
    return (y,)


@writes(WHOLE)
def one_tensor_returned_twice(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x) + lora(p, x)
    y *= p.m / norm(p)
    again = y.add_(p.b)
    return y, again, y.clone(), again[0]


@writes(PART)
def written_in_part(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x) + lora(p, x)
    y[0] += 1
    y[..., :3].mul_(2.0)
    y[..., 3:] = 0.25
    return (p.m / norm(p) * y,)


@writes(WHOLE)
def added_to_itself(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x)
    y += lora(p, x)
    y.add_(y)
    return (p.m / norm(p) * y,)


@writes(PART)
def written_without_gradients(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x) + lora(p, x)
    with torch.no_grad():
        y.mul_(2.0)
    return (p.m / norm(p) * y,)


@writes(WHOLE)
def written_without_gradients_where_there_are_none(p: Factors, x: torch.Tensor) -> Any:
    with torch.no_grad():
        n = norm(p)
        n.add_(1e-3)
    return (p.m / n * (base(p, x) + lora(p, x)),)


@writes(NONE)
def written_behind_autograds_back(p: Factors, x: torch.Tensor) -> Any:
    adapted = p.B @ p.A
    adapted.mul_(0.7).add_(p.W)
    n = adapted.norm(dim=1)
    adapted.data.mul_(1.5)
    return (p.m / n * (base(p, x) + lora(p, x)),)


@writes(PART)
def written_to_be_given(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x) + lora(p, x)
    torch.mul(y.detach(), 2.0, out=y.detach())
    return (p.m / norm(p) * y,)


@writes(PART)
def written_with_others(p: Factors, x: torch.Tensor) -> Any:
    y = base(p, x) + lora(p, x)
    torch._foreach_mul_([y], 1.5)
    return (p.m / norm(p) * y,)


@writes(WHOLE)
def layout_kept(p: Factors, x: torch.Tensor) -> Any:
    bias = (p.b.expand(5, 6) * p.A.sum()).T * 2.0
    other = (p.W.T * 2.0).T
    other.addmm_(p.B, p.A)
    bias.addmm_(p.B, p.A)
    return p.m / norm(p) * (base(p, x) + lora(p, x)), bias, other


@writes(WHOLE)
def dtype_kept(p: Factors, x: torch.Tensor) -> Any:
    total = p.b.float()
    total += p.m
    total *= 2.0
    return p.m / norm(p) * (base(p, x) + lora(p, x)), total


THROUGH_INDUCTOR = ("detached_on_the_way", "magnitude_detached_in_place")
CASES = [
    *((name, "eager") for name in PROGRAMS),
    *((name, "inductor") for name in THROUGH_INDUCTOR),
    *(pytest.param(n, "inductor", marks=pytest.mark.slow) for n in PROGRAMS if n not in THROUGH_INDUCTOR),
]


@pytest.mark.parametrize(("name", "codegen"), CASES)
def test_what_is_written(name: str, codegen: str) -> None:
    program, expected = PROGRAMS[name]
    assert wrong(program, codegen) == ""
    records = rewrite_log().records
    assert [r.pattern if r.rewritten else "missed" for r in records] == expected, records


def test_writes_where_no_gradients_are_recorded() -> None:
    p = Factors()
    x = torch.randn(2, 3, 5, dtype=torch.float64)

    def program(x: torch.Tensor) -> torch.Tensor:
        y = base(p, x)
        y += lora(p, x)
        y *= p.m / norm(p)
        return y

    for mode in (torch.no_grad, torch.inference_mode):
        torch._dynamo.reset()
        rewrite_log().clear()
        compiled = torch.compile(program, backend="dorafx", options={"dorafx.codegen": "eager"})
        with mode():
            torch.testing.assert_close(compiled(x), program(x))
        assert [r.pattern for r in rewrite_log().rewrites] == ["linear"]
        assert rewrite_log().rewrites[0].norm_placement == "prologue"


def test_writes_under_autocast() -> None:
    p = Factors().float()
    x = torch.randn(2, 3, 5)

    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = base(p, x)
        y += lora(p, x)
        total = p.m * 2.0
        total.reciprocal_()
        total.pow_(2)
        return y * (p.m / norm(p).detach()), total

    torch._dynamo.reset()
    compiled = torch.compile(program, backend="dorafx", options={"dorafx.codegen": "eager"})
    with torch.autocast("cpu", torch.bfloat16):
        for got, wanted in zip(compiled(x), program(x)):
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted, rtol=0.02, atol=0.02)
