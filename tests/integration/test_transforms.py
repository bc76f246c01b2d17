"""Programs under ``torch.func`` transforms and forward-mode differentiation: left as they are, and that is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from integration_support import assert_close
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

import dorafx
from dorafx import DorafxWarning, rewrite_log
from dorafx.match import ReasonKind

W, A, B, M, X = (
    torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    for seed, shape in enumerate([(6, 5), (2, 5), (6, 2), (6,), (3, 5)])
)


def dora(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
    norm = torch.linalg.vector_norm(W + 0.5 * b @ a, dim=1).detach()
    return (m / norm) * (torch.nn.functional.linear(x, W) + 0.5 * (x @ a.T) @ b.T)


def _dual(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> Any:
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(dora(forward_ad.make_dual(x, x.cos()), a, b, m)))


PROGRAMS: dict[str, Callable[..., Any]] = {
    "vmap over x": lambda x, a, b, m: vmap(lambda row: dora(row, a, b, m))(x),
    "vmap over factors": lambda x, a, b, m: vmap(dora, (None, 0, 0, None))(
        x, torch.stack([a, 2 * a]), torch.stack([b, b + 1]), m
    ),
    "grad": lambda x, a, b, m: grad(lambda a: dora(x, a, b, m).square().sum())(a),
    "grad of vmap": lambda x, a, b, m: grad(lambda a: vmap(lambda r: dora(r, a, b, m))(x).square().sum())(a),
    "jvp": lambda x, a, b, m: jvp(lambda x: dora(x, a, b, m), (x,), (x.cos(),)),
    "jacrev": lambda x, a, b, m: jacrev(dora, argnums=(1, 2, 3))(x, a, b, m),
    "hessian": lambda x, a, b, m: hessian(lambda m: dora(x, a, b, m).square().sum())(m),
    "dual level": _dual,
}


# No Hessian through Inductor: torch 2.13 itself cannot compile one (AOT meets a tensor of forward-mode AD that is not a fake one).
@pytest.mark.default_cases(*(f"{name}-eager" for name in PROGRAMS))
@pytest.mark.parametrize(
    ("name", "codegen"),
    [
        (name, codegen)
        for name in PROGRAMS
        for codegen in ("eager", "inductor")
        if (name, codegen) != ("hessian", "inductor")
    ],
)
def test_transformed_programs_are_left_alone(name: str, codegen: str) -> None:
    def results(function: Callable[..., Any]) -> list[torch.Tensor]:
        inputs = [t.clone().requires_grad_() for t in (X, A, B, M)]
        outputs = torch.utils._pytree.tree_leaves(function(*inputs))
        loss = sum(o.sin().sum() for o in outputs)
        gradients = torch.autograd.grad(loss, inputs, allow_unused=True)
        return [*outputs, *(torch.full((), torch.nan) if g is None else g for g in gradients)]

    expected = results(PROGRAMS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error", DorafxWarning)
        actual = results(torch.compile(PROGRAMS[name], backend="dorafx", options={"dorafx.codegen": codegen}))
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.isnan().equal(theirs.isnan())
        assert_close(ours.nan_to_num(), theirs.nan_to_num(), 1e-5, name)
    assert not rewrite_log().rewrites
    if name != "dual level":  # Dynamo does not trace it: there is no graph
        assert rewrite_log().misses
    for record in rewrite_log().misses:
        assert record.reason.startswith("the program is transformed (")
        assert record.kind == ReasonKind.TRANSFORMED.value


TRANSFORMED: dict[str, Callable[..., Any]] = {
    "vmap": lambda f: vmap(f, (0, None, None, None))(X, A, B, M),
    "grad": lambda f: grad(lambda *factors: f(X, *factors).square().sum(), argnums=(0, 1, 2))(A, B, M),
    "grad of vmap": lambda f: grad(lambda b: vmap(f, (0, None, None, None))(X, A, b, M).square().sum())(B),
    "jacrev": lambda f: jacrev(f, argnums=(1, 2, 3))(X, A, B, M),
    "jvp": lambda f: jvp(lambda x: f(x, A, B, M), (X,), (X.cos(),)),
}


@pytest.mark.default_cases("False-eager", "True-eager")
@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("warm", [False, True])
def test_transforms_of_a_compiled_function(warm: bool, codegen: str) -> None:
    compiled = torch.compile(dora, backend="dorafx", options={"dorafx.codegen": codegen})
    if warm:
        assert_close(compiled(X, A, B, M), dora(X, A, B, M), 1e-5)
    for name, transformed in TRANSFORMED.items():
        expected = torch.utils._pytree.tree_leaves(transformed(dora))
        for ours, theirs in zip(torch.utils._pytree.tree_leaves(transformed(compiled)), expected, strict=True):
            assert_close(ours, theirs, 1e-5, name)


def test_explain_and_verify_of_a_transformed_program() -> None:
    found = dorafx.explain(PROGRAMS["grad of vmap"], X, A, B, M)
    assert not found.rewrites
    assert [r.reason.split(" of ")[0] for r in found.misses] == ["the program is transformed (grad"]
    report = dorafx.verify(PROGRAMS["grad of vmap"], X, A, B, M)
    assert not report.checks
    assert report.log.misses


@pytest.mark.parametrize("name", ["vmap over x", "vmap over factors"])
def test_rewrite_of_a_traced_vmap(name: str) -> None:
    """``make_fx`` records what is left of a batch: plain operators, with no transform in the graph."""
    traced = make_fx(PROGRAMS[name])(X, A, B, M)
    assert_close(dorafx.rewrite(traced)(X, A, B, M), PROGRAMS[name](X, A, B, M), 1e-5)
    assert bool(rewrite_log().rewrites) == (name == "vmap over x")


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.m = (torch.nn.Parameter(t.clone()) for t in (A, B, M))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return dora(x, self.a, self.b, self.m)


def test_an_ensemble_is_left_alone_and_a_functional_call_is_rewritten() -> None:
    layer = Layer()
    stacked = {n: torch.stack([p.detach(), 2 * p.detach()]) for n, p in layer.named_parameters()}

    def ensemble(x: torch.Tensor) -> torch.Tensor:
        return vmap(lambda parameters: functional_call(layer, parameters, (x,)))(stacked)

    options = {"dorafx.codegen": "eager"}
    assert_close(torch.compile(ensemble, backend="dorafx", options=options)(X), ensemble(X), 1e-5)
    assert {r.reason.split(" of ")[0] for r in rewrite_log().records} == {"the program is transformed (vmap"}
    rewrite_log().clear()
    doubled = {n: 2 * p.detach() for n, p in layer.named_parameters()}
    single = torch.compile(lambda x: functional_call(layer, doubled, (x,)), backend="dorafx", options=options)
    assert_close(single(X), functional_call(layer, doubled, (X,)), 1e-5)
    assert rewrite_log().rewrites
    assert not rewrite_log().misses


def test_a_transform_of_something_else_is_no_miss() -> None:
    """Transformers makes attention masks by ``vmap``; a layer beside one is rewritten."""

    def masked(x: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(x.shape[0])
        mask = vmap(lambda q: vmap(lambda k: k <= q)(positions))(positions)
        return mask.to(x.dtype) @ dora(x, A, B, M)

    assert_close(torch.compile(masked, backend="dorafx", options={"dorafx.codegen": "eager"})(X), masked(X), 1e-5)
    assert rewrite_log().rewrites
    assert not rewrite_log().misses
    rewrite_log().clear()
    plain = torch.compile(vmap(lambda row: W @ row), backend="dorafx", options={"dorafx.codegen": "eager"})
    assert_close(plain(X), X @ W.T, 1e-5)
    assert not rewrite_log().records
