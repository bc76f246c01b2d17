"""Programs that look like DoRA and are not, or not wholly: the unsound part must stay, with a reason that names it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from negative_programs import NEGATIVES
from programs import Layer
from same_results import check_same
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import dorafx
from dorafx import rewrite_log
from dorafx.graphs.writes import written_nodes
from dorafx.versions import minor


@pytest.mark.parametrize("name", sorted(NEGATIVES))
def test_only_the_sound_part_is_rewritten(name: str) -> None:
    program, expected, reason = NEGATIVES[name]
    if name == "sum_written_in_a_branch" and minor(torch.__version__) < (2, 13):
        pytest.skip("torch.cond refuses bodies that write to their inputs (seen on torch 2.11)")
    check_same(program, Layer(), torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True), tolerance=1e-10)
    records = rewrite_log().records
    if name == "non_linear_operator_between_the_factors":
        # relu(B) and relu(A) are factors like any other; the output's product is not linear in x.
        assert {r.pattern for r in records} <= {"norm_only", "linear"}
        return
    assert [r.pattern if r.rewritten else "missed" for r in records] == expected, records
    if reason:
        assert all(reason in r.reason for r in records), [r.reason for r in records]


@pytest.mark.parametrize("codegen", ["eager", "inductor"])
@pytest.mark.parametrize("read", ["everywhere", "by the norm", "by the product"])
def test_bits_that_are_read_as_other_numbers(read: str, codegen: str) -> None:
    """``view(dtype)`` is no cast: the same memory, of numbers of another kind."""

    def program(x: torch.Tensor, w: torch.Tensor, a: torch.Tensor, b: torch.Tensor, m: torch.Tensor) -> torch.Tensor:
        other = w.view(torch.float16)
        n = ((w if read == "by the product" else other).float() + b @ a).norm(dim=1).detach()
        weight = (w if read == "by the norm" else other).float()
        return (m / n) * (x @ weight.T + (x @ a.T) @ b.T)

    w = torch.randn(8, 6).to(torch.bfloat16)
    operands = [torch.randn(3, 6), w, *(torch.randn(*s, requires_grad=True) for s in ((2, 6), (8, 2), (8,)))]
    compiled = torch.compile(program, backend="dorafx", options={"dorafx.codegen": codegen})
    actual, expected = compiled(*operands), program(*operands)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    for found, wanted in zip(
        torch.autograd.grad(actual.sum(), operands[2:]), torch.autograd.grad(expected.sum(), operands[2:])
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_integer_and_complex_weights_are_left_alone() -> None:
    def program(w: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        return (w + b @ a).norm(dim=1)

    operands = [torch.randn(*s, dtype=torch.complex64) for s in ((4, 5), (4, 2), (2, 5))]
    compiled = torch.compile(program, backend="dorafx", options={"dorafx.codegen": "eager"})
    torch.testing.assert_close(compiled(*operands), program(*operands))
    assert rewrite_log().records == []


class _Exported(nn.Module):
    def __init__(self, norm: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.w, self.b, self.a = map(nn.Parameter, _factors((4, 5), (4, 2), (2, 5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x @ self.w.T + x @ self.a.T @ self.b.T) / self.norm(self.w + self.b @ self.a)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (lambda t: t.norm(p=1, dim=1), "is of order 1"),
        (lambda t: t.amax(dim=1).exp(), "operator amax.default"),
        (lambda t: t.relu_().norm(dim=1), "is written in place before the norm is taken"),
    ],
)
def test_near_misses_of_exported_programs(norm: Callable[[torch.Tensor], torch.Tensor], reason: str) -> None:
    """The signature says what is a parameter, the graph does not."""
    model, (x,) = _Exported(norm), _factors((3, 5))
    new = dorafx.rewrite(torch.export.export(model, (x,)))
    torch.testing.assert_close(new.module()(x), model(x))
    assert [(r.status, reason in r.reason) for r in rewrite_log().records] == [("missed", True)], rewrite_log().records


def _factors(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


def _scaled(adapted: torch.Tensor, x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    return (x @ w.T + x @ a.T @ b.T) / adapted.norm(dim=1)


class _Leaves(nn.Module):
    """A sum that a module writes to, which ``fx.symbolic_trace`` takes for one call."""

    def __init__(self, leaf: nn.Module) -> None:
        super().__init__()
        self.leaf = leaf
        self.w, self.b, self.a = map(nn.Parameter, _factors((4, 5), (4, 2), (2, 5)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        adapted = self.w + self.b @ self.a
        self.leaf(adapted)
        return _scaled(adapted, x, self.w, self.b, self.a)


class _Doubling(nn.Module):
    def forward(self, t: torch.Tensor) -> None:
        t.mul_(2.0)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, _Doubling) or super().is_leaf_module(module, name)


@pytest.mark.parametrize(("leaf", "written"), [(nn.ReLU(inplace=True), True), (_Doubling(), True), (nn.ReLU(), False)])
def test_modules_that_are_leaves_of_the_trace(leaf: nn.Module, written: bool) -> None:
    model, (x,) = _Leaves(leaf), _factors((3, 5))
    new = dorafx.rewrite(fx.GraphModule(model, _Tracer().trace(model)), x)
    torch.testing.assert_close(new(x), model(x))
    expected = [("missed", "written in place before the norm")] if written else [("rewritten", "")]
    assert [(r.status, reason in r.reason) for r, (_, reason) in zip(rewrite_log().records, expected)] == [
        (status, True) for status, _ in expected
    ]


def test_a_product_written_under_autocast() -> None:
    """In place it is computed as it is, while autocast would round the operands of a product that writes nothing."""
    w, b, a, x = (t.float() for t in _factors((4, 5), (4, 2), (2, 5), (3, 5)))

    def program(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = w.clone().addmm_(b, a)
        return (x @ w.T + x @ a.T @ b.T) / (w + b @ a).norm(dim=1), total

    compiled = torch.compile(program, backend="dorafx", options={"dorafx.codegen": "eager"})
    with torch.autocast("cpu", torch.bfloat16):
        (y, total), (wanted, wanted_total) = compiled(x), program(x)
    torch.testing.assert_close(total, wanted_total)
    torch.testing.assert_close(y, wanted, rtol=0.02, atol=0.02)
    assert len(rewrite_log().rewrites) == 1


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_a_view_written_in_a_graph_of_real_tensors(mode: str) -> None:
    """``make_fx`` of real tensors gives every value a storage of its own, views included."""

    x, w, b, a = _factors((3, 5), (4, 5), (4, 2), (2, 5))

    def program(x: torch.Tensor) -> torch.Tensor:
        adapted = w + b @ a
        adapted[:2].mul_(3.0)
        return _scaled(adapted, x, w, b, a)

    new = dorafx.rewrite(make_fx(program, tracing_mode=mode, _allow_non_fake_inputs=True)(x))
    torch.testing.assert_close(new(x), program(x))
    assert [(r.status, "written in place" in r.reason) for r in rewrite_log().records] == [("missed", True)]


def test_running_statistics_are_written() -> None:
    """By operators whose schemas do not say so."""
    graph = fx.Graph()
    x, mean, var = map(graph.placeholder, ("x", "mean", "var"))
    normed = graph.call_function(torch.ops.aten.native_batch_norm.default, (x, None, None, mean, var, True, 0.1, 1e-5))
    graph.output(normed)
    assert {mean, var} <= written_nodes(graph) and x not in written_nodes(graph)


def test_a_triton_kernel_may_write_to_its_operands() -> None:
    """Without a device, as a graph alone: nothing that a kernel takes is read before and after it as one value."""
    kernels = pytest.importorskip("torch._higher_order_ops.triton_kernel_wrap")
    graph = fx.Graph()
    w, b, a = map(graph.placeholder, "wba")
    adapted = graph.call_function(torch.addmm, (w, b, a))
    target = kernels.triton_kernel_wrapper_mutation
    told = {"kernel_idx": 0, "constant_args_idx": 0, "grid": [(1, 1, 1)], "tma_descriptor_metadata": {}}
    call = graph.call_function(target, (), {**told, "kwargs": {"to": adapted, "count": 20}})
    row = graph.call_function(torch.select, (adapted, 0, 0))
    graph.output(graph.call_function(torch.add, (row, 1)))
    assert written_nodes(graph) == {adapted, call, row}


@pytest.mark.parametrize("shape", [(16, 3, 3, 3), (4, 12, 3, 3)])
def test_filters_viewed_as_others(shape: tuple[int, ...]) -> None:
    """The norm of each filter of a view that cuts or joins filters is another vector."""
    w, b, a = map(nn.Parameter, _factors((8, 6, 3, 3), (8, 2, 1, 1), (2, 6, 3, 3)))
    (x,) = _factors((shape[0],))

    def program(x: torch.Tensor) -> torch.Tensor:
        adapted = w + (b.flatten(1) @ a.flatten(1)).view(w.shape)
        return x / adapted.view(shape).norm(p=2, dim=(1, 2, 3))

    compiled = torch.compile(program, backend="dorafx", options={"dorafx.codegen": "eager"})
    torch.testing.assert_close(compiled(x), program(x))
    assert [(r.status, "operator view" in r.reason) for r in rewrite_log().records] == [("missed", True)]
