"""A program that runs in eager mode runs after ``optimize``: modes of the interpreter and of Dynamo, and changes of a model, between calls."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import assert_close, peft_perceptron, randomise
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrize

import dorafx

SLOW = pytest.mark.slow
NO_GRAD = torch.no_grad


class Pair:
    """A stock model and an equal one that dorafx runs; every change is made to both.

    Args:
        how: a scope of ``optimize``, or "backend".
        codegen: dorafx's.
        model: the stock model.
    """

    def __init__(self, how: str, codegen: str, model: Any = None) -> None:
        self.stock: Any = peft_perceptron().train() if model is None else model
        self.model = copy.deepcopy(self.stock)
        self.how, self.codegen = how, codegen
        self.call: Any = self.model
        if how == "backend":
            options = {"dorafx.codegen": codegen}
            self.call = torch.compile(self.model, backend="dorafx", options=options)
        else:
            dorafx.optimize(self.model, codegen=codegen, scope=how)
        self.x = torch.randn(3, 24)

    def change(self, write: Callable[[Any], Any]) -> None:
        for model in (self.stock, self.model):
            write(model)

    def tolerance(self, dtype: torch.dtype) -> float:
        return {torch.float64: 1e-6, torch.float32: 2e-4}.get(dtype, 5e-2)

    def compare(self, found: list[Any], wanted: list[Any], what: object = "") -> None:
        assert len(found) == len(wanted), what
        for one, other in zip(found, wanted, strict=True):
            assert (one is None) == (other is None), what
            if other is not None:
                assert one.dtype == other.dtype and one.shape == other.shape, what
                assert_close(one, other, self.tolerance(other.dtype), str(what))

    def check(self, what: object = "", x: torch.Tensor | None = None) -> None:
        """Values and gradients with respect to x and all parameters."""
        x = self.x if x is None else x
        results = []
        for owner, function in ((self.model, self.call), (self.stock, self.stock)):
            for parameter in owner.parameters():
                parameter.grad = None
            leaf = x.clone().requires_grad_()
            y = function(leaf)
            y.float().sin().sum().backward()
            results.append([y, leaf.grad, *(p.grad for p in owner.parameters())])
        self.compare(*results, what)

    def infer(self, what: object = "", mode: Callable[[], Any] = NO_GRAD, x: torch.Tensor | None = None) -> None:
        """Values of several tokens, and twice of one: the second time a norm may be reused."""
        x = self.x if x is None else x
        with mode():
            for part in (x, x[:1], x[:1]):
                self.compare([self.call(part)], [self.stock(part)], what)


def inference_mode_first(pair: Pair) -> None:
    pair.infer(mode=torch.inference_mode)
    pair.check()
    pair.infer()
    pair.check()
    pair.infer(mode=torch.inference_mode)


def no_grad_first(pair: Pair) -> None:
    pair.infer()
    pair.check()
    pair.change(lambda m: m.eval())
    pair.infer(mode=torch.inference_mode)
    pair.check()


def steps_and_inference_in_turns(pair: Pair) -> None:
    optimizers = [
        torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=0.05, fused=True)
        for m in (pair.stock, pair.model)
    ]
    for i in range(3):
        pair.change(lambda m: m.eval())
        pair.infer(i, torch.inference_mode)
        pair.change(lambda m: m.train())
        pair.check(i)
        for optimizer in optimizers:
            optimizer.step()


def functional_call(pair: Pair) -> None:
    """The replaced parameters count, all or some of them, before and after a call of the model's own."""
    named = {n: p.detach() for n, p in pair.stock.named_parameters()}
    for i in range(4):
        values = {n: p * (1 + 0.1 * (i + 1)) for n, p in named.items() if i % 2 or "magnitude" in n}
        results = []
        for model in (pair.model, pair.stock):
            leaves = {n: v.clone().requires_grad_() for n, v in values.items()}
            y = torch.func.functional_call(model, leaves, (pair.x,))
            gradients = torch.autograd.grad(y.sin().sum(), list(leaves.values()))
            with torch.no_grad():
                one = torch.func.functional_call(model, values, (pair.x[:1],))
            results.append([y, one, *gradients])
        pair.compare(*results, i)
        if i == 1:
            pair.infer("its own parameters")
    pair.check("its own parameters")


def stacked_states(pair: Pair) -> None:
    """An ensemble by ``stack_module_state`` and ``vmap``."""
    others = [copy.deepcopy(pair.stock) for _ in range(2)]
    for seed, other in enumerate(others):
        randomise(other, seed + 1)
    for _ in range(2):
        results = []
        for model in (pair.model, pair.stock):
            parameters, buffers = torch.func.stack_module_state([model, *others])  # type: ignore[list-item]

            def one(p: Any, b: Any, model: Any = model) -> torch.Tensor:
                return torch.func.functional_call(model, (p, b), (pair.x,))

            results.append([torch.vmap(one)(parameters, buffers)])
        pair.compare(*results)
        pair.infer()


def stances(pair: Pair) -> None:
    stance = torch.compiler.set_stance
    other = torch.randn(5, 24)
    with stance("force_eager"):
        pair.check("eager first")
    pair.check("compiled")
    with stance("force_eager"):
        pair.check("eager")
        pair.infer("eager")
    with stance("eager_on_recompile"):
        pair.check("compiled before")
        pair.check("another length", other)
    with stance("fail_on_recompile"):
        pair.check("compiled before")
        with pytest.raises(RuntimeError, match="recompile"), torch.no_grad():
            pair.call(torch.randn(7, 24))
    pair.check("back again", other)
    pair.infer("back again")
    # Norms that were kept before are those of the parameters that there were.
    pair.change(lambda m: [p.data.mul_(1.1) for p in m.parameters()])
    with stance("force_eager"):
        pair.infer("eager, after a change")
    pair.infer("compiled, after a change")


def disabled_parent(pair: Pair) -> None:
    """``torch.compiler.disable`` of what calls the model switches compilation off inside, too; results stay."""

    class Parent(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x.tanh())

    stock, parent = Parent(pair.stock), Parent(pair.call)
    for call in (
        torch.compiler.disable(parent),
        torch.compiler.disable(parent.forward, recursive=False),
        torch.compile(parent, backend="eager"),
        parent,
    ):
        results = []
        for owner, function in ((pair.model, call), (pair.stock, stock)):
            y = function(pair.x)
            parameters = [p for p in owner.parameters() if p.requires_grad]
            results.append([y, *torch.autograd.grad(y.sin().sum(), parameters)])
        pair.compare(*results)


def other_dtypes(pair: Pair) -> None:
    pair.infer()
    for dtype in (torch.bfloat16, torch.float16, torch.float64, torch.float32):
        pair.change(lambda m, dtype=dtype: m.half() if dtype == torch.float16 else m.to(dtype))
        pair.check(dtype, pair.x.to(dtype))
        pair.infer(dtype, x=pair.x.to(dtype))


def meta_and_back(pair: Pair) -> None:
    pair.check()
    pair.infer()
    state = {n: v.clone() for n, v in pair.stock.state_dict().items()}
    pair.change(lambda m: m.to("meta"))
    with torch.no_grad():
        assert pair.call(pair.x.to("meta")).shape == pair.x.shape[:1] + pair.stock(pair.x.to("meta")).shape[1:]
    pair.change(lambda m: (m.to_empty(device="cpu"), m.load_state_dict(state)))
    pair.check("back")
    pair.infer("back")
    pair.change(lambda m: m.load_state_dict({n: v * 1.2 for n, v in state.items()}, assign=True))
    pair.infer("assigned")
    pair.check("assigned")


def requires_grad_toggled(pair: Pair) -> None:
    for part in ("magnitude", "lora_A", "lora_B", "bias", "base_layer.weight"):
        for on in (False, True):

            def toggle(model: Any, part: str = part, on: bool = on) -> None:
                for name, parameter in model.named_parameters():
                    if part in name:
                        parameter.requires_grad_(on)

            pair.change(toggle)
            pair.check((part, on))
    pair.change(lambda m: m.requires_grad_(False))
    pair.infer()


def parametrized(pair: Pair) -> None:
    class Twice(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    def base(model: Any) -> Any:
        return model.base_model.model.first.base_layer

    pair.check()
    pair.infer()
    pair.change(lambda m: parametrize.register_parametrization(base(m), "weight", Twice()))
    pair.check("parametrized")
    pair.infer("parametrized")
    with torch.no_grad():
        pair.change(lambda m: base(m).parametrizations.weight.original.mul_(1.5))
    pair.infer("changed")
    pair.change(lambda m: parametrize.remove_parametrizations(base(m), "weight"))
    pair.check("removed")
    pair.infer("removed")


def autocast_on_and_off(pair: Pair) -> None:
    for dtype in (None, torch.bfloat16, None, torch.float16, torch.bfloat16, None):
        pair.tolerance = lambda _, dtype=dtype: 5e-2 if dtype else 2e-4  # type: ignore[method-assign]
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            pair.check(dtype)
            pair.infer(dtype)


def shared_memory(pair: Pair) -> None:
    pair.check()
    pair.infer()
    pair.change(lambda m: m.share_memory())
    pair.infer("shared")
    pair.check("shared")


def several_threads(pair: Pair) -> None:
    pair.change(lambda m: m.eval())
    inputs = [torch.randn(n, 24) for n in (1, 3, 1, 5)]
    with torch.no_grad():
        wanted = [pair.stock(x) for x in inputs]
    errors: list[BaseException] = []

    def work(i: int) -> None:
        try:
            with torch.no_grad():
                for _ in range(5):
                    pair.compare([pair.call(inputs[i])], [wanted[i]])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def in_a_fork(fails: Callable[[], None]) -> str:
    """What goes wrong in a child process; nothing if nothing does."""
    read, write = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            torch.set_num_threads(1)  # as a worker of a DataLoader does: OpenMP's threads are not there after a fork
            fails()
            os.write(write, b"ok")
        except BaseException as error:
            os.write(write, repr(error)[:500].encode())
        os._exit(0)
    os.close(write)
    answer = os.read(read, 1000).decode()
    os.waitpid(process, 0)
    return "" if answer == "ok" else answer or "no answer"


def forked(pair: Pair) -> None:
    """As workers of a ``DataLoader`` are that hold the model: forked before and after its first call."""
    pair.change(lambda m: m.eval())
    for _ in range(2):
        assert in_a_fork(lambda: pair.infer("in the child")) == ""
        pair.infer("in the parent")


def replicas(pair: Pair) -> None:
    """As ``nn.DataParallel`` makes them: a replica computes with parameters of its own, not with the original's."""
    pair.check()

    def replica(model: Any) -> Any:
        modules = list(model.modules())
        made = {id(module): module._replicate_for_data_parallel() for module in modules}
        for module in modules:
            for name, child in module._modules.items():
                setattr(made[id(module)], name, None if child is None else made[id(child)])
            for name, parameter in module._parameters.items():
                setattr(made[id(module)], name, None if parameter is None else parameter.clone() * 1.1)
        return made[id(model)]

    results = []
    for model in (pair.model, pair.stock):
        y = replica(model)(pair.x)
        parameters = [p for p in model.parameters() if p.requires_grad]
        results.append([y, *torch.autograd.grad(y.sin().sum(), parameters)])
    pair.compare(*results)
    pair.check("the original")
    pair.compare([nn.DataParallel(pair.model)(pair.x)], [pair.stock(pair.x)])


def recorded_by_other_tracers(pair: Pair) -> None:
    """``torch.jit.trace``, ``make_fx``, ``fx.symbolic_trace`` and ``torch.export`` record the model's own code."""
    from torch.fx.experimental.proxy_tensor import make_fx

    pair.change(lambda m: m.eval())
    for i in range(2):  # before and after the first call
        for record in (
            lambda m: torch.jit.trace(m, (pair.x,)),
            lambda m: make_fx(m)(pair.x),
            lambda m: torch.export.export(m, (pair.x,)).module(),
        ):
            with torch.no_grad():
                pair.compare([record(pair.model)(pair.x)], [pair.stock(pair.x)], i)
        errors = []
        for model in (pair.model, pair.stock):
            with pytest.raises(Exception) as raised:  # noqa: PT011  (PEFT's own code cannot be recorded so)
                torch.fx.symbolic_trace(model)
            errors.append(str(raised.value))
        assert errors[0] == errors[1]
        pair.infer(i)


CASES = [
    inference_mode_first, no_grad_first, steps_and_inference_in_turns, functional_call, stacked_states, stances,
    disabled_parent, other_dtypes, meta_and_back, requires_grad_toggled, parametrized, autocast_on_and_off, shared_memory,
    several_threads, forked, replicas, recorded_by_other_tracers,
]  # fmt: skip
WAYS = ("modules", "model", "auto", "backend")
# Each case in one way; a few, of the cases that differ most, in others.
QUICK = {(case, WAYS[i % 2]) for i, case in enumerate(CASES)} | {(functional_call, "backend"), (stances, "backend")}


@pytest.mark.parametrize(
    ("case", "how"),
    [
        pytest.param(case, how, marks=() if (case, how) in QUICK else SLOW, id=f"{case.__name__}-{how}")
        for case in CASES
        for how in WAYS
    ],
)
def test_eager_codegen(case: Callable[[Pair], None], how: str) -> None:
    pair = Pair(how, "eager")
    case(pair)
    if case not in (disabled_parent, recorded_by_other_tracers):
        assert dorafx.rewrite_log().rewrites


@pytest.mark.parametrize(
    ("case", "how"),
    [
        pytest.param(
            case, how, marks=() if (case, how) == (no_grad_first, "modules") else SLOW, id=f"{case.__name__}-{how}"
        )
        for case in CASES
        for how in ("modules", "backend")
        # A fork does not have the threads in which Inductor compiles.
        if case is not forked
    ],
)
def test_inductor(case: Callable[[Pair], None], how: str) -> None:
    case(Pair(how, "inductor"))


@pytest.mark.default_cases("model")
@pytest.mark.parametrize("how", WAYS)
def test_tied_weights(how: str) -> None:
    """Two base layers with one weight, trained; then untied."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(24, 24), nn.Linear(24, 24)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x).tanh())

    config = LoraConfig(r=3, target_modules=["a", "b"], use_dora=True)
    pair = Pair(how, "eager", randomise(get_peft_model(Tied(), config)))

    def bases(model: Any) -> tuple[Any, Any]:
        return model.base_model.model.a.base_layer, model.base_model.model.b.base_layer

    assert bases(pair.model)[0].weight is bases(pair.model)[1].weight
    pair.change(lambda m: bases(m)[0].weight.requires_grad_(True))
    pair.check()
    with torch.no_grad():
        pair.change(lambda m: bases(m)[0].weight.mul_(2))
    pair.check("changed")
    pair.infer("changed")

    def untie(model: Any) -> None:
        first, second = bases(model)
        second.weight = nn.Parameter(first.weight.detach() * 0.5)

    pair.change(untie)
    pair.infer("untied")
    pair.check("untied")
