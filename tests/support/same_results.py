"""What several test folders need: run a program as it is and through dorafx, and compare values and gradients."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

import dorafx
from dorafx.backend import dorafx as backend
from dorafx.graphs.shapes import with_shapes
from dorafx.lift import Lifter, show
from dorafx.log import ReasonKind, Record


def check_same(program: Any, layer: Any, x: torch.Tensor, tolerance: float = 1e-12, **options: Any) -> None:
    """Outputs and gradients of ``program(layer, x)``, original against rewritten (eager codegen), in fp64."""
    leaves = [x, *layer.trainable()]
    expected = program(layer, x)
    expected_grads = torch.autograd.grad(expected.sin().sum(), leaves, allow_unused=True)

    def run(value: torch.Tensor) -> torch.Tensor:
        return program(layer, value)

    torch._dynamo.reset()
    compiled = torch.compile(
        run,
        backend=backend,
        fullgraph=True,
        dynamic=False,
        options={"dorafx.codegen": "eager", "dorafx.strict": False, **options},
    )
    actual = compiled(x)
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    actual_grads = torch.autograd.grad(actual.sin().sum(), leaves, allow_unused=True)
    for leaf, got, wanted in zip(leaves, actual_grads, expected_grads):
        assert (got is None) == (wanted is None), f"gradient flow changed for a leaf of shape {tuple(leaf.shape)}"
        if got is not None:
            torch.testing.assert_close(got, wanted, rtol=tolerance * 100, atol=tolerance * 100)


def check_everything(
    program: Any, layer: Any, x: torch.Tensor, codegen: str = "eager", grad: bool = True, tolerance: float = 1e-9
) -> None:
    """All that a caller can see of ``program(layer, x)`` (one tensor or a tuple), original against rewritten: values, strides, dtypes,
    which results share memory, and gradients (None against zeros), NaN and infinities included."""
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda value: program(layer, value),
        backend=backend,
        fullgraph=True,
        dynamic=False,
        options={"dorafx.codegen": codegen},
    )
    leaves = [x.detach().clone().requires_grad_(), *layer.trainable()]
    with torch.set_grad_enabled(grad):
        expected = _observed(lambda: program(layer, leaves[0]), leaves)
        for _ in range(2):
            actual = _observed(lambda: compiled(leaves[0]), leaves)
            _assert_alike(actual, expected, tolerance)


class _Holding(torch.nn.Module):
    """``program(layer, x)`` as a module that has the layer's tensors for parameters."""

    def __init__(self, program: Any, layer: Any) -> None:
        super().__init__()
        self.program, self.layer = program, layer
        for name, tensor in vars(layer).items():
            if isinstance(tensor, torch.Tensor):
                self.register_parameter(name, torch.nn.Parameter(tensor.detach().clone(), tensor.requires_grad))

    def forward(self, x: torch.Tensor) -> Any:
        layer = copy.copy(self.layer)
        vars(layer).update((name, getattr(self, name)) for name, _ in self.named_parameters())
        return self.program(layer, x)


CAPTURES = ("export", "make_fx", "make_fx without gradients", "symbolic_trace")


def check_captured(program: Any, layer: Any, x: torch.Tensor, capture: str, tolerance: float = 1e-9) -> None:
    """The same of a graph that is captured without Dynamo, one of ``CAPTURES``, against its rewrite. Most of these tracers leave tensors
    that do not tell of which values a gradient is needed."""
    module = _Holding(program, layer)
    leaves = [x.detach().clone().requires_grad_(), *module.parameters()]
    original: Any
    rewritten: Any
    if capture == "export":
        exported = torch.export.export(module, (leaves[0],))
        original, rewritten = exported.module(), dorafx.rewrite(exported).module()
    elif capture == "symbolic_trace":
        original = torch.fx.symbolic_trace(module)
        rewritten = dorafx.rewrite(original, leaves[0])
    else:
        names = [name for name, _ in module.named_parameters()]

        def functional(value: torch.Tensor, *parameters: torch.Tensor) -> Any:
            return torch.func.functional_call(module, dict(zip(names, parameters)), (value,))

        with torch.set_grad_enabled(capture == "make_fx"):
            gm: Any = make_fx(functional, tracing_mode="fake")(*leaves)
        graphs = (gm, dorafx.rewrite(gm))
        original, rewritten = (lambda value, graph=graph: graph(value, *module.parameters()) for graph in graphs)
    seen = []
    for run in (original, rewritten):
        of_module = [*run.parameters()] if isinstance(run, torch.nn.Module) else leaves[1:]
        wanted = [leaf for leaf in (leaves[0], *of_module) if leaf.requires_grad]
        seen.append(_observed(functools.partial(run, leaves[0]), wanted))
    _assert_alike(seen[1], seen[0], tolerance)


def _observed(run: Any, leaves: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[Any]]:
    made = run()
    results = list(made) if isinstance(made, tuple) else [made]
    differentiable = [r for r in results if r.requires_grad]
    if not differentiable:
        return results, [None] * len(leaves)
    weights = [torch.arange(1, r.numel() + 1, dtype=r.dtype).cos().view(r.shape) for r in differentiable]
    return results, list(torch.autograd.grad(differentiable, leaves, weights, allow_unused=True))


def _assert_alike(actual: Any, expected: Any, tolerance: float) -> None:
    (results, gradients), (wanted_results, wanted_gradients) = actual, expected
    assert len(results) == len(wanted_results)
    for i, (got, wanted) in enumerate(zip(results, wanted_results)):
        assert (got.dtype, got.shape, got.requires_grad) == (wanted.dtype, wanted.shape, wanted.requires_grad), i
        long = [axis for axis, size in enumerate(got.shape) if size > 1]
        assert [got.stride(a) for a in long] == [wanted.stride(a) for a in long], (i, got.stride(), wanted.stride())
        _assert_values(got.detach(), wanted.detach(), tolerance)
        for j in range(i):
            shares, shared = (
                t.untyped_storage().data_ptr() == u.untyped_storage().data_ptr()
                for t, u in ((got, results[j]), (wanted, wanted_results[j]))
            )
            assert shares == shared, f"results {j} and {i} share memory: {shares}, in the original {shared}"
    for i, (got, wanted) in enumerate(zip(gradients, wanted_gradients)):
        assert (got is None) == (wanted is None), f"leaf {i}: gradient {got}, in the original {wanted}"
        if got is not None:
            _assert_values(got, wanted, tolerance)


def _assert_values(got: torch.Tensor, wanted: torch.Tensor, tolerance: float) -> None:
    """Equal where the original is finite; elsewhere not finite, either. (``inf + (g - 1)·inf`` is NaN, and ``g·inf`` is not.)"""
    finite = wanted.isfinite()
    assert torch.equal(got.isfinite(), finite), (
        f"{(~finite).sum()} not finite, of the rewrite {(~got.isfinite()).sum()}"
    )
    if finite.any():
        size = float(wanted[finite].abs().max())
        torch.testing.assert_close(got[finite], wanted[finite], rtol=tolerance, atol=tolerance * max(size, 1e-3))


def defects(records: Iterable[Record]) -> list[str]:
    """The reasons that speak of a defect of dorafx: a pass, one replacement, or one operator that failed in a way which nobody foresaw."""
    failed = ReasonKind.INTERNAL_FAILURE, ReasonKind.REPLACEMENT_FAILED, ReasonKind.OPERATOR_FAILED
    kinds = {kind.value for kind in failed}
    return [r.reason for r in records if r.kind in kinds]


@torch.library.custom_op("dorafx_tests::scale", mutates_args=("t",))
def scale(t: torch.Tensor, by: float) -> None:
    """An operator of somebody's own that writes to its argument: ``torch.ops.dorafx_tests.scale`` in a graph."""
    t.mul_(by)


# -- terms ------------------------------------------------------------------------------------------------------------

_SHAPES: dict[str, tuple[int, ...]] = {
    "x": (5, 6), "W": (7, 6), "V": (7, 6), "A": (2, 6), "B": (7, 2), "M": (2, 2), "Q": (6, 6), "m": (7,), "b": (7,), "c": (6,),
    "d": (2,), "s": (), "row": (1, 6), "column": (7, 1), "token": (6,), "xs": (3, 5, 6), "Ws": (3, 7, 6), "image": (2, 3, 8, 8),
    "kernel": (4, 3, 3, 3), "K_A": (2, 3, 3, 3), "K_B": (4, 2, 1, 1), "table": (9, 6), "E_A": (9, 2), "E_B": (2, 6), "k": (4,),
}  # fmt: skip
_NO_PARAMETERS = ("x", "xs", "image", "token", "i", "s")


def operand(name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An argument of a small program by its name: ``W [7, 6]`` frozen, ``A [2, 6]``, ``B [7, 2]`` and ``m [7]`` trained, ``x [5, 6]``
    no parameter, ``i [5]`` indices, and so on."""
    if name == "i":
        return torch.arange(5)
    generator = torch.Generator().manual_seed(len(name) + ord(name[0]))
    tensor = torch.randn(_SHAPES[name], generator=generator).to(dtype)
    if name in _NO_PARAMETERS:
        return tensor
    return torch.nn.Parameter(tensor, requires_grad=name not in ("W", "kernel", "table"))


def graph_of(
    program: Callable[..., Any], tracer: str = "dynamo", dtypes: Mapping[str, torch.dtype] | None = None, **given: Any
) -> fx.GraphModule:
    """The graph of a program whose arguments are operands by name. ``tracer``: ``"dynamo"``, ``"make_fx"`` or ``"symbolic_trace"``."""
    names = list(inspect.signature(program).parameters)
    values = [
        given[name] if name in given else operand(name, (dtypes or {}).get(name, torch.float32)) for name in names
    ]
    if tracer == "make_fx":
        return make_fx(program, tracing_mode="fake")(*values)
    if tracer == "symbolic_trace":
        return with_shapes(fx.symbolic_trace(program), values)
    found: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: Any) -> Any:
        found.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(program, backend=keep, fullgraph=True, dynamic=False)(*values)
    return found[0]


def show_of(program: Callable[..., Any], tracer: str = "dynamo", **given: Any) -> str:
    """The term of what a program returns, as it is printed."""
    gm = graph_of(program, tracer, **given)
    lift = Lifter(gm.graph, is_parameter=None if tracer == "dynamo" else _is_operand).run()
    (result,) = next(node for node in gm.graph.nodes if node.op == "output").all_input_nodes
    return show(lift, result)


def _is_operand(node: fx.Node) -> bool:
    return str(node.target).removesuffix("_1") not in _NO_PARAMETERS
