"""Graphs from every tracer: Dynamo's are everywhere else; here ``torch.export``, ``make_fx``, ``fx.symbolic_trace``, ``cond``."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode

import dorafx
from dorafx import rewrite_log
from dorafx.ops.norm import row_norm_unrolled


class Layer(nn.Module):
    """DoRA from scratch around an ``nn.Linear``."""

    def __init__(self, differentiable: bool = False, shape: tuple[int, int] = (20, 24)) -> None:
        super().__init__()
        d_out, d_in = shape
        self.base = nn.Linear(d_in, d_out)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(3, d_in) * 0.3), nn.Parameter(torch.randn(d_out, 3) * 0.3)
        self.m = nn.Parameter(torch.rand(d_out) + 0.5)
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
if sys.argv[1] == "with":
    import dorafx.ops
x = torch.load(sys.argv[3])
y = torch._inductor.aoti_load_package(sys.argv[2])(x)
torch.testing.assert_close(y, torch.load(sys.argv[4]), rtol=1e-5, atol=1e-5)
assert sys.argv[1] == "with" or not any(name.split(".")[0] == "dorafx" for name in sys.modules)
print("same")
"""


@pytest.mark.slow
def test_exported_program_compiles_ahead_of_time_and_runs_in_a_fresh_process(tmp_path: Path) -> None:
    """The package needs ``import dorafx.ops``, and says which operator is missing; a portable one needs nothing."""
    layer, x = Layer().eval(), x_of(4, 24)
    exported = torch.export.export(layer, (x,))
    torch.save(x, tmp_path / "x.pt")
    torch.save(layer(x).detach(), tmp_path / "y.pt")

    def run(package: str, imported: str) -> subprocess.CompletedProcess[str]:
        arguments = [imported, package, str(tmp_path / "x.pt"), str(tmp_path / "y.pt")]
        return subprocess.run([sys.executable, "-c", _LOAD, *arguments], capture_output=True, text=True, check=False)

    packages = {}
    for portable in (False, True):
        program = dorafx.rewrite(exported, portable=portable)
        path = str(tmp_path / f"{portable}.pt2")
        packages[portable] = str(torch._inductor.aoti_compile_and_package(program, package_path=path))
    assert_rewritten("linear", "linear")
    for package, imported in ((packages[False], "with"), (packages[True], "without")):
        done = run(package, imported)
        assert done.stdout.strip() == "same", done.stderr[-2000:]
    failed = run(packages[False], "without")
    assert failed.returncode != 0 and "dorafx::row_norm" in failed.stderr


class Largest(TorchDispatchMode):
    """The largest result of an operator that shares no memory with what it was given, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        operands = {a.untyped_storage().data_ptr() for a in args if isinstance(a, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in operands:
            self.bytes = max(self.bytes, result.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("differentiable", [False, True])
def test_portable_programs_hold_no_operator_of_ours(differentiable: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    layer = Layer(differentiable, (200, 240)).to(dtype)
    x = torch.randn(4, 240, dtype=dtype)
    tokens = {0: torch.export.Dim("tokens", min=2)}
    program = dorafx.rewrite(torch.export.export(layer, (x,), dynamic_shapes=(tokens,)), portable=True)
    others = [
        dorafx.rewrite(make_fx(layer)(x), portable=True),
        dorafx.rewrite(fx.symbolic_trace(layer), x, portable=True),
    ]
    assert_rewritten("linear", "linear", "linear")
    exact, wide = copy.deepcopy(layer).double(), x.double()
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for call in (program.module(), loaded, *others):
        assert not any("dorafx" in str(n.target) for n in call.graph.nodes)
        torch.testing.assert_close(call(x).double(), exact(wide), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(
        loaded(x[:3].repeat(5, 1)).double(), exact(wide[:3].repeat(5, 1)), rtol=tolerance, atol=tolerance
    )
    with torch.no_grad(), Largest() as largest:
        loaded(x)
    assert largest.bytes < layer.base.weight.nbytes / 8
    leaves = [layer.a, layer.b, layer.m]
    gradients = torch.autograd.grad(others[1](x).sin().sum(), leaves)
    for actual, expected in zip(gradients, torch.autograd.grad(layer(x).sin().sum(), leaves)):
        torch.testing.assert_close(actual, expected, rtol=30 * tolerance, atol=30 * tolerance)


def test_portable_leaves_a_weight_of_symbolic_size_alone() -> None:
    """The number of blocks would be that of the example."""
    values = torch.randn(20, 24), torch.randn(20, 3), torch.randn(3, 24)
    with pytest.raises(ValueError, match="symbolic size"):
        make_fx(lambda w, b, a: row_norm_unrolled(w, b, a, 1.0), tracing_mode="symbolic")(*values)


def test_every_spelling_of_a_transpose_in_an_exported_program() -> None:
    class Spelled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(20, 24), requires_grad=False)
            self.a, self.b = nn.Parameter(torch.randn(24, 3)), nn.Parameter(torch.randn(3, 20))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            n = (self.w + (self.b.T @ self.a.mT)).norm(dim=1).detach()
            return (x @ self.w.mH + (x @ self.a.H.adjoint()) @ self.b) / n

    layer, x = Spelled(), x_of(4, 24)
    new = dorafx.rewrite(torch.export.export(layer, (x,)))
    assert_rewritten("linear")
    torch.testing.assert_close(new.module()(x), layer(x), rtol=1e-5, atol=1e-5)


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
    expected, actual = gm(*leaves), new(*leaves)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    for g, w in zip(*(torch.autograd.grad(y.sin().sum(), leaves) for y in (actual, expected))):
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
    gradients, expected = (torch.autograd.grad(f(*leaves).sin().sum(), leaves) for f in (compiled, program))
    assert_rewritten("linear")
    for actual, gradient in zip(gradients, expected):
        torch.testing.assert_close(actual, gradient, rtol=1e-12, atol=1e-12)


def test_symbolic_trace_needs_an_example() -> None:
    layer, x = Layer(), x_of(4, 24)
    gm = fx.symbolic_trace(layer)
    with pytest.raises(ValueError, match=r"carry no shapes.*pass example inputs"):
        dorafx.rewrite(gm)
    new = dorafx.rewrite(gm, x)
    assert_rewritten("linear")
    assert any(n.op == "call_module" for n in gm.graph.nodes), "the caller's graph was changed"
    torch.testing.assert_close(new(x), layer(x), rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(layer(x).sin().sum(), [layer.a, layer.b, layer.m])
    for actual, gradient in zip(torch.autograd.grad(new(x).sin().sum(), [layer.a, layer.b, layer.m]), expected):
        torch.testing.assert_close(actual, gradient, rtol=1e-5, atol=1e-5)


def test_symbolic_trace_of_what_needs_values_is_left_as_it_is() -> None:
    """The scaling of ``addmm`` is a number that only the tensor's value tells."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.s = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.tensor(0.5), requires_grad=False)
            self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.randn(4, 2))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            v = torch.addmm(self.w, self.b, self.a, alpha=self.s)
            return torch.nn.functional.linear(x, v / v.norm(dim=1, keepdim=True))

    gm = fx.symbolic_trace(Scaled())
    assert dorafx.rewrite(gm, torch.randn(3, 6)) is gm
    (record,) = rewrite_log().records
    assert not record.rewritten and "cannot be run on fake tensors" in record.reason and record.advice


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
    expected = torch.autograd.grad(layer(x).sin().sum(), leaves)
    for actual, gradient in zip(torch.autograd.grad(compiled(x).sin().sum(), leaves), expected):
        torch.testing.assert_close(actual, gradient, rtol=1e-4, atol=1e-4)


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
