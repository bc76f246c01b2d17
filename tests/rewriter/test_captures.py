"""Graphs from every tracer: Dynamo's are everywhere else; here ``torch.export``, ``make_fx``, ``fx.symbolic_trace``, ``cond``."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize

import dorafx
from dorafx import rewrite_log


class Layer(nn.Module):
    """DoRA from scratch around an ``nn.Linear``."""

    def __init__(self, differentiable: bool = False) -> None:
        super().__init__()
        self.base = nn.Linear(24, 20)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(3, 24) * 0.3), nn.Parameter(torch.randn(20, 3) * 0.3)
        self.m = nn.Parameter(torch.rand(20) + 0.5)
        self.differentiable = differentiable

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n = (self.base.weight + 1.5 * self.b @ self.a).norm(dim=1)
        n = n if self.differentiable else n.detach()
        base = self.base(x) - self.base.bias
        return self.m / n * (base + 1.5 * F.linear(F.linear(x, self.a), self.b)) + self.base.bias


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def assert_rewritten(*patterns: str) -> None:
    assert [(r.pattern, r.reason) for r in rewrite_log().records] == [(p, "") for p in patterns]


@pytest.mark.parametrize("decomposed", [False, True])
@pytest.mark.parametrize("differentiable", [False, True])
def test_exported_program(decomposed: bool, differentiable: bool) -> None:
    layer, x = Layer(differentiable), x_of(4, 24)
    program = torch.export.export(layer, (x,))
    program = program.run_decompositions() if decomposed else program
    before = str(program.graph)
    new = dorafx.rewrite(program)
    assert type(new) is type(program) and new is not program and str(program.graph) == before
    assert_rewritten("linear")
    assert new.state_dict.keys() == program.state_dict.keys()
    torch.testing.assert_close(new.module()(x), layer(x), rtol=1e-5, atol=1e-5)
    # Every operator is one that a serialised program may hold.
    assert all(n.op in ("placeholder", "output", "call_function") for n in new.graph.nodes)


def test_exported_program_with_dynamic_tokens() -> None:
    layer = Layer()
    program = torch.export.export(layer, (x_of(4, 24),), dynamic_shapes=({0: torch.export.Dim("tokens", min=2)},))
    new = dorafx.rewrite(program)
    assert_rewritten("linear")
    for tokens in (2, 7, 33):
        x = x_of(tokens, 24)
        torch.testing.assert_close(new.module()(x), layer(x), rtol=1e-5, atol=1e-5)


_LOAD = """
import sys, torch
import dorafx.ops
x = torch.load(sys.argv[2])
y = torch._inductor.aoti_load_package(sys.argv[1])(x)
torch.testing.assert_close(y, torch.load(sys.argv[3]), rtol=1e-5, atol=1e-5)
print("same")
"""


def test_exported_program_compiles_ahead_of_time_and_runs_in_a_fresh_process(tmp_path: Path) -> None:
    layer, x = Layer().eval(), x_of(4, 24)
    program = dorafx.rewrite(torch.export.export(layer, (x,)))
    assert_rewritten("linear")
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "layer.pt2"))
    torch.save(x, tmp_path / "x.pt")
    torch.save(layer(x).detach(), tmp_path / "y.pt")
    arguments = [str(package), str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
    done = subprocess.run([sys.executable, "-c", _LOAD, *arguments], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "same", done.stderr[-2000:]


def test_make_fx() -> None:
    layer, x = Layer(), x_of(4, 24)
    gm = make_fx(layer)(x)
    new = dorafx.rewrite(gm)
    assert new is not gm and isinstance(new, fx.GraphModule)
    assert_rewritten("linear")
    torch.testing.assert_close(new(x), layer(x), rtol=1e-5, atol=1e-5)


EINSUMS = {
    "delta, product and norm": lambda w, a, b, m, x: (
        (m / torch.einsum("oi,oi->o", d := w + torch.einsum("or,ri->oi", b, a), d).sqrt())
        * (torch.einsum("...i,oi->...o", x, w) + torch.einsum("bti,ri,or->bto", x, a, b))
    ),
    "scaled between the factors": lambda w, a, b, m, x: (
        (m / (w + torch.einsum("or,r,ri->oi", b, a[:, 0], a)).norm(dim=1))
        * (F.linear(x, w) + torch.einsum("bti,ri,r,or->bto", x, a, a[:, 0], b))
    ),
    "rank of one": lambda w, a, b, m, x: (
        (m / (w + torch.einsum("ri,or->oi", a[:1], b[:, :1])).norm(dim=1))
        * (F.linear(x, w) + torch.einsum("bti,ri,or->bto", x, a[:1], b[:, :1]))
    ),
    "batched product of one": lambda w, a, b, m, x: (
        (m / (w + torch.bmm(b[None], a[None])[0]).norm(dim=1))
        * (F.linear(x, w) + torch.matmul(x[None] @ a.T[None, None], b.T[None, None]).squeeze(0))
    ),
    "by column": lambda w, a, b, m, x: (
        x @ (w.T + torch.einsum("ri,or->io", a, b)) * (m / torch.einsum("io,io->o", d := w.T + a.T @ b.T, d).sqrt())
    ),
}


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("name", EINSUMS)
def test_make_fx_takes_einsum_apart(name: str, mode: str) -> None:
    """Into axes that are moved and a batched product: the letters are found again."""
    torch.manual_seed(0)
    operands = [torch.randn(*s, dtype=torch.float64).requires_grad_() for s in ((20, 24), (3, 24), (20, 3), (20,))]
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    gm = make_fx(EINSUMS[name], tracing_mode=mode)(*operands, x)
    new = dorafx.rewrite(gm)
    if mode == "fake":
        assert_rewritten("linear")
    leaves = [*operands, x.requires_grad_()]
    wanted, got = gm(*leaves), new(*leaves)
    torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-12)
    for g, w in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (got, wanted))):
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-10)


def test_indices_are_no_parameters() -> None:
    """A constant among the attributes of a graph that names no parameters does not turn its inputs into activations."""

    def program(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        g = 1 / (w + b[:, [2, 1, 0]] @ a.flip(0)).norm(dim=1)
        low = F.conv1d(F.conv1d(x, a[..., None]), b[..., None])
        return g.view(1, -1, 1) * (F.conv1d(x, w[..., None]) + low)

    operands = [torch.randn(*s) for s in ((20, 24), (3, 24), (20, 3), (2, 24, 5))]
    gm = make_fx(program, tracing_mode="fake")(*operands)
    new = dorafx.rewrite(gm)
    assert_rewritten("convolution")
    torch.testing.assert_close(new(*operands), program(*operands), rtol=1e-4, atol=1e-4)


def test_letters_of_what_recorded_no_gradients() -> None:
    """Read where gradients are recorded again, a batched product of a region without them still has none."""

    def program(w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            delta = torch.bmm(b[None], a[None])
        return (F.linear(x, w) + x @ a.T @ b.T) / (w + delta[0]).norm(dim=1)

    w, a, b, x = (torch.randn(*s, dtype=torch.float64) for s in ((20, 24), (3, 24), (20, 3), (4, 24)))
    leaves = [t.requires_grad_() for t in (w, a, b, x)]
    compiled = torch.compile(program, backend="dorafx", fullgraph=True, options={"dorafx.codegen": "eager"})
    got, wanted = (torch.autograd.grad(f(*leaves).sin().sum(), leaves) for f in (compiled, program))
    assert_rewritten("linear")
    for g, expected in zip(got, wanted):
        torch.testing.assert_close(g, expected, rtol=1e-12, atol=1e-12)


def test_symbolic_trace_needs_an_example() -> None:
    layer, x = Layer(), x_of(4, 24)
    gm = fx.symbolic_trace(layer)
    with pytest.raises(ValueError, match=r"carry no shapes.*pass example inputs"):
        dorafx.rewrite(gm)
    new = dorafx.rewrite(gm, x)
    assert_rewritten("linear")
    assert any(n.op == "call_module" for n in gm.graph.nodes), "the caller's graph was changed"
    torch.testing.assert_close(new(x), layer(x), rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad(layer(x).sin().sum(), [layer.a, layer.b, layer.m])
    for got, want in zip(torch.autograd.grad(new(x).sin().sum(), [layer.a, layer.b, layer.m]), wanted):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_symbolic_trace_of_a_weight_that_is_written_between() -> None:
    """Every read of an attribute is a node of its own: the weight before and after a write are not the same."""

    class Written(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(20, 24), requires_grad=False)
            self.a, self.b = nn.Parameter(torch.randn(3, 24)), nn.Parameter(torch.randn(20, 3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = (self.weight + self.b @ self.a).norm(dim=1)
            self.weight.mul_(0.5)
            return (F.linear(x, self.weight) + F.linear(F.linear(x, self.a), self.b)) / n

    layer, x = Written(), x_of(4, 24)
    weight = layer.weight.clone()
    new = dorafx.rewrite(fx.symbolic_trace(layer), x)
    torch.testing.assert_close(layer.weight, weight, rtol=0, atol=0)
    rewritten = new(x)
    layer.weight.data.copy_(weight)
    torch.testing.assert_close(rewritten, layer(x), rtol=1e-5, atol=1e-5)


def test_symbolic_trace_without_dora_is_returned_as_it_is() -> None:
    gm = fx.symbolic_trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert dorafx.rewrite(gm, x_of(2, 4)) is gm


def test_branches_of_cond() -> None:
    layer = Layer()

    def program(flag: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.cond(flag, lambda x: layer(x), lambda x: layer(x) * 2, (x,))

    x = x_of(4, 24)
    compiled = torch.compile(program, backend="dorafx", fullgraph=True, options={"dorafx.codegen": "eager"})
    for flag in (torch.tensor(True), torch.tensor(False)):
        torch.testing.assert_close(compiled(flag, x), program(flag, x), rtol=1e-5, atol=1e-5)
    assert {(r.status, r.pattern) for r in rewrite_log().records} == {("rewritten", "linear")}
    assert len(rewrite_log().records) == 2, "one record a branch"


class _Adapted(nn.Module):
    """DoRA as a parametrization of a weight."""

    def __init__(self, d_out: int, d_in: int, rank: int) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rank, d_in) * 0.3), nn.Parameter(torch.randn(d_out, rank) * 0.3)
        self.m = nn.Parameter(torch.rand(d_out, 1) + 0.5)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        adapted = weight + self.b @ self.a
        return self.m * adapted / adapted.norm(dim=1, keepdim=True)


def test_parametrized_weight() -> None:
    layer = nn.Linear(24, 20)
    parametrize.register_parametrization(layer, "weight", _Adapted(20, 24, 3))
    x = x_of(4, 24)
    compiled = torch.compile(layer, backend="dorafx", fullgraph=True, options={"dorafx.codegen": "eager"})
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert_rewritten("linear")
    leaves = list(layer.parameters())
    wanted = torch.autograd.grad(layer(x).sin().sum(), leaves)
    for got, want in zip(torch.autograd.grad(compiled(x).sin().sum(), leaves), wanted):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_region_under_autocast() -> None:
    layer = Layer()

    def program(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        return y.float()

    x = x_of(4, 24)
    compiled = torch.compile(program, backend="dorafx", fullgraph=True, options={"dorafx.codegen": "eager"})
    exact = layer.double()(x.double())
    layer.float()
    error, original = (compiled(x) - exact).norm(), (program(x) - exact).norm()
    assert_rewritten("linear")
    assert error <= 1.5 * original
