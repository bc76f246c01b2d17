"""The dtype that a norm's factors are multiplied in: theirs, or the narrower one to which the program rounds them itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from integration_support import peft_perceptron

import dorafx  # noqa: F401  (registers the backend)
from dorafx.ops import norm
from dorafx.runtime import prologue

D_OUT, D_IN, RANK = 48, 40, 4
Program = Callable[..., torch.Tensor]


def _operands(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = (1, D_IN), (D_OUT, D_IN), (D_OUT, RANK), (RANK, D_IN), (D_OUT,)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def _layer(x: Any, w: Any, b: Any, a: Any, m: Any, adapted: Any) -> torch.Tensor:
    return (m / adapted.norm(dim=1)) * (x @ w.t() + 2.0 * ((x @ a.t()) @ b.t()))


def matmul(x: Any, w: Any, b: Any, a: Any, m: Any) -> torch.Tensor:
    return _layer(x, w, b, a, m, w + 2.0 * (b @ a))


def scaled_first(x: Any, w: Any, b: Any, a: Any, m: Any) -> torch.Tensor:
    return _layer(x, w, b, a, m, w + (2.0 * b) @ a)


def addmm(x: Any, w: Any, b: Any, a: Any, m: Any) -> torch.Tensor:
    return _layer(x, w, b, a, m, torch.addmm(w, b, a, alpha=2.0))


def transposed(x: Any, w: Any, b: Any, a: Any, m: Any) -> torch.Tensor:
    return _layer(x, w, b, a, m, w + 2.0 * torch.nn.functional.linear(a.t(), b).t())


def of_an_identity(x: Any, w: Any, b: Any, a: Any, m: Any) -> torch.Tensor:
    one = torch.eye(a.shape[1], dtype=a.dtype)
    delta = torch.nn.functional.linear(torch.nn.functional.linear(one, a), b).T
    return _layer(x, w, b, a, m, w + 2.0 * delta.to(w.dtype))


def outside_of_autocast(x: Any, w: Any, b: Any, a: Any, m: Any) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        n = (w + 2.0 * (b @ a)).norm(dim=1)
    return (m / n) * (x @ w.t() + 2.0 * ((x @ a.t()) @ b.t()))


def twice(x: Any, w: Any, b: Any, a: Any, m: Any) -> torch.Tensor:
    """Both products may be the norm's."""
    with torch.autocast("cpu", enabled=False):
        exact = b @ a
    return _layer(x, w, b, a, m, w + 2.0 * exact) + 0.0 * (b @ a).sum()


def two_adapters(x: Any, w: Any, b: Any, a: Any, m: Any) -> torch.Tensor:
    y, adapted = x @ w.t(), w
    for part, scale in ((slice(0, 3), 2.0), (slice(3, RANK), 0.5)):
        left, right = b[:, part], a[part]
        y, adapted = y + scale * ((x @ right.t()) @ left.t()), adapted + scale * (left @ right)
    return (m / adapted.norm(dim=1)) * y


def outer(x: Any, w: Any, b: Any, a: Any, m: Any) -> torch.Tensor:
    """Which autocast leaves in fp32."""
    n = (w + 2.0 * torch.outer(b[:, 0], a[0])).norm(dim=1)
    return (m / n) * (x @ w.t() + 2.0 * ((x @ a[:1].t()) @ b[:, :1].t()))


def column_times_row(x: Any, w: Any, b: Any, a: Any, m: Any) -> torch.Tensor:
    column, row = b[:, 0].unsqueeze(1), a[0].unsqueeze(0)
    return (m / (w + 2.0 * (column @ row)).norm(dim=1)) * (x @ w.t() + 2.0 * ((x @ row.t()) @ column.t()))


HALVES = (torch.bfloat16, torch.float16)
CASES = [
    *(
        (program, half, half)
        for program in (matmul, addmm, transposed, of_an_identity, two_adapters)
        for half in HALVES
    ),
    (scaled_first, torch.bfloat16, torch.bfloat16),
    # fp16 may hold ``2·B`` and not B.
    (scaled_first, torch.float16, None),
    (matmul, None, None),
    (outside_of_autocast, torch.bfloat16, None),
    (twice, torch.bfloat16, None),
    *((outer, autocast, None) for autocast in (None, torch.bfloat16)),
    (column_times_row, None, None),
    (column_times_row, torch.bfloat16, torch.bfloat16),
]


class Computed:
    """What the norms of a program are computed from."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype | None] = []
        self.lefts: list[torch.Tensor] = []

    def __call__(
        self, weights: Any, lefts: Any, rights: Any, scales: Any, algorithm: str, squares: Any, dtype: Any
    ) -> Sequence[torch.Tensor]:
        """As a kernel does it: products of rounded factors, sums in fp32."""
        self.dtypes.append(dtype)
        self.lefts += lefts
        rounded = [[t if dtype is None else t.to(dtype).float() for t in factors] for factors in (lefts, rights)]
        return norm.row_norms(weights, *rounded, scales, algorithm, squares, dtype)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Computed:
    row_norms = Computed()
    monkeypatch.setattr(prologue, "_row_norms", row_norms)
    return row_norms


def _under(dtype: torch.dtype | None) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def _compiled(program: Any) -> Any:
    return torch.compile(program, backend="dorafx", options={"dorafx.codegen": "eager", "dorafx.strict": True})


@pytest.mark.parametrize(
    ("program", "autocast", "expected"), CASES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_what_the_program_multiplies_in(
    program: Program, autocast: torch.dtype | None, expected: torch.dtype | None, computed: Computed
) -> None:
    """That dtype is handed over with the factors as they are, and costs no accuracy that the program has."""
    operands = _operands()
    with torch.no_grad(), _under(autocast):
        ours, stock = _compiled(program)(*operands), program(*operands)
    assert computed.dtypes == [expected]
    assert all(t.dtype == torch.float32 for t in computed.lefts), "nothing is cast in memory"
    exact = program(*(t.double() for t in operands))
    assert (ours - exact).norm() <= 1.05 * (stock - exact).norm() + 1e-6 * exact.norm()


@pytest.mark.parametrize("autocast", HALVES)
@pytest.mark.parametrize("base", [torch.float32, torch.bfloat16])
def test_peft(base: torch.dtype, autocast: torch.dtype, computed: Computed) -> None:
    """fp32 adapters under autocast, which is how PEFT and Trainer train."""
    model = peft_perceptron().train()
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            parameter.data = parameter.data.to(base)
    with _under(autocast):
        _compiled(model)(torch.randn(3, 5, 24, dtype=base)).sum().backward()
    assert computed.dtypes == [autocast]
    assert all(t.dtype == torch.float32 for t in computed.lefts)


def test_narrow_factors_need_no_other_dtype(computed: Computed) -> None:
    def cast(x: Any, w: Any, b: Any, a: Any, m: Any) -> torch.Tensor:
        return _layer(x, w, b, a, m, w + 2.0 * (b.bfloat16() @ a.bfloat16()))

    with torch.no_grad():
        _compiled(matmul)(*(t.bfloat16() for t in _operands()))
        _compiled(cast)(*_operands())
    assert computed.dtypes == [None, None]
    assert all(t.dtype == torch.bfloat16 for t in computed.lefts)


def test_what_is_no_dtype_of_factors() -> None:
    _, w, b, a, _ = _operands()
    for operator in (
        torch.ops.dorafx.row_norm,
        lambda *args: torch.ops.dorafx.row_norms(*[[t] for t in args[:4]], args[4], [], args[5]),
    ):
        with pytest.raises(TypeError, match=r"factor_dtype is fp16, bf16, fp32, fp64 or None; got torch\.int8"):
            operator(w, b, a, 1.0, "auto", torch.int8)
