"""Self-tests of the operators: each on small random data against its formula in fp64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

import dorafx.ops  # noqa: F401  (registers the operators)
from dorafx.ops import dispatch, reference

Tensors = Sequence[torch.Tensor]
# Shapes of the operands, the computation, the same in fp64, and whether the result is in fp32 whatever the dtype.
SelfTest = tuple[tuple[tuple[int, ...], ...], Callable[[Tensors], Tensors], Callable[[Tensors], Tensors], bool]

_D_OUT, _D_IN, _RANK, _TOKENS, _SCALE = 96, 160, 8, 33, 1.5
_FACTORS = ((_D_OUT, _D_IN), (_D_OUT, _RANK), (_RANK, _D_IN))
_OUTPUT = (_TOKENS, _D_OUT)


def run_self_test(name: str, device: str, dtype: torch.dtype) -> tuple[bool, str]:
    """Run one of :data:`SELF_TESTS`.

    Returns:
        Whether it passed, and the largest error relative to the largest value.
    """
    shapes, compute, exact, accumulates = SELF_TESTS[name]
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    actual = compute([v.to(device) for v in values])
    expected = exact([v.double() for v in values])
    error = max(
        float((g.cpu().double() - w).abs().max() / w.abs().max()) for g, w in zip(actual, expected, strict=True)
    )
    # Norms are accumulated and returned in fp32 whatever the dtype; anything else is rounded to it.
    bound = 1e-5 if accumulates else 8 * torch.finfo(dtype).eps
    kernel = ""
    if device == "cuda" and name.startswith("row_norm"):
        kernel = ", Triton" if dispatch.available() else ", no Triton"
    return error < bound, f"relative error {error:.1e}, at most {bound:.0e} allowed{kernel}"


def _row_norm(algorithm: str) -> Callable[[Tensors], Tensors]:
    return lambda t: [torch.ops.dorafx.row_norm(t[0], t[1], t[2], _SCALE, algorithm)]


def _row_norms(t: Tensors) -> Tensors:
    norms: list[torch.Tensor] = torch.ops.dorafx.row_norms(
        [t[0], t[3]], [t[1], t[4]], [t[2], t[5]], [_SCALE, 1.0], "auto", [None, None]
    )
    return norms


def _compose(t: Tensors) -> torch.Tensor:
    y: torch.Tensor = torch.ops.dorafx.compose(t[0], t[1], t[2].float(), t[3], _SCALE, t[0].dtype)
    return y


def _compose_delta(t: Tensors) -> torch.Tensor:
    y: torch.Tensor = torch.ops.dorafx.compose_delta(t[0], t[1], t[2], t[3].float(), _SCALE, t[0].dtype)
    return y


def _gradients(compute: Callable[[Tensors], torch.Tensor]) -> Callable[[Tensors], Tensors]:
    def gradients(tensors: Tensors) -> Tensors:
        leaves = [t.detach().requires_grad_() for t in tensors]
        return torch.autograd.grad(compute(leaves).sum(), leaves)

    return gradients


def _dora(t: Tensors) -> torch.Tensor:
    """``m ⊙ (x·Wᵀ + s·x·Aᵀ·Bᵀ) / ‖W + s·B·A‖``."""
    norm = torch.linalg.vector_norm(t[0] + _SCALE * (t[1] @ t[2]), dim=1).detach()
    y: torch.Tensor = t[4] / norm * (t[3] @ t[0].T + _SCALE * (t[3] @ t[2].T) @ t[1].T)
    return y


def _backend(t: Tensors) -> Tensors:
    """One graph through ``torch.compile(backend="dorafx")``: the entry point, Dynamo, matching and rewriting."""
    compiled = torch.compile(
        lambda *tensors: _dora(tensors),
        backend="dorafx",
        fullgraph=True,
        options={"dorafx.codegen": "eager", "dorafx.strict": True},
    )
    return [compiled(*t)]


def _exact_norm(t: Tensors) -> torch.Tensor:
    return reference.row_norm(t[0], t[1], t[2], _SCALE)


SELF_TESTS: dict[str, SelfTest] = {
    "backend": ((*_FACTORS, (_TOKENS, _D_IN), (_D_OUT,)), _backend, lambda t: [_dora(t)], True),
    "row_norm tiled": (_FACTORS, _row_norm("tiled"), lambda t: [_exact_norm(t)], True),
    "row_norm factored": (_FACTORS, _row_norm("factored"), lambda t: [_exact_norm(t)], True),
    "row_norms": (
        (*_FACTORS, *_FACTORS),
        _row_norms,
        lambda t: [_exact_norm(t[:3]), reference.row_norm(t[3], t[4], t[5], 1.0)],
        True,
    ),
    "row_norm backward": (
        _FACTORS,
        _gradients(lambda t: torch.ops.dorafx.row_norm(t[0], t[1], t[2], _SCALE, "auto")),
        _gradients(_exact_norm),
        False,
    ),
    "compose": (
        (_OUTPUT, _OUTPUT, (_D_OUT,), (_D_OUT,)),
        lambda t: [_compose(t)],
        lambda t: [reference.compose(t[0], t[1], t[2], t[3], _SCALE)],
        False,
    ),
    "compose backward": (
        (_OUTPUT, _OUTPUT, (_D_OUT,), (_D_OUT,)),
        _gradients(_compose),
        _gradients(lambda t: reference.compose(t[0], t[1], t[2], t[3], _SCALE)),
        False,
    ),
    "compose_delta": (
        (_OUTPUT, _OUTPUT, _OUTPUT, (_D_OUT,)),
        lambda t: [_compose_delta(t)],
        lambda t: [reference.compose_delta(t[0], t[1], t[2], t[3], _SCALE)],
        False,
    ),
    "compose_delta backward": (
        (_OUTPUT, _OUTPUT, _OUTPUT, (_D_OUT,)),
        _gradients(_compose_delta),
        _gradients(lambda t: reference.compose_delta(t[0], t[1], t[2], t[3], _SCALE)),
        False,
    ),
}
"""By name: shapes of the operands, what is tested, its formula, and whether the result is in fp32 whatever the dtype."""
