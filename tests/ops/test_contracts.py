"""What operators tell compilers against what they do: fake results equal real ones in shape, strides, offset, dtype and device,
no result shares memory with another tensor unless the schema says so, and both kinds of kernel raise the same errors."""

from __future__ import annotations

import random
from typing import Any

import contracts
import pytest
import torch
from contracts import DTYPES, LAYOUTS, ROWS, SIZES
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

import dorafx.ops  # noqa: F401


def operator(name: str) -> Any:
    return getattr(torch.ops.dorafx, name).default


def tensors(tree: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, torch.Tensor)]


def described(tree: Any) -> list[tuple[Any, ...]]:
    """Of each tensor what a compiler knows of it. Symbolic sizes are replaced by their values."""
    return [
        (
            tuple(int(n) for n in t.shape),
            tuple(int(n) for n in t.stride()),
            int(t.storage_offset()),
            t.dtype,
            t.device.type,
        )
        for t in tensors(tree)
    ]


def storages(tree: Any) -> list[int]:
    return [t.untyped_storage()._cdata for t in tensors(tree)]


def fake(op: Any, arguments: Any, symbolic: bool) -> Any:
    mode = FakeTensorMode(shape_env=ShapeEnv() if symbolic else None)
    known: dict[int, torch.Tensor] = {}

    def converted(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return known.setdefault(id(value), mode.from_tensor(value, static_shapes=not symbolic))

    given = pytree.tree_map(converted, arguments)
    with enable_python_dispatcher(), mode:
        return described(op(*given))


WRITERS = ("compose_", "compose_delta_")


def outcome(run: Any) -> Any:
    try:
        return run()
    except (ValueError, TypeError, RuntimeError) as error:
        return type(error), str(error)


def check(name: str, arguments: tuple[Any, ...], symbolic: bool) -> None:
    op = operator(name)
    # Before the real one, which may write to its arguments.
    expected = outcome(lambda: fake(op, arguments, symbolic))
    with torch.no_grad():
        out = outcome(lambda: op(*arguments))
    if name in WRITERS and isinstance(out, tuple) and out[:1] == (RuntimeError,):
        assert out == expected  # a tensor of which several elements share memory cannot be written to
        return
    what = name, described(arguments), [a for a in arguments if not tensors(a)]
    assert described(out) == expected, what
    mine, theirs = storages(out), storages(arguments)
    assert len(set(mine)) == len(mine), ("results share memory", what)
    assert not set(mine) & set(theirs), ("a result is an argument", what)


def test_every_operator_has_a_row() -> None:
    assert contracts.registered() == set(ROWS)


@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("name", ROWS)
def test_fake_is_real(name: str, symbolic: bool) -> None:
    """A sample of sizes, layouts and dtypes; the slow test takes each size, layout and dtype with each."""
    chance = random.Random(name)
    for i in range(3 if symbolic else 14):
        lay = contracts.mixed(i) if i % 2 else list(LAYOUTS.values())[i // 2 % len(LAYOUTS)]
        rows = list(ROWS[name](lay, DTYPES[i % 4], SIZES[i * 3 % len(SIZES)]))
        for arguments in chance.sample(rows, min(1 if symbolic else 2, len(rows))):
            check(name, arguments, symbolic)


@pytest.mark.slow
@pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ROWS)
def test_fake_is_real_everywhere(name: str, dtype: torch.dtype, symbolic: bool) -> None:
    """Each size in each layout, each time with another of an operator's many combinations of flags and optional arguments."""
    chance = random.Random(f"{name} {dtype} {symbolic}")
    for i, size in enumerate(SIZES):
        for lay in (*LAYOUTS.values(), *(contracts.mixed(100 * i + j) for j in range(10))):
            rows = list(ROWS[name](lay, dtype, size))
            check(name, chance.choice(rows), symbolic)


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_opcheck(name: str) -> None:
    for i, size in enumerate(SIZES[i] for i in (0, 3, 9)):
        rows = list(ROWS[name](contracts.mixed(i), DTYPES[i % 3], size))
        for arguments in random.Random(i).sample(rows, min(3, len(rows))):
            torch.library.opcheck(operator(name), arguments, test_utils=("test_schema", "test_faketensor"))


def _matrices(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(s).to(dtype) for s in shapes]


def _wrong() -> list[tuple[str, tuple[Any, ...]]]:
    w, left, right, n = _matrices((5, 4), (5, 2), (2, 4), (5,))
    x, h, y, g = _matrices((3, 4), (3, 2), (3, 5), (5,))
    f32 = torch.float32
    flags = (True, True, True)
    layout = ("bnb8", [5, 4], 1, f32)
    codes = torch.zeros(5, 4, dtype=torch.int8)
    return [
        ("row_norm", (w, left, right[:1], 0.7)),
        ("row_norm", (w, left, right, 0.7, "fast")),
        ("row_norm", (w.long(), left, right, 0.7)),
        ("row_norms", ([w], [left], [right], [0.7], "fast", [])),
        ("row_norms", ([], [], [], [], "fast", [])),
        ("row_norms", ([w, w], [left, left[:2]], [right, right], [0.7, 0.7], "tiled", [])),
        ("row_norms", ([w], [left], [right], [0.7], "factored", [n.double()])),
        ("row_norm_backward", (n[:3], w, left, right, n, 0.7, *flags)),
        ("row_norm_backward", (n, w, left, right, n.double(), 0.7, *flags)),
        ("row_norm_backward", (n, w, left.t(), right, n, 0.7, *flags)),
        ("row_norm_quantized", (codes, n[:2], None, left, right, 0.7, *layout)),
        ("row_norm_quantized", (codes, n, None, left.t(), right, 0.7, *layout)),
        ("dequantize", (codes, n, None, "unheard of", *layout[1:])),
        ("dequantize", (codes.view(torch.uint8), torch.zeros(20, 1), None, "hqq8", [5, 4], 1, f32)),
        ("compose_forward", (None, y, y[:2], g, None, 0.7, f32, None)),
        ("compose_forward", (y, y, None, g, None, 0.7, f32, None)),
        ("compose", (y, y, g[:2], None, 0.7, f32)),
        ("compose", (y, y, g, None, 0.7, f32, "unheard of")),
        ("compose_delta", (y, y, y, g[:2], 0.7, f32)),
        ("compose_", (y[:1], y, g, None, 0.7)),
        ("compose_", (y[:1].expand(3, 5), y, g, None, 0.7)),
        ("compose_delta_", (y[0], y, y, g, 0.7)),
        ("compose_backward", (y, g, None, 0.7, False, f32, f32, True, None)),
        ("compose_backward", (y, g[:2], None, 0.7, False, f32, f32, False, None)),
        ("compose_backward", (y[0], g, y, 0.7, False, f32, f32, True, None)),
        ("dora_linear", (x, w, h, left[:2], g, None, 0.7, f32)),
        ("dora_linear_forward", (x, w.half(), h, left, g, None, 0.7, f32, None)),
        ("cast_linear", (x, w.t())),
        ("cast_linear_backward", (x, w)),
    ]


@pytest.mark.parametrize("case", range(len(_wrong())))
def test_fake_raises_what_is_raised(case: int) -> None:
    name, arguments = _wrong()[case]
    before = [t.clone() for t in tensors(arguments)]
    raised, told = outcome(lambda: operator(name)(*arguments)), outcome(lambda: fake(operator(name), arguments, False))
    assert isinstance(raised, tuple) and raised[0] in (ValueError, TypeError, RuntimeError), (name, raised)
    assert raised == told
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(arguments))), "nothing was written"


DIFFERENTIABLE = ("cast_linear", "compose", "compose_delta", "dora_linear", "row_norm")


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_those_of_the_inputs(name: str) -> None:
    """In shape, dtype and device; and none shares memory with another, with an operand, or with the gradient that came in,
    unless it is that gradient itself, as that of a summand in ATen is."""
    chance = random.Random(name)
    for i in range(10):
        rows = list(ROWS[name](contracts.mixed(i), DTYPES[i % 4], SIZES[i]))
        arguments = list(chance.choice(rows))
        leaves = [k for k, a in enumerate(arguments) if isinstance(a, torch.Tensor)]
        for k in leaves:
            arguments[k] = arguments[k].detach().requires_grad_()
        inputs = [arguments[k] for k in leaves]
        y = operator(name)(*arguments)
        upstream = torch.ones_like(y)
        found = torch.autograd.grad(y, inputs, upstream)
        for gradient, leaf in zip(found, inputs):
            assert (gradient.shape, gradient.dtype, gradient.device) == (leaf.shape, leaf.dtype, leaf.device)
        own = [g for g in found if g is not upstream]
        assert len(found) - len(own) <= (name == "compose_delta")
        assert len({*storages(own), *storages(inputs), *storages(upstream)}) == len(own) + len({*storages(inputs)}) + 1


def test_gradients_of_vectors_that_are_broadcast() -> None:
    base, lora = torch.randn(2, 3, 5).double(), torch.randn(2, 3, 5).double()
    for of_g, of_bias in (
        ((), (5,)),
        ((1,), ()),
        ((5,), (1,)),
        ((3, 1), (3, 1)),
        ((1, 1, 5), (2, 1, 1)),
        ((1, 1), (3, 5)),
    ):
        g, bias = torch.randn(of_g).double(), torch.randn(of_bias).double()
        for kernel in ("auto", "triton"):
            leaves = [t.clone().requires_grad_() for t in (base, lora, g, bias)]
            found = torch.autograd.grad(
                torch.ops.dorafx.compose(*leaves, 0.7, torch.float64, kernel).sin().sum(), leaves
            )
            exact = torch.autograd.grad((leaves[2] * (leaves[0] + 0.7 * leaves[1]) + leaves[3]).sin().sum(), leaves)
            torch.testing.assert_close(found, exact)


def _norms_compiled(dtype: torch.dtype, layouts: list[contracts.Layout]) -> None:
    """Gradients through Inductor, whose code asserts the strides that the fake kernels describe."""
    groups = [
        [lay(t).detach().requires_grad_() for t in _matrices((5, 4), (5, 3), (3, 4), dtype=dtype)] for lay in layouts
    ]

    def program(groups: list[list[torch.Tensor]]) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for weight, left, right in groups:
            rows = torch.ops.dorafx.row_norm(weight, left, right, 0.7)
            columns = torch.ops.dorafx.row_norm(weight.t(), right.t(), left.t(), 0.7)
            total = total + rows.double().sin().sum() + columns.double().sin().sum()
        return total

    leaves = [t for group in groups for t in group]
    expected = torch.autograd.grad(program(groups), leaves)
    found = torch.autograd.grad(torch.compile(program, backend="inductor")(groups), leaves)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)


def test_norms_through_inductor() -> None:
    names = ("contiguous", "transposed", "with gaps", "expanded", "with an offset")
    _norms_compiled(torch.float32, [LAYOUTS[name] for name in names])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_through_inductor_in_every_layout(dtype: torch.dtype) -> None:
    _norms_compiled(dtype, [*LAYOUTS.values(), *(contracts.mixed(i) for i in range(6))])
